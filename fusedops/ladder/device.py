"""Rungs ``mps_eager``, ``metal_fused`` and ``coreml``: Apple's GPU and neural engine.

Their results are those of the device when it is asked for them: whoever times a rung waits for its
device (``fusedops.testing.synchronize``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fusedops
from fusedops import coreml, mps, reference
from fusedops.ladder.rung import Rung

__all__ = ["RUNGS", "on"]


def on(device: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with its tensors moved to device and its result back to the first argument's."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        there = (a.to(device) if isinstance(a, Tensor) else a for a in args)
        return function(*there, **kwargs).to(args[0].device)

    return run


def prepare_rope(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, **options: Any
) -> Callable[[], Tensor]:
    """A program for this shape and these tables."""
    program = coreml.rope(x.shape, cos, sin, position_ids, **options)
    return lambda: program(x)


def prepare_gelu_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Callable[[], Tensor]:
    """A program for this weight, bias and number of rows."""
    rows = input.shape[:-1]
    program = coreml.gelu_linear(weight, bias, rows=rows, approximate=approximate)
    return lambda: program(input)


def _mps_missing() -> str | None:
    return None if torch.backends.mps.is_available() else "torch finds no MPS device here"


def _metal_missing() -> str | None:
    # Of a build without its kernels the formula would run, which is mps_eager.
    return _mps_missing() or (None if mps.is_available() else "this build has no Metal kernels")


def _rungs(
    op: str,
    formula: Callable[..., Tensor],
    fused: Callable[..., Tensor],
    prepare: Callable[..., Callable[[], Tensor]],
    stepwise: bool,
) -> tuple[Rung, ...]:
    return (
        Rung(
            "mps_eager",
            op,
            "eager on MPS",
            on("mps", formula),
            _mps_missing(),
            stepwise,
            device="mps",
        ),
        # Of many rows PyTorch multiplies and rounds, and a kernel adds bias and GELU.
        Rung(
            "metal_fused",
            op,
            "Metal kernels",
            on("mps", fused),
            _metal_missing(),
            stepwise,
            device="mps",
        ),
        Rung(
            "coreml",
            op,
            "a Core ML program in float16",
            lambda *args, **kwargs: prepare(*args, **kwargs)(),
            coreml.missing(),
            stepwise=True,
            prepare=prepare,
            dtypes=(torch.float16,),
        ),
    )


RUNGS = (
    *_rungs("rope", reference.rope, fusedops.rope, prepare_rope, stepwise=False),
    *_rungs(
        "gelu_linear",
        reference.gelu_linear,
        fusedops.gelu_linear,
        prepare_gelu_linear,
        stepwise=True,
    ),
)
