"""The ladder's cases: every rung at the article's sizes, a small one and one row, as Results.

Rungs too slow to run a whole case run a slice of it; their times are scaled and say so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import fusedops
from fusedops import ladder
from fusedops.bench.measure import NOISE, Entry, measure
from fusedops.bench.peers.peer import Unsupported
from fusedops.bench.record import Case, Regime, Result
from fusedops.testing import SPECS, Call, Linear, OpSpec, Rope, Sample

__all__ = ["SUBJECT", "LadderCase", "cases", "run"]

SUBJECT = "cpp_fused"
SLOW = ("python", "numpy", "cpp")  # left out of the narrow dtypes


@dataclass(frozen=True)
class LadderCase:
    """A case whose candidates are the rungs. slices: the part that a slow rung runs."""

    case: Case
    sample: Sample
    slices: Mapping[str, Sample] = field(default_factory=dict)
    skip: tuple[str, ...] = ()


def cases(threads: int | None = None, isa: str | None = None) -> Iterator[LadderCase]:
    """The article's sizes, a small one and decode; in the narrow dtypes without the slowest rungs.

    Decode is where a call costs as much as its work, and a plan can tell.
    """
    threads, isa = threads or torch.get_num_threads(), isa or fusedops.isa.current()
    rope, token, large, small, row = (
        SPECS[op].sample(name)
        for op, name in (
            ("rope", "article/rope"),
            ("rope", "small/decode"),
            ("gelu_linear", "article/gelu_linear"),
            ("gelu_linear", "bert-base/128"),
            ("gelu_linear", "small/1-rows-768"),
        )
    )
    assert isinstance(rope, Rope)
    assert isinstance(large, Linear)
    assert isinstance(small, Linear)
    assert isinstance(row, Linear)
    slices: dict[Sample, dict[str, Sample]] = {
        rope: {"python": replace(rope, shape=(1, 32, 64, 128))},
        large: {
            "python": replace(large, lead=(8,), n=64),
            "numpy": replace(large, lead=(256,)),
        },
        small: {"python": replace(small, lead=(8,), n=64)},
        row: {"python": replace(row, n=64)},
    }
    for dtype in ("f32", "bf16", "f16"):
        for sample in (rope, token, large, small, row):
            op = "gelu_linear" if isinstance(sample, Linear) else "rope"
            case = Case(op, sample.name, dtype, Regime(), threads, isa)
            skip = () if dtype == "f32" else SLOW
            yield LadderCase(case, sample, slices.get(sample, {}), skip)


def run(
    ladder_case: LadderCase,
    seconds: float = 2.0,
    noise: float = NOISE,
    status: Callable[[str], None] = lambda text: None,
) -> Result:
    """The available rungs of the case, timed together and verified."""
    entries = [
        Entry(
            name=rung.name,
            build=functools.partial(_build, rung),
            missing=rung.unavailable,
            sample=ladder_case.slices.get(rung.name),
            device=rung.device,
        )
        for rung in ladder.rungs(ladder_case.case.op)
        if rung.name not in ladder_case.skip
    ]
    return measure(
        ladder_case.case,
        entries,
        subject=SUBJECT,
        sample=ladder_case.sample,
        seconds=seconds,
        noise=noise,
        status=status,
    )


def _build(rung: ladder.Rung, spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    if regime != Regime():
        raise Unsupported("a rung returns a new tensor")
    if rung.dtypes is not None and call.dtype not in rung.dtypes:
        raise Unsupported(f"computes in {' and '.join(str(d)[6:] for d in rung.dtypes)}")
    if rung.prepare is not None:
        return rung.prepare(*call.args, **call.kwargs)
    return functools.partial(rung, *call.args, **call.kwargs)
