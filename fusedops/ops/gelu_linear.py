"""A linear layer with GELU applied to its accumulators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedops import _library, reference
from fusedops._library import is_plain, is_recorded, is_recorded_alone, is_transformed, ops
from fusedops.ops import packed
from fusedops.ops.gelu import require_approximate
from fusedops.ops.layer import (
    autocast,
    backward_formula,
    factors,
    fake_backward,
    require,
    wanted,
)
from fusedops.ops.packed import PackedLinear


def gelu_linear(
    input: Tensor,
    weight: Tensor | PackedLinear,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    save: str = "preact",
    out: Tensor | None = None,
) -> Tensor:
    """``gelu(input @ weight.T + bias)`` in one pass over the result.

    Replaces ``F.gelu(F.linear(input, weight, bias), approximate=...)``.

    Args:
        input: [..., K], any strides; float32, float16, bfloat16 or float64.
        weight: [N, K], of input's dtype; or what :func:`fusedops.pack_linear` returns, which has
            its own bias and no gradient.
        bias: [N], of input's dtype, or None.
        approximate: "none", "tanh" or "quick", as for :func:`fusedops.gelu`.
        save: what training keeps for backward: "preact", the pre-activation [..., N] in input's
            dtype; or "none", nothing: backward computes it again.
        out: receives the result, [..., N]; not for use where autograd records.

    Returns:
        [..., N], contiguous (or ``out``). Differentiable twice. Under autocast the arguments are
        cast as ``torch.nn.functional.linear``'s are.

    Raises:
        RuntimeError: ``[gelu_linear] requirement but got value``, before anything is written.

    Accuracy:
        Accumulated in float32 (float64 for float64), bias and GELU applied before the one rounding:
        |error| <= eps / 2 |y| + 1.13 (K + 1) eps32 (|input| @ |weight|.T + |bias|) + gelu(y),
        eps32 = 2^-24 (2^-53 for float64); 1.13 is the largest slope of GELU, gelu(y) its own error:
        2.5 ulp32(y), 4 ulp(y) for float64, and 2^-15 |y| for float16 and bfloat16.
        bfloat16 on an ISA with the pair dot product (``avx512bf16``) adds
        2^-126 (sum |input| + sum |weight|) along K: the instruction takes subnormals as zero.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if save not in ("preact", "none"):
        raise RuntimeError(f"[gelu_linear] save must be 'preact' or 'none' but got {save!r}")
    if isinstance(weight, PackedLinear):
        return packed.gelu_linear(input, weight, bias, approximate, out)
    input, weight, bias = autocast(input, weight, bias)
    if out is not None:
        _library.refuse_recorded("gelu_linear", "out", input, weight, bias, out)
        _library.refuse_negated("gelu_linear", "out", out)
        _library.write(ops.gelu_linear_out, (input, weight, bias, approximate, out), out)
        return out
    if is_plain(input, weight, bias):
        return ops.gelu_linear_nograd(input, weight, bias, approximate)
    if is_recorded_alone():
        if save == "preact":
            return _apply_preact(input, weight, bias, approximate)[0]
        return _apply(input, weight, bias, approximate)
    if is_transformed():
        return _formula(input, weight, bias, approximate)
    if save == "preact" and is_recorded(input, weight, bias):
        return ops.gelu_linear_preact(input, weight, bias, approximate)[0]
    return ops.gelu_linear(input, weight, bias, approximate)


