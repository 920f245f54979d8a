"""What is ours: peer ``fusedops``, the public op, and ``packed``, the op on a packed weight.

A regime picks ``out=``, or the in-place twin where the op has one.
"""

from __future__ import annotations

import functools
import inspect

import fusedops
from fusedops.bench.peers.compiled import compiled_loop
from fusedops.bench.peers.peer import Peer, Thunk, always, destinations, refuse
from fusedops.bench.record import Regime
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
)
