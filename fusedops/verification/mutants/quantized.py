"""Wrong kernels of gelu_linear_quantized: the formula with one fault."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fusedops import reference
from fusedops.verification.mutants.mutant import Candidate, Mutant, change_gradients

__all__ = ["MUTANTS"]

# Of input, weight, scale, bias and the name of the activation.
Fault = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, str], Tensor]


def _candidate(fault: Fault) -> Candidate:
    def gelu_linear_quantized(
        input: Tensor,
        weight: Tensor,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        approximate: str = "none",
        activation_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return fault(input, weight, scale, bias, approximate)

    return gelu_linear_quantized


def _right(x: Tensor, w: Tensor, scale: Tensor | None, bias: Tensor | None, act: str) -> Tensor:
    return reference.gelu_linear_quantized(x, w, scale, bias, approximate=act)


def _next_scale(x: Tensor, w: Tensor, s: Tensor | None, b: Tensor | None, act: str) -> Tensor:
    return _right(x, w, None if s is None else s.roll(1), b, act)


def _scaled_bias(x: Tensor, w: Tensor, s: Tensor | None, b: Tensor | None, act: str) -> Tensor:
    return _right(x, w, s, b if s is None or b is None else b * s, act)


def _one_scale(x: Tensor, w: Tensor, s: Tensor | None, b: Tensor | None, act: str) -> Tensor:
    return _right(x, w, None if s is None else s.mean().expand_as(s), b, act)


def _unsigned(x: Tensor, w: Tensor, s: Tensor | None, b: Tensor | None, act: str) -> Tensor:
    read = w.view(torch.uint8).to(x.dtype) if w.dtype == torch.int8 else w
    return _right(x, read, s, b, act)


def _rounded(x: Tensor, w: Tensor, s: Tensor | None, b: Tensor | None, act: str) -> Tensor:
    x = reference.rounded_rows(x.detach()).to(x.dtype) + (x - x.detach())
    return _right(x, w, s, b, act)


def _narrow_input(x: Tensor, w: Tensor, s: Tensor | None, b: Tensor | None, act: str) -> Tensor:
    return _right(x.to(torch.bfloat16).to(x.dtype), w, s, b, act)


def _bf16_scale(x: Tensor, w: Tensor, s: Tensor | None, b: Tensor | None, act: str) -> Tensor:
    return _right(x, w, None if s is None else s.to(torch.bfloat16).to(s.dtype), b, act)


def _unscaled_gradient(
    x: Tensor, w: Tensor, s: Tensor | None, b: Tensor | None, act: str
) -> Tensor:
    def change(_: Tensor, gradients: list[Tensor | None]) -> list[Tensor | None]:
        first, *others = gradients
        return [None if first is None or s is None else first / s.mean(), *others]

    return change_gradients(lambda x, w, s, b: _right(x, w, s, b, act), change, x, w, s, b)


def _mutant(
    name: str, description: str, fault: Fault, check: str = "values", **more: object
) -> Mutant:
    make = functools.partial(_candidate, fault)
    return Mutant(
        name,
        "gelu_linear_quantized",
        description,
        make,
        frozenset({check}),
        **more,  # type: ignore[arg-type]
    )


MUTANTS: tuple[Mutant, ...] = (
    _mutant("scale-of-the-next", "each channel takes its neighbour's scale", _next_scale),
    _mutant("one-scale", "one scale for all channels, their mean", _one_scale),
    _mutant("bias-scaled", "the bias is multiplied by the scale", _scaled_bias),
    _mutant("bytes-unsigned", "int8 weights are read as uint8", _unsigned),
    _mutant("input-rounded", "input is rounded to int8, unasked", _rounded),
    _mutant("input-in-bf16", "float32 input is rounded to bfloat16", _narrow_input),
    _mutant("scale-in-bf16", "the scale is rounded to bfloat16", _bf16_scale),
    _mutant(
        "gradient-unscaled",
        "the gradient of input lacks the scale",
        _unscaled_gradient,
        "gradients",
        needs=("gradient",),
    ),
)
