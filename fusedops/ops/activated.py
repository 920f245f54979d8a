"""A dense layer with an activation: what ``gelu_linear`` and ``linear(activation=...)`` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedops import _library, reference
from fusedops._library import is_plain, is_recorded, is_recorded_alone, is_transformed, ops
from fusedops.ops.layer import backward_formula, factors, fake_backward, require, wanted


class ActivatedLayer:
    """The ops ``name``, ``name_preact`` and ``name_backward``: shapes, formulas, gradients.

    Args:
        name: of the op in ``torch.ops.fusedops``, which takes (input, weight, bias, variant).
        public: the function that users call, for errors.
        activate: (z, variant) -> y by PyTorch operations.
        derivative: the op (grad, z, variant) -> gradient of z.
        check: (variant), fails for one that there is not.
    """

    def __init__(
        self,
        name: str,
        public: str,
        activate: Callable[[Tensor, str], Tensor],
        derivative: Callable[..., Any],
        check: Callable[[str], None],
    ) -> None:
        self._op, self._op_preact = getattr(ops, name), getattr(ops, f"{name}_preact")
        self._public, self._activate, self._check = public, activate, check
        self._keep_nothing, self._keep_preactivation = _functions(name, derivative)

        def formula_of_backward(
            grad: Tensor,
            input: Tensor | None,
            weight: Tensor | None,
            z: Tensor,
            variant: str,
            bias: bool,
        ) -> tuple[Tensor, Tensor, Tensor]:
            return backward_formula(derivative(grad, z, variant), input, weight, bias)

        def fake_of_backward(
            grad: Tensor,
            input: Tensor | None,
            weight: Tensor | None,
            z: Tensor,
            variant: str,
            bias: bool,
        ) -> tuple[Tensor, Tensor, Tensor]:
            return fake_backward(grad, input, weight, bias)

        for op, fake, formula, recorded in (
            (name, self.fake, self.formula, self._keep_nothing.apply),
            (
                f"{name}_preact",
                self._fake_preact,
                self._formula_preact,
                self._keep_preactivation.apply,
            ),
            # The formula is made of operations that differentiate.
            (f"{name}_backward", fake_of_backward, formula_of_backward, formula_of_backward),
        ):
            plain = f"{op}_nograd"
            for either in (op, plain):
                _library.register_fake(either, fake)
                _library.register_fallback(either, formula)
            _library.register_autograd(op, recorded, getattr(ops, plain), formula)

    def call(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, variant: str, save: str
    ) -> Tensor:
        """The layer where a call is not plain."""
        if is_recorded_alone():
            if save == "preact":
                return self._keep_preactivation.apply(input, weight, bias, variant)[0]
            return self._keep_nothing.apply(input, weight, bias, variant)
        if is_transformed():
            return self.formula(input, weight, bias, variant)
        if save == "preact" and is_recorded(input, weight, bias):
            return self._op_preact(input, weight, bias, variant)[0]
        return self._op(input, weight, bias, variant)

    def formula(self, input: Tensor, weight: Tensor, bias: Tensor | None, variant: str) -> Tensor:
        """The layer by PyTorch operations, with the op's checks."""
        return self._formula_preact(input, weight, bias, variant)[0]

    def _formula_preact(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, variant: str
    ) -> tuple[Tensor, Tensor]:
        require(self._public, input, weight, bias)
        z = reference.linear(input, weight, bias)
        return self._activate(z, variant), z

    def fake(self, input: Tensor, weight: Tensor, bias: Tensor | None, variant: str) -> Tensor:
        """The result's shape."""
        require(self._public, input, weight, bias)
        self._check(variant)
        return input.new_empty((*input.shape[:-1], weight.shape[0]))

    def _fake_preact(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self.fake(*args), self.fake(*args)


def _functions(name: str, derivative: Callable[..., Any]) -> tuple[Any, Any]:
    """The layer as autograd records it: with nothing kept, and with the pre-activation."""
    kernel, kernel_preact, backward = (
        getattr(ops, f"{name}{part}_nograd") for part in ("", "_preact", "_backward")
    )
    backward_recorded = getattr(ops, f"{name}_backward")

    def gradients(
        grad: Tensor,
        input: Tensor | None,
        weight: Tensor | None,
        z: Tensor,
        variant: str,
        bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = backward if is_plain(grad, input, weight, z) else backward_recorded
        return run(grad, input, weight, z, variant, bias)

    # forward takes ctx: with a setup_context, which only torch.func needs, calls would cost more.
    class KeepNothing(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, variant: str
        ) -> Tensor:
            ctx.variant = variant
            ctx.save_for_backward(input, weight, bias)
            return kernel(input, weight, bias, variant)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            input, weight, bias = ctx.saved_tensors
            needed = ctx.needs_input_grad
            z = ops.linear(input, weight, bias)
            found = gradients(grad, *factors(needed, input, weight), z, ctx.variant, needed[2])
            return *wanted(needed, found), None

    class KeepPreactivation(torch.autograd.Function):
        """The pre-activation is an output too, so that a second derivative reaches it."""

        @staticmethod
        def forward(
            ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, variant: str
        ) -> tuple[Tensor, Tensor]:
            y, z = kernel_preact(input, weight, bias, variant)
            ctx.variant = variant
            ctx.save_for_backward(*factors(ctx.needs_input_grad, input, weight), z)
            ctx.set_materialize_grads(False)
            return y, z

        @staticmethod
        def backward(
            ctx: Any, grad: Tensor | None, grad_z: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            input, weight, z = ctx.saved_tensors
            needed = ctx.needs_input_grad
            if grad_z is None and grad is not None:
                found = gradients(grad, input, weight, z, ctx.variant, needed[2])
                return *wanted(needed, found), None
            if grad is not None:
                grad_z = derivative(grad, z, ctx.variant) + grad_z
            if grad_z is None:
                return None, None, None, None
            return *wanted(needed, ops.linear_backward(grad_z, input, weight, needed[2])), None

    return KeepNothing, KeepPreactivation
