"""Rungs ``eager`` and ``compile``: the reference as PyTorch runs it, and as torch.compile does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedops import reference
from fusedops.ladder.rung import Rung

__all__ = ["RUNGS"]


@functools.cache
def _compiled(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # A new shape recompiles. Past its limit torch would run eager and say nothing: fullgraph makes
    # that an error, and where the limit can be chosen it is out of reach.
    limit: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13
        limit["recompile_limit"] = 1000
    return torch.compile(formula, dynamic=False, fullgraph=True, **limit)


def _compile(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The formula, compiled at its first call."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return _compiled(formula)(*args, **kwargs)

    return run


RUNGS = (
    Rung("eager", "rope", "x * cos + rotate_half(x) * sin", reference.rope),
    Rung("compile", "rope", "torch.compile of eager", _compile(reference.rope)),
    Rung("eager", "gelu_linear", "F.gelu(F.linear(...))", reference.gelu_linear, stepwise=True),
    Rung(
        "compile",
        "gelu_linear",
        "torch.compile of eager",
        _compile(reference.gelu_linear),
        stepwise=True,
    ),
)
