"""What is ours: ``fusedops``, the public op; ``packed``, it on a packed weight; ``plan``.

A regime picks ``out=``, or the in-place twin where the op has one.
"""

from __future__ import annotations

import functools
import inspect

import fusedops
from fusedops.bench.peers.compiled import compiled_loop
from fusedops.bench.peers.peer import Peer, Thunk, always, destinations, refuse
from fusedops.bench.record import Regime
from fusedops.ladder.cpp import prepare_gelu_linear, prepare_rope
from fusedops.testing import Call, OpSpec

__all__ = ["PEERS"]


def _build(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    function = spec.public()
    if regime.work == "loop":
        return compiled_loop(call, regime, function)
    if regime.output == "fresh":
        return functools.partial(function, *call.args, **call.kwargs)
    targets = destinations(spec, call, regime)
    if regime.output == "in_place":
        twin = f"{spec.name}_"
        refuse(not hasattr(fusedops, twin), f"fusedops has no {twin}")
        return functools.partial(getattr(fusedops, twin), *call.args, **call.kwargs)
    takes_out = "out" in inspect.signature(function).parameters
    refuse(not takes_out, f"fusedops.{spec.name} has no out=")
    return functools.partial(function, *call.args, **call.kwargs, out=targets[0])


def _build_packed(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    refuse(spec.name not in ("linear", "gelu_linear"), f"{spec.name} takes no packed weight")
    refuse(regime.work != "forward", "a packed weight has no gradient")
    x, weight, bias = call.args
    assert weight is not None
    function = functools.partial(
        spec.public(), x, fusedops.pack_linear(weight, bias), **call.kwargs
    )
    if regime.output == "fresh":
        return function
    targets = destinations(spec, call, regime)
    refuse(spec.name == "linear", "fusedops.linear has no out=")
    return functools.partial(function, out=targets[0])


def _build_plan(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    refuse(spec.name not in ("rope", "gelu_linear"), f"there is no plan of {spec.name}")
    refuse(regime.work != "forward", "a plan has no gradient")
    x = call.args[0]
    assert x is not None
    refuse(not x.is_contiguous(), "a plan takes a contiguous input")
    prepare = prepare_rope if spec.name == "rope" else prepare_gelu_linear
    planned = prepare(*call.args, **call.kwargs)  # type: ignore[arg-type]
    if regime.output == "fresh":
        return planned
    return functools.partial(planned, *destinations(spec, call, regime))


PEERS = (
    Peer(
        "fusedops",
        "the op of this package",
        False,
        _build,
        always,
        differentiable=True,
        loops=True,
    ),
    Peer(
        "packed",
        "the op of this package on a weight from pack_linear",
        False,
        _build_packed,
        always,
    ),
    Peer(
        "plan",
        "fusedops.plan: its shape, weights and work memory are fixed",
        False,
        _build_plan,
        always,
    ),
)
