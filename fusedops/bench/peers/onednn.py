"""Peers ``onednn`` and ``onednn-plain``: oneDNN's linear with the activation in its epilogue.

They are what torch.compile's freezing calls, called directly: ``mkldnn._reorder_linear_weight``
once (plain does without), ``mkldnn._linear_pointwise`` each time. The operator allocates its result
and has no out variant.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fusedops.bench.peers.peer import Peer, Thunk, contiguous, copying, refuse
from fusedops.bench.record import Regime
from fusedops.testing import Call, OpSpec

__all__ = ["PEERS"]


def _missing() -> str | None:
    present = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return None if present else "this torch is built without oneDNN"


def _build(spec: OpSpec, call: Call, regime: Regime, packs: bool = True) -> Thunk:
    refuse("linear" not in spec.name, f"oneDNN has no {spec.name} in PyTorch")
    _require_dtype(call.dtype)
    approximate = call.kwargs.get("approximate")
    refuse(approximate == "quick", "oneDNN has no quick GELU")
    (x,) = contiguous(spec, call, regime)
    weight, bias = (None if t is None else t.contiguous().resolve_neg() for t in call.args[1:])
    assert weight is not None
    linear = torch.ops.mkldnn._linear_pointwise.default
    rows = x.numel() // x.shape[-1]
    if packs:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    activation = "none" if approximate is None else "gelu"
    algorithm = "" if approximate is None else approximate

    def run() -> Tensor:
        result: Tensor = linear(x, weight, bias, activation, [], algorithm)
        return result

    return copying(spec, call, regime, run)


def _require_dtype(dtype: torch.dtype) -> None:
    supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    name = str(dtype).removeprefix("torch.")
    refuse(not supported.get(dtype, False), f"oneDNN multiplies no {name} on this CPU")


PEERS = (
    Peer(
        "onednn",
        "torch.ops.mkldnn._linear_pointwise on packed weights; a given tensor is a copy",
        True,
        _build,
        _missing,
    ),
    Peer(
        "onednn-plain",
        "the same on a weight that is not packed",
        True,
        partial(_build, packs=False),
        _missing,
    ),
)