def _formula(input: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    require("gelu_linear", input, weight, bias)
    return reference.gelu_linear(input, weight, bias, approximate=approximate)


def _formula_preact(
    input: Tensor, weight: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    require("gelu_linear", input, weight, bias)
    z = reference.linear(input, weight, bias)
    return reference.gelu(z, approximate=approximate), z


def _out_formula(
    input: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, out: Tensor
) -> None:
    result = _formula(input, weight, bias, approximate)
    for attribute in ("dtype", "shape"):  # copy_ would convert and broadcast
        got, expected = getattr(out, attribute), getattr(result, attribute)
        if got != expected:
            raise RuntimeError(
                f"[gelu_linear] out must have the result's {attribute} {expected} but got {got}"
            )
    out.copy_(result)


# forward takes ctx: with a setup_context, which only torch.func needs, each call would cost more.
class _KeepNothing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, approximate: str
    ) -> Tensor:
        ctx.approximate = approximate
        ctx.save_for_backward(input, weight, bias)
        return ops.gelu_linear_nograd(input, weight, bias, approximate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad
        z = ops.linear(input, weight, bias)
        found = _backward(grad, *factors(needed, input, weight), z, ctx.approximate, needed[2])
        return *wanted(needed, found), None


class _KeepPreactivation(torch.autograd.Function):
    """The pre-activation is an output too, so that a second derivative reaches it."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, approximate: str
    ) -> tuple[Tensor, Tensor]:
        y, z = ops.gelu_linear_preact_nograd(input, weight, bias, approximate)
        ctx.approximate = approximate
        ctx.save_for_backward(*factors(ctx.needs_input_grad, input, weight), z)
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, z = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if grad_z is None and grad is not None:
            found = _backward(grad, input, weight, z, ctx.approximate, needed[2])
            return *wanted(needed, found), None
        if grad is not None:
            grad_z = ops.gelu_backward(grad, z, ctx.approximate) + grad_z
        if grad_z is None:
            return None, None, None, None
        return *wanted(needed, ops.linear_backward(grad_z, input, weight, needed[2])), None


def _backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    approximate: str,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if is_plain(grad, input, weight, z):
        return ops.gelu_linear_backward_nograd(grad, input, weight, z, approximate, bias)
    return ops.gelu_linear_backward(grad, input, weight, z, approximate, bias)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    require("gelu_linear", input, weight, bias)
    require_approximate("gelu_linear", approximate)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_preact(*args: Any) -> tuple[Tensor, Tensor]:
    return _fake(*args), _fake(*args)


def _fake_written(*args: Any) -> None:
    _fake(*args[:-1])


def _backward_formula(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    approximate: str,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dz = ops.gelu_backward(grad, z, approximate)
    return backward_formula(dz, input, weight, bias)


def _fake_backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    approximate: str,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_backward(grad, input, weight, bias)


def _dz_formula(grad: Tensor, z: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    dz = ops.gelu_backward(grad, z, approximate)
    return dz, dz.sum_to_size(dz.shape[-1:])


def _fake_dz(grad: Tensor, z: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape[-1:])


def _apply(*args: Any) -> Tensor:
    return _KeepNothing.apply(*args)  # type: ignore[no-untyped-call]


def _apply_preact(*args: Any) -> tuple[Tensor, Tensor]:
    return _KeepPreactivation.apply(*args)  # type: ignore[no-untyped-call]


for _name, _shape, _composed in (
    ("gelu_linear", _fake, _formula),
    ("gelu_linear_nograd", _fake, _formula),
    ("gelu_linear_preact", _fake_preact, _formula_preact),
    ("gelu_linear_preact_nograd", _fake_preact, _formula_preact),
    ("gelu_linear_out", _fake_written, _out_formula),
    ("gelu_linear_backward", _fake_backward, _backward_formula),
    ("gelu_linear_backward_nograd", _fake_backward, _backward_formula),
    ("gelu_linear_dz", _fake_dz, _dz_formula),
    ("gelu_linear_dz_nograd", _fake_dz, _dz_formula),
):
    _library.register_fake(_name, _shape)
    _library.register_fallback(_name, _composed)
_library.register_write("gelu_linear_out")
_library.register_autograd("gelu_linear", _apply, ops.gelu_linear_nograd, _formula)
_library.register_autograd(
    "gelu_linear_preact", _apply_preact, ops.gelu_linear_preact_nograd, _formula_preact
)
# The formulas are made of operations that differentiate.
_library.register_autograd(
    "gelu_linear_backward", _backward_formula, ops.gelu_linear_backward_nograd, _backward_formula
)
_library.register_autograd("gelu_linear_dz", _dz_formula, ops.gelu_linear_dz_nograd, _dz_formula)
