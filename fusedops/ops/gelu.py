"""GELU and its derivative."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from fusedops import _library, reference
from fusedops._library import is_plain, is_recorded_alone, is_transformed, ops

_plain = ops.gelu_nograd.default  # as a call that nothing records, transforms or traces reaches it


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``x * Phi(x)``, elementwise, accurate in the tail.

    Replaces ``torch.nn.functional.gelu``, whose float32 result is 17% off at -5.

    Args:
        x: any shape and strides; float32, float16, bfloat16 or float64.
        approximate: "none": ``0.5 x erfc(-x / sqrt 2)``; "tanh": ``0.5 x (1 + tanh(sqrt(2/pi)
            (x + 0.044715 x^3)))``; "quick": ``x sigmoid(1.702 x)``.

    Returns:
        A tensor like x. Differentiable twice. NaN gives NaN; infinities give the limits, -0 for
        -inf and inf for inf, and 0 and 1 as gradients, as ``fusedops.verify`` asks. torch's
        formulas compute ``-inf * 0`` and ``inf * 0`` there: NaN for -inf and for the gradients.

    Raises:
        RuntimeError: ``[gelu] requirement but got value`` for another dtype or approximation.

    Accuracy:
        float32: at most 2 ulp of the true result for every x and variant, subnormal results
        included, 2.5 where the ISA has no fused multiply-add (``portable``); docs/accuracy.md has
        the measured maxima. float16, bfloat16: 2^-15 of the
        true result, then one rounding: 0.5 ulp and at most 1/16 (float16) or 1/128 (bfloat16).
        float64: at most 4 ulp ("none"), 3 ("tanh") and 2.8 ("quick") in samples.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if is_plain(x):
        return _plain(x, approximate)
    if is_recorded_alone():
        return _apply(x, approximate)
    if is_transformed():
        return _formula(x, approximate)
    return ops.gelu(x, approximate)


def _formula(x: Tensor, approximate: str) -> Tensor:
    return reference.gelu(x, approximate=approximate)


# forward takes ctx: with a setup_context, which only torch.func needs, each call would cost more.
class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.approximate = approximate
        ctx.save_for_backward(x)
        return ops.gelu_nograd(x, approximate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        run = ops.gelu_backward_nograd if is_plain(grad, x) else ops.gelu_backward
        return run(grad, x, ctx.approximate), None


class _Backward(torch.autograd.Function):
    """``grad * act'(x)`` by ``fusedops::name``, gelu_backward or activation_backward."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, variant: str, name: str) -> Tensor:
        ctx.variant, ctx.name = variant, name
        ctx.save_for_backward(grad, x)
        return getattr(ops, f"{name}_nograd")(grad, x, variant)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        to_grad = getattr(ops, ctx.name)(outer, x, ctx.variant)
        wide = torch.promote_types(x.dtype, torch.float32)
        curvature = _second_derivative(x.to(wide), _VARIANTS.get(ctx.variant, ctx.variant))
        to_x = (outer.to(wide) * grad.to(wide) * curvature).to(x.dtype)
        return to_grad, to_x, None, None


# The names of linear's activations, where gelu has one of its own.
_VARIANTS = {"gelu": "none", "gelu_tanh": "tanh", "gelu_quick": "quick"}


def _derivative(x: Tensor, variant: str) -> Tensor:
    if variant == "relu":
        return (x > 0).to(x.dtype)
    if variant == "relu2":
        return 2 * torch.relu(x)
    if variant == "none":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(x * -math.sqrt(0.5)) + x * density
    w, w1, _ = _exponent(x, variant)
    s = torch.sigmoid(w)
    return s + x * w1 * s * torch.sigmoid(-w)


def _second_derivative(x: Tensor, variant: str) -> Tensor:
    if variant == "relu":
        return torch.zeros_like(x)
    if variant == "relu2":
        return 2 * (x > 0).to(x.dtype)
    if variant == "none":
        return (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    w, w1, w2 = _exponent(x, variant)
    slope = torch.sigmoid(w) * torch.sigmoid(-w)
    return slope * (2 * w1 + x * w2 + x * w1 * w1 * (1 - 2 * torch.sigmoid(w)))


def _exponent(x: Tensor, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """W of ``x * sigmoid(W(x))`` with its first and second derivative."""
    if variant in ("quick", "silu"):
        slope = 1.702 if variant == "quick" else 1.0
        return slope * x, torch.full_like(x, slope), torch.zeros_like(x)
    c = 2 * math.sqrt(2 / math.pi)
    return c * (x + 0.044715 * x**3), c * (1 + 3 * 0.044715 * x * x), c * 6 * 0.044715 * x


def _backward_formula(grad: Tensor, x: Tensor, variant: str) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    derivative = _derivative(x.to(wide), _VARIANTS.get(variant, variant))
    return (grad.to(wide) * derivative).to(x.dtype)


def require_approximate(op: str, approximate: str) -> None:
    """The op's check of its option, for calls that never reach it."""
    if approximate not in ("none", "tanh", "quick"):
        raise RuntimeError(
            f"[{op}] approximate must be 'none', 'tanh' or 'quick' but got '{approximate}'"
        )


def _fake(x: Tensor, approximate: str) -> Tensor:
    require_approximate("gelu", approximate)
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, x: Tensor, variant: str) -> Tensor:
    return torch.empty_like(x)


def _apply(x: Tensor, approximate: str) -> Tensor:
    return _Gelu.apply(x, approximate)  # type: ignore[no-untyped-call]


def _apply_backward(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    return _Backward.apply(grad, x, approximate, "gelu_backward")  # type: ignore[no-untyped-call]


def _apply_activation(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    result = _Backward.apply(grad, x, activation, "activation_backward")  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


for _name, _shape, _composed in (
    ("gelu", _fake, _formula),
    ("gelu_nograd", _fake, _formula),
    ("gelu_backward", _fake_backward, _backward_formula),
    ("gelu_backward_nograd", _fake_backward, _backward_formula),
    ("activation_backward", _fake_backward, _backward_formula),
    ("activation_backward_nograd", _fake_backward, _backward_formula),
):
    _library.register_fake(_name, _shape)
    _library.register_fallback(_name, _composed)
_library.register_autograd("gelu", _apply, ops.gelu_nograd, _formula)
_library.register_autograd(
    "gelu_backward", _apply_backward, ops.gelu_backward_nograd, _backward_formula
)
_library.register_autograd(
    "activation_backward", _apply_activation, ops.activation_backward_nograd, _backward_formula
)
