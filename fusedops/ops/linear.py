"""The matmul without an activation: the unfused half of gelu_linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedops import _library, reference
from fusedops._library import is_plain, is_recorded_alone, is_transformed, ops
from fusedops.ops import packed
from fusedops.ops.activated import ActivatedLayer
from fusedops.ops.layer import (
    autocast,
    backward_formula,
    factors,
    fake_backward,
    require,
    wanted,
)
from fusedops.ops.packed import PackedLinear

# The kernels as a call that nothing records, transforms or traces reaches them.
_plain = ops.linear_nograd.default
_activated_plain = ops.linear_activation_nograd.default


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
        ``torch.nn.functional.linear``'s are. With an activation a sum that is NaN gives NaN, an
        infinite one the limit, as in :func:`fusedops.gelu`: -0 for "silu" of -inf, where torch
        gives NaN.

    Raises:
        RuntimeError: ``[linear] requirement but got value``, before anything is computed.

    Accuracy:
        |error| <= eps / 2 |y| + (K + 1) eps32 (|input| @ |weight|.T + |bias|), eps32 = 2^-24
        (2^-53 for float64).
        bfloat16 on an ISA with the pair dot product (``avx512bf16``) adds
        2^-126 (sum |input| + sum |weight|) along K: the instruction takes subnormals as zero.
        The same whoever multiplies (:mod:`fusedops.backend`), but for ``aten_direct``, which is
        used by name only.
        An activation multiplies the error of the sum by its slope there and adds its own: none for
        relu, 1 ulp of float32 for relu2, and for the others that of :func:`fusedops.gelu`.
    """
    try:
        if isinstance(weight, PackedLinear):
            if activation is not None:
                raise RuntimeError(
                    f"[linear] activation must be None with a packed weight but got {activation!r}"
                )
            return packed.linear(input, weight, bias)
        input, weight, bias = autocast(input, weight, bias)
        if activation is not None:
            if is_plain(input, weight, bias):
                return _activated_plain(input, weight, bias, activation)
            return _activated.call(input, weight, bias, activation, save="preact")
        if is_plain(input, weight, bias):
            return _plain(input, weight, bias)
        if is_recorded_alone():
            return _apply(input, weight, bias)
        if is_transformed():
            return _formula(input, weight, bias)
        return ops.linear(input, weight, bias)
    except (AttributeError, RuntimeError, TypeError):
        own = {} if isinstance(weight, PackedLinear) else {"weight": weight}
        _library.refuse_others("linear", input=input, **own, bias=bias)
        raise


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


def _apply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]


_activated = ActivatedLayer(
    "linear_activation",
    "linear",
    reference.activate,
    ops.activation_backward,
    reference.require_activation,
)
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
