"""Every rung of the ladder at a few sizes: timed against each other, and each checked.

What is checked is what was timed: the outputs of the last timed calls, against the float64
reference at the bound of the op's OpSpec.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from timing import Measurement, Quantiles, interleaved
from torch import Tensor

from fusedops import _C, ladder
from fusedops.testing import DTYPES, SPECS, assert_within

BASELINE = "eager"


@dataclass(frozen=True)
class Case:
    """One shape in one dtype. slices: for rungs too slow to run it all, the part that they run."""

    op: str
    sample: Any
    dtype: str
    slices: dict[str, Any]
    skip: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        if self.op == "rope":
            return f"rope {list(self.sample.shape)}"
        rows = math.prod(self.sample.lead)
        return f"gelu_linear {rows}x{self.sample.k}->{self.sample.n}"

    @property
    def title(self) -> str:
        return f"{self.size} {self.dtype}"

    @property
    def work(self) -> tuple[int, int]:
        """Bytes and flops."""
        return self.sample.bytes_moved(DTYPES[self.dtype]), self.sample.flops()


@dataclass(frozen=True)
class Limit:
    """The least time that this machine's memory and vector units allow, and which of them."""

    seconds: float
    reason: str


@dataclass(frozen=True)
class Row:
    """One line of the table. scale: how much larger the case is than what this rung ran."""

    case: Case
    rung: str
    seconds: Quantiles
    speedup: Quantiles
    limit: Limit
    scale: float
    first: float
    fault: str | None

    @property
    def of_limit(self) -> float:
        return self.limit.seconds / self.seconds.median


def article_cases() -> Iterator[Case]:
    """The article's sizes and a small one; in the narrow dtypes without the slowest rungs."""
    rope = SPECS["rope"].sample("article/rope")
    large, small = (
        SPECS["gelu_linear"].sample(name) for name in ("article/gelu_linear", "bert-base/128")
    )
    loops = {sample: replace(sample, lead=(8,), n=64) for sample in (large, small)}
    cases = (
        ("rope", rope, {"python": replace(rope, shape=(1, 32, 64, 128))}),
        ("gelu_linear", large, {"python": loops[large], "numpy": replace(large, lead=(256,))}),
        ("gelu_linear", small, {"python": loops[small]}),
    )
    for dtype in ("f32", "bf16", "f16"):
        skip = () if dtype == "f32" else ("python", "numpy", "cpp")
        for op, sample, slices in cases:
            yield Case(op, sample, dtype, slices, skip)


def measure(case: Case, seconds: float = 3.0) -> list[Row]:
    """Time the available rungs of the case together, then check what they returned."""
    dtype = DTYPES[case.dtype]
    samples = {
        rung: case.slices.get(rung.name, case.sample)
        for rung in ladder.rungs(case.op)
        if rung.unavailable is None and rung.name not in case.skip
    }
    calls = {sample: sample.build(dtype) for sample in samples.values()}

    def candidate(rung: ladder.Rung) -> Callable[[], Tensor]:
        call = calls[samples[rung]]
        return lambda: rung(*call.args, **call.kwargs)

    with torch.no_grad():
        _limit(case)  # once before and once after
        measured = interleaved(
            {rung.name: candidate(rung) for rung in samples}, label=case.title, seconds=seconds
        )
        limit = _limit(case)
        return [_row(case, rung, sample, measured, limit) for rung, sample in samples.items()]


def _row(
    case: Case, rung: ladder.Rung, sample: Any, measured: dict[str, Measurement], limit: Limit
) -> Row:
    own = measured[rung.name]
    scale = case.sample.flops() / sample.flops()
    seconds = own.quantiles(scale)
    fault = _check(case, sample, own.output, rung.stepwise)
    possible = case.op == "gelu_linear" and has_matrix_unit()
    if fault is None and seconds.median < limit.seconds and not possible:
        fault = f"{seconds.median:.3g} s is less than the {limit.seconds:.3g} s of the limit"
    speedup = own.times_faster_than(measured[BASELINE], scale)
    return Row(case, rung.name, seconds, speedup, limit, scale, own.first, fault)


def _check(case: Case, sample: Any, output: Tensor, stepwise: bool) -> str | None:
    """None, or how the output is wrong."""
    try:
        assert_within(output, *_truth(case.op, sample, case.dtype, stepwise))
    except AssertionError as error:
        return str(error)
    return None


@lru_cache(maxsize=2)  # the rungs of a case follow each other
def _truth(op: str, sample: Any, dtype: str, stepwise: bool) -> tuple[Tensor, Tensor]:
    """The float64 result and the bound of every element's error."""
    call = sample.build(DTYPES[dtype])
    (expected,), (bound,) = SPECS[op].oracle(call), SPECS[op].error_bound(call, stepwise)
    return expected, bound


def _limit(case: Case) -> Limit:
    bytes_moved, flops = case.work
    # There is no faster unit for float16 than float32's.
    unit = "bf16" if case.dtype == "bf16" else "f32"
    copy = _peak(f"copy {bytes_moved}", lambda: _C.probe_copy(bytes_moved // 2))
    multiply_add = _peak(f"multiply-add {unit}", lambda: _C.probe_fma(unit))
    memory = Limit(bytes_moved / copy, f"its bytes at {copy / 1e9:.0f} GB/s, the speed of a copy")
    vectors = Limit(
        flops / multiply_add,
        f"its operations at {multiply_add / 1e9:.0f} GFLOP/s, the vector units' peak for {unit}",
    )
    return max(memory, vectors, key=lambda limit: limit.seconds)


_peaks: dict[str, float] = {}


def _peak(name: str, probe: Callable[[], float]) -> float:
    """The best that this process has seen: noise only ever slows a probe down."""
    _peaks[name] = max(_peaks.get(name, 0.0), *(probe() for _ in range(3)))
    return _peaks[name]


@cache
def has_matrix_unit() -> bool:
    """Whether matmuls can be faster than the vector units' peak: Apple's AMX, Intel's AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    return sys.platform == "darwin" or (cpuinfo.exists() and "amx_tile" in cpuinfo.read_text())
