"""Rungs ``cpp`` and ``cpp_fused``: our kernels, one per eager step, and fused into one."""

from __future__ import annotations

import torch
from torch import Tensor

import fusedops
from fusedops.ladder.rung import Rung

__all__ = ["RUNGS", "gelu_linear", "rope"]


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    offset: int = 0,
    layout: str = "bhsd",
    interleaved: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """``fusedops.rope`` with one vectorised kernel and one temporary for each eager step."""
    result: Tensor = torch.ops.fusedops.rope_unfused(
        x, cos, sin, position_ids, offset, layout == "bshd", interleaved, conjugate
    )
    return result


def gelu_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    """Our linear, then our gelu."""
    return fusedops.gelu(fusedops.linear(input, weight, bias), approximate=approximate)


RUNGS = (
    Rung("cpp", "rope", "one vectorised kernel per eager step", rope),
    Rung("cpp_fused", "rope", "one kernel, one pass over memory", fusedops.rope),
    Rung("cpp", "gelu_linear", "our linear, then our gelu", gelu_linear, stepwise=True),
    Rung("cpp_fused", "gelu_linear", "bias and gelu on the tile", fusedops.gelu_linear),
)
