"""What bars are measured with and what is no candidate: a copy, two calls, a part of the op.

A yardstick is timed in the rounds of the case. It is never verified and never a baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fusedops
from fusedops import _C
from fusedops.bench.measure import Entry
from fusedops.bench.peers.peer import Unsupported, main_inputs, warm_outputs
from fusedops.bench.record import Regime
from fusedops.bench.timing import Candidate
from fusedops.testing import Call, OpSpec

__all__ = ["YARDSTICKS"]


def _copy(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    """A copy_ of the outputs' bytes into a warm tensor."""
    targets = warm_outputs(spec, call)
    sources = [torch.zeros_like(target) for target in targets]

    def run() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return run


def _fresh_copy(spec: OpSpec, call: Call, regime: Regime) -> Candidate:
    """A copy of the outputs' bytes into memory that was never touched, on huge pages."""
    size = sum(t.numel() * t.element_size() for t in warm_outputs(spec, call))

    def seconds() -> float:
        return 2 * size / _C.probe_fresh_copy(size, 1)

    return Candidate(lambda: None, seconds=seconds)


def _two_calls(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    """Our rope of q, then of k, into given tensors where the regime says so."""
    if spec.name != "rope_qk":
        raise Unsupported("two calls are the yardstick of rope_qk")
    xs, rest = main_inputs(spec, call), call.args[2:]
    targets: tuple[Tensor | None, ...] = (None, None)
    if regime.output != "fresh":
        targets = warm_outputs(spec, call) if regime.output == "given" else xs

    def run() -> tuple[Tensor, ...]:
        return tuple(
            fusedops.rope(x, *rest, **call.kwargs, out=target)  # type: ignore[arg-type]
            for x, target in zip(xs, targets, strict=True)
        )

    return run


def _unfused(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    """Our linear, then our gelu."""
    if spec.name != "gelu_linear":
        raise Unsupported("linear, then gelu is the yardstick of gelu_linear")
    x, weight, bias = call.args
    assert x is not None
    assert weight is not None
    return lambda: fusedops.gelu(fusedops.linear(x, weight, bias), **call.kwargs)


def _linear(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
    """Our linear alone."""
    if spec.name != "gelu_linear":
        raise Unsupported("linear alone is the yardstick of gelu_linear")
    x, weight, bias = call.args
    assert x is not None
    assert weight is not None
    return lambda: fusedops.linear(x, weight, bias)


YARDSTICKS = {
    name: Entry(name, build, yardstick=True, note="a yardstick")
    for name, build in (
        ("copy", _copy),
        ("fresh_copy", _fresh_copy),
        ("two_calls", _two_calls),
        ("unfused", _unfused),
        ("linear", _linear),
    )
}
