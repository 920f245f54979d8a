"""The matmul without an activation: the unfused half of gelu_linear."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from fusedops import _library, reference
from fusedops._library import DTYPE_NAMES, is_plain, is_transformed, ops
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
    if is_transformed():
        return _formula(input, weight, bias)
    return ops.linear(input, weight, bias)


def _activated(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if is_plain(input, weight, bias):
        return ops.linear_activation_nograd(input, weight, bias, activation)
    if is_transformed():
        require("linear", input, weight, bias)
        return reference.linear(input, weight, bias, activation=activation)
    recorded = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, weight, bias)
    )
    if recorded:  # the pre-activation is kept for backward
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


def gradients(
    grad: Tensor, input: Tensor, weight: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias for the gradient of ``linear``'s result."""
    count = math.prod(grad.shape[:-1])  # not -1, which means nothing where N or K is 0
    rows = grad.reshape(count, weight.shape[0])
    to_input = grad.matmul(weight) if needed[0] else None
    to_weight = rows.t().mm(input.reshape(count, weight.shape[1])) if needed[1] else None
    to_bias = rows.sum(0) if needed[2] else None
    return to_input, to_weight, to_bias


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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear_nograd(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, weight, _ = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        return gradients(grad, input, weight, ctx.needs_input_grad)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    require("linear", input, weight, bias)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _apply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]


for _name in ("linear", "linear_nograd"):
    _library.register_fake(_name, _fake)
    _library.register_fallback(_name, _formula)
_library.register_autograd("linear", _apply, ops.linear_nograd, _formula)
