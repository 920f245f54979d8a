"""The ops behind ``fusedops.linear(..., activation=...)``: shape functions and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedops import _library, reference
from fusedops._library import ops
from fusedops.ops.linear import factors, require, wanted


def _formula(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    require("linear", input, weight, bias)
    return reference.linear(input, weight, bias, activation=activation)


def _formula_preact(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    require("linear", input, weight, bias)
    z = reference.linear(input, weight, bias)
    return reference.activate(z, activation), z


def _gradients(
    needed: tuple[bool, ...], grad_z: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    found = ops.linear_backward(grad_z, *factors(needed, input, weight), needed[2])
    return wanted(needed, found)


class _KeepNothing(torch.autograd.Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return ops.linear_activation_nograd(input, weight, bias, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        z = ops.linear(input, weight, bias)
        grad = ops.activation_backward(grad, z, ctx.activation)
        return *_gradients(ctx.needs_input_grad, grad, input, weight), None


class _KeepPreactivation(torch.autograd.Function):
    """The pre-activation is an output too, so that a second derivative reaches it."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor]:
        return ops.linear_activation_preact_nograd(input, weight, bias, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, weight, _, ctx.activation = inputs
        ctx.save_for_backward(input, weight, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, z = ctx.saved_tensors
        if grad is not None:
            through = ops.activation_backward(grad, z, ctx.activation)
            grad_z = through if grad_z is None else through + grad_z
        if grad_z is None:
            return None, None, None, None
        return *_gradients(ctx.needs_input_grad, grad_z, input, weight), None


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    require("linear", input, weight, bias)
    reference.require_activation(activation)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_preact(*args: Any) -> tuple[Tensor, Tensor]:
    return _fake(*args), _fake(*args)


def _apply(*args: Any) -> Tensor:
    return _KeepNothing.apply(*args)  # type: ignore[no-untyped-call]


def _apply_preact(*args: Any) -> tuple[Tensor, Tensor]:
    return _KeepPreactivation.apply(*args)  # type: ignore[no-untyped-call]


for _name, _shape, _composed in (
    ("linear_activation", _fake, _formula),
    ("linear_activation_nograd", _fake, _formula),
    ("linear_activation_preact", _fake_preact, _formula_preact),
    ("linear_activation_preact_nograd", _fake_preact, _formula_preact),
):
    _library.register_fake(_name, _shape)
    _library.register_fallback(_name, _composed)
_library.register_autograd("linear_activation", _apply, ops.linear_activation_nograd, _formula)
_library.register_autograd(
    "linear_activation_preact", _apply_preact, ops.linear_activation_preact_nograd, _formula_preact
)
