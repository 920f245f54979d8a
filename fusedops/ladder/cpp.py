"""Rungs ``cpp``, ``cpp_fused``, ``cpp_plan``: a kernel per eager step, one kernel, a plan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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


def prepare_rope(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, **options: Any
) -> Callable[[], Tensor]:
    """A plan for these tables and positions, and x as a plan takes it."""
    plan = fusedops.plan.rope(x.shape, cos, sin, position_ids, dtype=x.dtype, **options)
    return functools.partial(plan, x.resolve_neg().contiguous())


def prepare_gelu_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Callable[[], Tensor]:
    """A plan for this weight and bias, and the input as a plan takes it."""
    plan = fusedops.plan.gelu_linear(weight, bias, rows=input.shape[:-1], approximate=approximate)
    return functools.partial(plan, input.resolve_neg().contiguous())


# A plan takes no tensor that learns: the rung computes as NumPy's does, without a gradient.
def _planned(prepare: Callable[..., Callable[[], Tensor]]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        return prepare(*(a.detach() if isinstance(a, Tensor) else a for a in args), **kwargs)()

    return run


def _plan_rung(op: str, description: str, prepare: Callable[..., Callable[[], Tensor]]) -> Rung:
    return Rung("cpp_plan", op, description, _planned(prepare), prepare=prepare)


RUNGS = (
    Rung("cpp", "rope", "one vectorised kernel per eager step", rope),
    Rung("cpp_fused", "rope", "one kernel, one pass over memory", fusedops.rope),
    _plan_rung("rope", "checks and copies of the tables ahead", prepare_rope),
    Rung("cpp", "gelu_linear", "our linear, then our gelu", gelu_linear, stepwise=True),
    Rung("cpp_fused", "gelu_linear", "bias and gelu on the tile", fusedops.gelu_linear),
    _plan_rung("gelu_linear", "packing, cut and work memory ahead", prepare_gelu_linear),
)
