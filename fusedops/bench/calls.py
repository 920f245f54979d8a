"""What a call costs besides the work: microseconds of tiny shapes, by every way to call.

The work is ``kernel``: a plan that C++ runs many times in a row on the same addresses. A plan may
cost no more than ``OVER_KERNEL`` beyond it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter as now  # before any candidate is imported
from typing import Any

import torch
from torch import Tensor

import fusedops
from fusedops import _C
from fusedops.bench.measure import COPIES, Entry
from fusedops.bench.peers import PEERS
from fusedops.bench.peers.peer import warm_outputs
from fusedops.bench.record import Case, Regime, Result
from fusedops.bench.report import duration, table
from fusedops.bench.timing import Candidate
from fusedops.ladder.cpp import prepare_gelu_linear, prepare_rope
from fusedops.nn import GELULinear
from fusedops.testing import SPECS, Call, Linear, OpSpec, Sample

__all__ = ["OVER_KERNEL", "SUBJECT", "Calls", "cases", "over_kernel", "text"]

SUBJECT = "public"
OVER_KERNEL = 1.5e-6  # seconds that a planned call may take beyond its kernel
PLANS = ("plan", "plan_out")
REPEATS = 200  # of the kernel, under one reading of the clock
TINY = Linear("calls/1x16->16", (1,), 16, 16, approximate="none")


@dataclass(frozen=True)
class Calls:
    """A case and the ways to call that are timed in it; gradients are enabled, as they are."""

    case: Case
    sample: Sample
    entries: tuple[Entry, ...]


def cases(threads: int, isa: str) -> Iterator[Calls]:
    """Rope at decode size, and gelu_linear at 1x16->16."""
    rope = SPECS["rope"].sample("small/decode")
    in_place = Entry("in_place", _in_place, note="fusedops.rope_")
    direct = (
        Entry("torch.ops", _rope_op, note="torch.ops.fusedops.rope.default"),
        Entry("torch.ops", _gelu_linear_op, note="torch.ops.fusedops.gelu_linear.default"),
    )
    arrays = (
        Entry("numpy", _rope_numpy, note="fusedops._C.rope", read=_tensor),
        Entry("numpy", _gelu_linear_numpy, note="fusedops._C.gelu_linear", read=_tensor),
    )
    plans = Entry.of(PEERS["plan"]), Entry("plan_out", _plan_out)
    kept = (
        Entry("packed", _packed, note="fusedops.pack_linear"),
        Entry("module", _module, note="fusedops.nn.GELULinear"),
        Entry("frozen", _frozen, note="the same, fusedops.freeze"),
    )
    kernels = (
        Entry("kernel", _rope_kernel, yardstick=True, note="the plan in a C++ loop"),
        Entry("kernel", _gelu_linear_kernel, yardstick=True, note="the plan in a C++ loop"),
    )
    for op, sample, special in (
        ("rope", rope, (direct[0], in_place, arrays[0], *plans, kernels[0])),
        ("gelu_linear", TINY, (direct[1], arrays[1], *plans, kernels[1], *kept)),
    ):
        entries = (
            Entry(SUBJECT, _public, note=f"fusedops.{op}"),
            *special,
            Entry("out", _out, note="out="),
            Entry("requires_grad", _requires_grad, note="the graph is recorded"),
            Entry("inference_mode", _inference_mode),
            Entry.of(PEERS["eager"]),
            Entry.of(PEERS["compile"]),
        )
        yield Calls(Case(op, sample.name, "f32", Regime(), threads, isa), sample, entries)


def over_kernel(result: Result) -> dict[str, float]:
    """Seconds beyond the bare kernel, of each planned call that the result has."""
    medians = {row.candidate: row.seconds.median for row in result.rows if row.fault is None}
    if "kernel" not in medians:
        return {}
    return {name: medians[name] - medians["kernel"] for name in PLANS if name in medians}


def text(results: Iterable[Result]) -> str:
    """What planned calls cost beyond their kernels, and what they may; nothing without a kernel."""
    lines = [
        (result.case.op, name, duration(max(cost, 0.0)), "FAILED" if cost > OVER_KERNEL else "ok")
        for result in results
        for name, cost in over_kernel(result).items()
    ]
    columns = ("op", "call", "over the kernel", f"at most {duration(OVER_KERNEL)}")
    return table(columns, lines) if lines else ""


def _public(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    return functools.partial(spec.public(), *call.args, **call.kwargs)


def _out(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    (out,) = warm_outputs(spec, call)
    return functools.partial(spec.public(), *call.args, **call.kwargs, out=out)


def _requires_grad(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    x = call.tensors[0].detach().requires_grad_()  # the same memory
    return functools.partial(spec.public(), x, *call.args[1:], **call.kwargs)


def _inference_mode(spec: OpSpec, call: Call, regime: Regime) -> Candidate:
    return Candidate(_public(spec, call, regime), around=torch.inference_mode)


def _in_place(spec: OpSpec, call: Call, regime: Regime) -> Candidate:
    """Each call of a batch overwrites a copy of x of its own, which is filled again untimed."""
    x, *rest = call.args
    assert x is not None
    copies = [torch.empty_like(x) for _ in range(COPIES)]

    def prepare() -> None:
        for copy in copies:
            copy.copy_(x)

    runs = tuple(functools.partial(fusedops.rope_, c, *rest, **call.kwargs) for c in copies)  # type: ignore[arg-type]
    return Candidate(runs[0], batch=runs, prepare=prepare)


def _rope_op(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    k = call.kwargs
    form = k["offset"], k["layout"] == "bshd", k["interleaved"], k["conjugate"]
    return functools.partial(torch.ops.fusedops.rope.default, *call.args, *form)


def _gelu_linear_op(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    return functools.partial(
        torch.ops.fusedops.gelu_linear.default, *call.args, call.kwargs["approximate"]
    )


def _plan_out(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    return PEERS["plan"].build(spec, call, Regime.parse("given"))


def _rope_kernel(spec: OpSpec, call: Call, regime: Regime) -> Candidate:
    return _kernel(prepare_rope(*call.args, **call.kwargs), *warm_outputs(spec, call))  # type: ignore[arg-type]


def _gelu_linear_kernel(spec: OpSpec, call: Call, regime: Regime) -> Candidate:
    return _kernel(prepare_gelu_linear(*call.args, **call.kwargs), *warm_outputs(spec, call))  # type: ignore[arg-type]


def _kernel(planned: Callable[[], Tensor], out: Tensor) -> Candidate:
    assert isinstance(planned, functools.partial)
    assert isinstance(planned.func, _C.Plan)
    plan, (x,) = planned.func, planned.args

    def seconds() -> float:
        start = now()
        _C.repeat_plan(plan, x.data_ptr(), out.data_ptr(), REPEATS)
        return (now() - start) / REPEATS

    return Candidate(lambda: None, seconds=seconds)


def _packed(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    x, *layer = call.tensors
    return functools.partial(spec.public(), x, fusedops.pack_linear(*layer), **call.kwargs)


def _module(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    x, weight, bias = call.tensors
    module = GELULinear(weight.shape[1], weight.shape[0], **call.kwargs)
    module.weight, module.bias = (
        torch.nn.Parameter(t, requires_grad=False) for t in (weight, bias)
    )
    return functools.partial(module, x)


def _frozen(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    run = _module(spec, call, regime)
    fusedops.freeze(run.func)  # type: ignore[attr-defined]
    return run


def _rope_numpy(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    x, cos, sin = (t.numpy() for t in call.tensors)
    rows = slice(call.kwargs["offset"], call.kwargs["offset"] + x.shape[-2])
    return functools.partial(_C.rope, x, cos[rows], sin[rows])


def _gelu_linear_numpy(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    x, weight, bias = (t.numpy() for t in call.tensors)
    return functools.partial(_C.gelu_linear, x, weight, bias, call.kwargs["approximate"])


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array)
