"""What linear and gelu_linear share: autocast, checks, and the gradients of a matmul."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from fusedops._library import DTYPE_NAMES


@overload
def autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None, /
) -> tuple[Tensor, Tensor, Tensor | None]: ...
@overload
def autocast(*tensors: Tensor | None) -> tuple[Any, ...]: ...
def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The arguments in autocast's dtype where it is on, as torch casts those of a matmul."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def factors(
    needed: tuple[bool, ...], input: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What backward takes of the two: input for weight's gradient, weight for input's."""
    return input if needed[1] else None, weight if needed[0] else None


def wanted(
    needed: tuple[bool, ...], gradients: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias; None for the empty ones that nobody asked for."""
    dx, dw, db = gradients
    return dx if needed[0] else None, dw if needed[1] else None, db if needed[2] else None


def require(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The op's checks of dtypes and sizes, for calls that never reach it.

    PyTorch operations would broadcast the bias and take a weight of any rank.
    """

    def need(met: bool, requirement: str, got: Any) -> None:
        if not met:
            raise RuntimeError(f"[{op}] {requirement} but got {got}")

    def shape(t: Tensor) -> str:
        return f"shape {[*t.shape]}"

    floating = "input must be float32, float16, bfloat16 or float64"
    need(input.dtype in DTYPE_NAMES, floating, input.dtype)
    own = f"must have input's dtype {DTYPE_NAMES[input.dtype]}"
    need(weight.dtype == input.dtype, f"weight {own}", DTYPE_NAMES.get(weight.dtype, weight.dtype))
    need(input.dim() > 0, "input must have at least 1 dimension", shape(input))
    need(weight.dim() == 2, "weight must have 2 dimensions [N, K]", shape(weight))
    last = f"input's last dimension must be weight's K = {weight.shape[1]}"
    need(input.shape[-1] == weight.shape[1], last, shape(input))
    if bias is not None:
        need(bias.dtype == input.dtype, f"bias {own}", DTYPE_NAMES.get(bias.dtype, bias.dtype))
        fits = bias.dim() == 1 and bias.shape[0] == weight.shape[0]
        need(fits, f"bias must be [N] = [{weight.shape[0]}]", shape(bias))


def backward_formula(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear_backward`` by PyTorch operations, which differentiate."""
    count = math.prod(grad.shape[:-1])  # not -1, which means nothing where N or K is 0
    rows = grad.reshape(count, grad.shape[-1])
    none = grad.new_empty(0)
    return (
        none if weight is None else grad.matmul(weight),
        none if input is None else rows.t().mm(input.reshape(count, input.shape[-1])),
        rows.sum(0) if bias else none,
    )


def fake_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of ``linear_backward``."""
    n = grad.shape[-1]
    return (
        grad.new_empty(0 if weight is None else (*grad.shape[:-1], weight.shape[1])),
        grad.new_empty(0 if input is None else (n, input.shape[-1])),
        grad.new_empty(n if bias else 0),
    )
