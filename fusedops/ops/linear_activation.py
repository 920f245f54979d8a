"""The ops behind ``fusedops.linear(..., activation=...)``: shape functions and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedops import _library, reference
from fusedops._library import is_plain, ops
from fusedops.ops.layer import backward_formula, factors, fake_backward, require, wanted


def formula(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``fusedops.linear(..., activation=...)`` by PyTorch operations, with the op's checks."""
    require("linear", input, weight, bias)
    return reference.linear(input, weight, bias, activation=activation)


def _formula_preact(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    require("linear", input, weight, bias)
    z = reference.linear(input, weight, bias)
    return reference.activate(z, activation), z


# forward takes ctx: with a setup_context, which only torch.func needs, each call would cost more.
class _KeepNothing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(input, weight, bias)
        return ops.linear_activation_nograd(input, weight, bias, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad
        z = ops.linear(input, weight, bias)
        found = _backward(grad, *factors(needed, input, weight), z, ctx.activation, needed[2])
        return *wanted(needed, found), None


class _KeepPreactivation(torch.autograd.Function):
    """The pre-activation is an output too, so that a second derivative reaches it."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor]:
        y, z = ops.linear_activation_preact_nograd(input, weight, bias, activation)
        ctx.activation = activation
        ctx.save_for_backward(*factors(ctx.needs_input_grad, input, weight), z)
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, z = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if grad_z is None and grad is not None:
            found = _backward(grad, input, weight, z, ctx.activation, needed[2])
            return *wanted(needed, found), None
        if grad is not None:
            grad_z = ops.activation_backward(grad, z, ctx.activation) + grad_z
        if grad_z is None:
            return None, None, None, None
        return *wanted(needed, ops.linear_backward(grad_z, input, weight, needed[2])), None


def _backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    activation: str,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if is_plain(grad, input, weight, z):
        return ops.linear_activation_backward_nograd(grad, input, weight, z, activation, bias)
    return ops.linear_activation_backward(grad, input, weight, z, activation, bias)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    require("linear", input, weight, bias)
    reference.require_activation(activation)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_preact(*args: Any) -> tuple[Tensor, Tensor]:
    return _fake(*args), _fake(*args)


def _backward_formula(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    activation: str,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dz = ops.activation_backward(grad, z, activation)
    return backward_formula(dz, input, weight, bias)


def _fake_backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    activation: str,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_backward(grad, input, weight, bias)


def _apply(*args: Any) -> Tensor:
    return _KeepNothing.apply(*args)  # type: ignore[no-untyped-call]


def apply_preact(*args: Any) -> tuple[Tensor, Tensor]:
    """``linear_activation_preact``, recorded."""
    return _KeepPreactivation.apply(*args)  # type: ignore[no-untyped-call]


for _name, _shape, _composed in (
    ("linear_activation", _fake, formula),
    ("linear_activation_nograd", _fake, formula),
    ("linear_activation_preact", _fake_preact, _formula_preact),
    ("linear_activation_preact_nograd", _fake_preact, _formula_preact),
    ("linear_activation_backward", _fake_backward, _backward_formula),
    ("linear_activation_backward_nograd", _fake_backward, _backward_formula),
):
    _library.register_fake(_name, _shape)
    _library.register_fallback(_name, _composed)
_library.register_autograd("linear_activation", _apply, ops.linear_activation_nograd, formula)
_library.register_autograd(
    "linear_activation_preact", apply_preact, ops.linear_activation_preact_nograd, _formula_preact
)
# The formula is made of operations that differentiate.
_library.register_autograd(
    "linear_activation_backward",
    _backward_formula,
    ops.linear_activation_backward_nograd,
    _backward_formula,
)
