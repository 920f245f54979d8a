"""Rungs ``mps_eager``, ``metal_fused`` and ``coreml``: Apple's GPU and neural engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedops import reference
from fusedops.ladder.rung import Rung

__all__ = ["RUNGS", "on"]

_LATER = "its kernels come with the {} backend, which is not in this build"


def on(device: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with its tensors moved to device and its result back to the first argument's."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        there = (a.to(device) if isinstance(a, Tensor) else a for a in args)
        return function(*there, **kwargs).to(args[0].device)

    return run


def _mps_missing() -> str | None:
    return None if torch.backends.mps.is_available() else "torch finds no MPS device here"


def _unreachable(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("an unavailable rung was run")


def _rungs(op: str, formula: Callable[..., Tensor], stepwise: bool) -> tuple[Rung, ...]:
    return (
        Rung("mps_eager", op, "eager on MPS", on("mps", formula), _mps_missing(), stepwise),
        Rung("metal_fused", op, "a Metal kernel", _unreachable, _LATER.format("Metal")),
        Rung("coreml", op, "a Core ML program", _unreachable, _LATER.format("Core ML")),
    )


RUNGS = (
    *_rungs("rope", reference.rope, stepwise=False),
    *_rungs("gelu_linear", reference.gelu_linear, stepwise=True),
)
