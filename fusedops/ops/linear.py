"""The matmul without an activation: the unfused half of gelu_linear."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from fusedops import _library, reference
from fusedops._library import (
    DTYPE_NAMES,
    is_plain,
    is_recorded,
    is_recorded_alone,
    is_transformed,
    ops,
)
from fusedops.ops import packed
from fusedops.ops.packed import PackedLinear


def linear(
    input: Tensor,
    weight: Tensor | PackedLinear,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """``input @ weight.T + bias``, accumulated in float32 (float64 for float64), rounded once.

    Replaces ``torch.nn.functional.linear``, and with an activation what follows it: that is applied
    to the sums, before the one rounding.

    Args:
        input: [..., K], any strides; float32, float16, bfloat16 or float64.
        weight: [N, K], of input's dtype; or what :func:`fusedops.pack_linear` returns, which has
            its own bias and no gradient.
        bias: [N], of input's dtype, or None.
        activation: None, or "relu", "relu2" (``relu(z)^2``), "silu" (``z sigmoid(z)``), "gelu",
            "gelu_tanh" or "gelu_quick" (:func:`fusedops.gelu`'s "none", "tanh" and "quick").
            Training keeps the pre-activation z in input's dtype.

    Returns:
        [..., N], contiguous. Differentiable twice. Under autocast the arguments are cast as
        ``torch.nn.functional.linear``'s are.

    Raises:
        RuntimeError: ``[linear] requirement but got value``, before anything is computed.

    Accuracy:
        |error| <= eps / 2 |y| + (K + 1) eps32 (|input| @ |weight|.T + |bias|), eps32 = 2^-24.
        bfloat16 on an ISA with the pair dot product (``avx512bf16``) adds
        2^-126 (sum |input| + sum |weight|) along K: the instruction takes subnormals as zero.
        An activation multiplies the error of the sum by its slope there and adds its own: none for
        relu, 1 ulp of float32 for relu2, and for the others that of :func:`fusedops.gelu`.
    """
    if isinstance(weight, PackedLinear):
        if activation is not None:
            raise RuntimeError(
                f"[linear] activation must be None with a packed weight but got {activation!r}"
            )
        return packed.linear(input, weight, bias)
    input, weight, bias = autocast(input, weight, bias)
    if activation is not None:
        return _activated(input, weight, bias, activation)
    if is_plain(input, weight, bias):
        return ops.linear_nograd(input, weight, bias)
    if is_recorded_alone():
        return _apply(input, weight, bias)
    if is_transformed():
        return _formula(input, weight, bias)
    return ops.linear(input, weight, bias)


def _activated(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if is_plain(input, weight, bias):
        return ops.linear_activation_nograd(input, weight, bias, activation)
    if is_transformed():
        require("linear", input, weight, bias)
        return reference.linear(input, weight, bias, activation=activation)
    if is_recorded(input, weight, bias):  # the pre-activation is kept for backward
        return ops.linear_activation_preact(input, weight, bias, activation)[0]
    return ops.linear_activation(input, weight, bias, activation)


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


def _formula(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    require("linear", input, weight, bias)
    return reference.linear(input, weight, bias)


# forward takes ctx: with a setup_context, which only torch.func needs, each call would cost more.
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(*factors(ctx.needs_input_grad, input, weight))
        return ops.linear_nograd(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        run = ops.linear_backward_nograd if is_plain(grad, input, weight) else ops.linear_backward
        needed = ctx.needs_input_grad
        return wanted(needed, run(grad, input, weight, needed[2]))


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    require("linear", input, weight, bias)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


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


def _apply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]


for _name in ("linear", "linear_nograd"):
    _library.register_fake(_name, _fake)
    _library.register_fallback(_name, _formula)
_library.register_autograd("linear", _apply, ops.linear_nograd, _formula)
for _name in ("linear_backward", "linear_backward_nograd"):
    _library.register_fake(_name, fake_backward)
    _library.register_fallback(_name, backward_formula)
_library.register_autograd(
    "linear_backward", backward_formula, ops.linear_backward_nograd, backward_formula
)
