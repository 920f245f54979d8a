"""Wrong kernels of gelu_linear, linear and gelu: the formula with one fault."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusedops import reference
from fusedops.verification.mutants.mutant import (
    Candidate,
    Mutant,
    as_if_contiguous,
    change_gradients,
    clamp_infinities,
    flush_subnormals,
    lose_nan,
)

__all__ = ["MUTANTS"]


@dataclass(frozen=True)
class _Call:
    """A call of gelu_linear, or of linear (approximate is then None)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    approximate: str | None

    @property
    def z(self) -> Tensor:
        """Before the activation."""
        return reference.linear(self.x, self.weight, self.bias)

    def activate(self, z: Tensor) -> Tensor:
        """The activation that was asked for."""
        return z if self.approximate is None else reference.gelu(z, approximate=self.approximate)

    def run(self, **other: Any) -> Tensor:
        """The right result, with some arguments replaced."""
        call = replace(self, **other)
        return call.activate(call.z)


Fault = Callable[[_Call], Tensor]


def _mutant(
    name: str,
    description: str,
    fault: Fault,
    check: str = "values",
    op: str = "gelu_linear",
    **more: Any,
) -> Mutant:
    make = functools.partial(_candidate, fault, op)
    return Mutant(name, op, description, make, frozenset({check}), **more)


def _candidate(fault: Fault, op: str) -> Candidate:
    def gelu_linear(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
    ) -> Tensor:
        return fault(_Call(input, weight, bias, approximate))

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return fault(_Call(input, weight, bias, None))

    return linear if op == "linear" else gelu_linear


# --- the activation -------------------------------------------------------------------------------

Activation = Callable[[Tensor], Tensor]


def _for(approximate: str, activation: Activation) -> Fault:
    """Another activation where this one is asked for."""
    return lambda c: activation(c.z) if c.approximate == approximate else c.run()


def _formula(**constants: float) -> Activation:
    """Of ``x sigmoid(a x + b x^3)``, in float32."""
    a, b = constants["a"], constants.get("b", 0.0)

    def activation(z: Tensor) -> Tensor:
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        # The clamp keeps -inf * 0 away; at -100 the result is 0 for all constants used here.
        wide = torch.where(wide < -100.0, -100.0, wide)
        return (wide * torch.sigmoid(a * wide + b * wide**3)).to(z.dtype)

    return activation


def _short_erf(z: Tensor) -> Tensor:
    """GELU by the erf of Abramowitz and Stegun, 7.1.25: three terms, 2.5e-5."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    v = wide.abs() * math.sqrt(0.5)
    t = 1.0 / (1.0 + 0.47047 * v)
    tail = t * (0.3480242 + t * (-0.0958798 + t * 0.7478556)) * torch.exp(-v * v)
    phi = torch.where(wide < 0, 0.5 * tail, 1.0 - 0.5 * tail)
    return (torch.where(wide < -100.0, -100.0, wide) * phi).to(z.dtype)


def _no_tail(z: Tensor) -> Tensor:
    """0 from -4 on: off by 1.3e-4 there, and by everything in relative terms."""
    return torch.where(z < -4.0, -0.0, reference.gelu(z))


# --- the sum --------------------------------------------------------------------------------------


def _bias_twice(call: _Call) -> Tensor:
    return call.run(bias=None if call.bias is None else 2 * call.bias)


def _bias_after(call: _Call) -> Tensor:
    y = call.run(bias=None)
    return y if call.bias is None else y + call.bias


def _bias_lost_in_decode(call: _Call) -> Tensor:
    rows = call.x.numel() // max(call.x.shape[-1], 1)
    return call.run(bias=None if rows == 1 else call.bias)


def _first_of_k(call: _Call, keep: Callable[[int], int]) -> Tensor:
    k = keep(call.x.shape[-1])
    return call.run(x=call.x[..., :k], weight=call.weight[:, :k])


def _last_columns(call: _Call, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Columns past the last full group of 16."""
    y = call.run()
    tail = torch.arange(y.shape[-1]) >= y.shape[-1] // 16 * 16
    return torch.where(tail, change(y), y)


def _weight_as_stored(call: _Call) -> Tensor:
    square = call.weight.shape[0] == call.weight.shape[1]
    return call.run(weight=call.weight.T) if square else call.run()


def _unwritten_columns(call: _Call) -> Tensor:
    y = call.run()
    out = torch.empty(y.shape, dtype=y.dtype)
    full = y.shape[-1] // 16 * 16
    out[..., :full] = y[..., :full]
    return out


# --- precision ------------------------------------------------------------------------------------


def _computed_in(call: _Call, asked: torch.dtype, used: torch.dtype) -> Tensor:
    if call.x.dtype != asked:
        return call.run()
    bias = None if call.bias is None else call.bias.to(used)
    return call.run(x=call.x.to(used), weight=call.weight.to(used), bias=bias).to(asked)


def _ten_bits(t: Tensor) -> Tensor:
    """float32 with the mantissa of TF32."""
    if t.dtype != torch.float32:
        return t
    bits = t.contiguous().view(torch.int32)
    return torch.where(t.isfinite(), (((bits + 0x1000) >> 13) << 13).view(torch.float32), t)


def _narrow_accumulator(call: _Call) -> Tensor:
    """The running sum is rounded to the dtype of the call after every 16 products."""
    if call.x.dtype not in (torch.float16, torch.bfloat16):
        return call.run()
    x, weight = call.x.float(), call.weight.float()
    z = torch.zeros((*x.shape[:-1], weight.shape[0]), dtype=call.x.dtype)
    for k in range(0, x.shape[-1], 16):
        z = (z.float() + x[..., k : k + 16] @ weight[:, k : k + 16].T).to(z.dtype)
    return call.activate(z if call.bias is None else z + call.bias)


# --- gradients, of input, weight and bias ---------------------------------------------------------

Rule = Callable[[_Call, Tensor, list[Tensor | None]], "list[Tensor | None]"]


def _gradients(rule: Rule) -> Fault:
    def fault(call: _Call) -> Tensor:
        def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return call.run(x=x, weight=weight, bias=bias)

        change = functools.partial(rule, call)
        return change_gradients(formula, change, call.x, call.weight, call.bias)

    return fault


def _gradients_of(other: Callable[[_Call], _Call]) -> Fault:
    """The gradients of another call, at the right place."""

    def rule(call: _Call, cotangent: Tensor, right: list[Tensor | None]) -> list[Tensor | None]:
        changed = other(call)
        tensors = [t.detach() for t in (call.x, call.weight)]
        leaves = [t.requires_grad_() for t in tensors]
        bias = None if changed.bias is None else changed.bias.detach().requires_grad_()
        with torch.enable_grad():
            y = changed.run(x=leaves[0], weight=leaves[1], bias=bias)
        asked = [*leaves, *([] if bias is None else [bias])]
        found = list(torch.autograd.grad(y, asked, cotangent))
        return [*found, *right[len(found) :]]

    return _gradients(rule)


def _straight_through(call: _Call) -> _Call:
    return replace(call, approximate=None)


def _bias_gradient_dropped(
    call: _Call, cotangent: Tensor, right: list[Tensor | None]
) -> list[Tensor | None]:
    bias = right[2]
    return [*right[:2], bias if bias is None else torch.zeros_like(bias)]


def _weight_gradient_transposed(
    call: _Call, cotangent: Tensor, right: list[Tensor | None]
) -> list[Tensor | None]:
    weight = right[1]
    if weight is None or weight.shape[0] != weight.shape[1]:
        return right
    return [right[0], weight.T.contiguous(), right[2]]


# --- gelu alone -----------------------------------------------------------------------------------


def _gelu(
    name: str, description: str, fault: Callable[[Tensor, str], Tensor], **more: Any
) -> Mutant:
    def make() -> Candidate:
        def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
            return fault(x, approximate)

        return gelu

    return Mutant(name, "gelu", description, make, **more)


def _gelu_over_x(x: Tensor, approximate: str) -> Tensor:
    y = reference.gelu(x, approximate=approximate)
    if not x.is_contiguous() or x.is_neg():
        return y
    with torch.no_grad():
        return x.copy_(y)


def _gelu_gradient(x: Tensor, approximate: str) -> Tensor:
    formula = functools.partial(reference.gelu, approximate=approximate)
    return change_gradients(formula, lambda cotangent, right: [cotangent], x)


_ROOT = math.sqrt(2.0 / math.pi)

MUTANTS = (
    _mutant(
        "tanh-for-erf",
        "the tanh approximation",
        _for("none", _formula(a=2 * _ROOT, b=2 * _ROOT * 0.044715)),
        needs=("approximate=none",),
    ),
    _mutant(
        "quick-for-tanh",
        "x sigmoid(1.702 x) for tanh",
        _for("tanh", _formula(a=1.702)),
        samples=("33-tanh",),
        needs=("approximate=tanh",),
    ),
    _mutant(
        "quick-for-erf",
        "x sigmoid(1.702 x) for erf",
        _for("none", _formula(a=1.702)),
        needs=("approximate=none",),
    ),
    _mutant(
        "silu",
        "x sigmoid(x) for quick",
        _for("quick", _formula(a=1.0)),
        samples=("33-quick",),
        needs=("approximate=quick",),
    ),
    _mutant("relu", "max(x, 0) for every variant", lambda c: c.z.relu()),
    _mutant("linear-only", "no activation", lambda c: c.z),
    _mutant(
        "short-constants",
        "tanh with 0.7979 for sqrt(2 / pi) and 0.0447 for 0.044715",
        _for("tanh", _formula(a=2 * 0.7979, b=2 * 0.7979 * 0.0447)),
        samples=("33-tanh",),
        needs=("approximate=tanh",),
    ),
    _mutant(
        "short-erf",
        "erf by three terms, good to 2.5e-5",
        _for("none", _short_erf),
        dtypes=("f32",),
        needs=("approximate=none",),
    ),
    _mutant(
        "no-tail",
        "0 for x < -4, where gelu is -1.3e-4",
        _for("none", _no_tail),
        needs=("approximate=none",),
    ),
    _mutant("bias-dropped", "no bias", lambda c: c.run(bias=None), needs=("bias",)),
    _mutant("bias-twice", "bias added twice", _bias_twice, needs=("bias",)),
    _mutant("bias-after-gelu", "bias added to the result", _bias_after, needs=("bias",)),
    _mutant(
        "decode-bias",
        "no bias where there is one row",
        _bias_lost_in_decode,
        samples=("decode-odd",),
        needs=("bias",),
    ),
    _mutant(
        "k-tail",
        "products past the last full group of 16 are dropped",
        lambda c: _first_of_k(c, lambda k: k // 16 * 16),
    ),
    _mutant(
        "k-last", "the last product is dropped", lambda c: _first_of_k(c, lambda k: max(k - 1, 0))
    ),
    _mutant(
        "k-blocks",
        "products past the first 1024 are dropped",
        lambda c: _first_of_k(c, lambda k: min(k, 1024)),
        samples=("k-blocks",),
    ),
    _mutant(
        "n-tail-zero",
        "columns past the last full group of 16 are 0",
        lambda c: _last_columns(c, torch.zeros_like),
    ),
    _mutant(
        "n-tail-unwritten",
        "columns past the last full group of 16 are never written",
        _unwritten_columns,
        by_chance=True,
    ),
    _mutant(
        "weight-transposed",
        "a square weight is read as its transpose",
        _weight_as_stored,
        samples=("17",),
    ),
    _mutant(
        "strides-ignored",
        "reads input as if it were contiguous",
        lambda c: c.run(x=as_if_contiguous(c.x)),
        samples=("x-strided",),
    ),
    _mutant(
        "weight-strides-ignored",
        "reads weight as if it were contiguous",
        lambda c: c.run(weight=as_if_contiguous(c.weight)),
        samples=("weight-transposed",),
    ),
    _mutant(
        "f32-in-bf16",
        "float32 is computed in bfloat16",
        lambda c: _computed_in(c, torch.float32, torch.bfloat16),
        dtypes=("f32",),
    ),
    _mutant(
        "f32-in-tf32",
        "float32 inputs lose 13 bits",
        lambda c: c.run(x=_ten_bits(c.x), weight=_ten_bits(c.weight)),
        dtypes=("f32",),
    ),
    _mutant(
        "f16-in-bf16",
        "float16 is computed in bfloat16",
        lambda c: _computed_in(c, torch.float16, torch.bfloat16),
        dtypes=("f16",),
    ),
    _mutant(
        "f64-in-f32",
        "float64 is computed in float32",
        lambda c: _computed_in(c, torch.float64, torch.float32),
        dtypes=("f64",),
    ),
    _mutant(
        "narrow-accumulator",
        "float16 and bfloat16 sums are rounded every 16 products",
        _narrow_accumulator,
        samples=("rows-9",),
        dtypes=("bf16", "f16"),
    ),
    _mutant("nan-lost", "NaN counts as 0", lambda c: c.run(x=lose_nan(c.x))),
    _mutant(
        "inf-clamped",
        "an infinity counts as the largest number",
        lambda c: c.run(x=clamp_infinities(c.x)),
    ),
    _mutant(
        "gradient-tanh",
        "the gradient of tanh for erf",
        _gradients_of(lambda c: replace(c, approximate="tanh") if c.approximate == "none" else c),
        "gradients",
        dtypes=("f32",),
        needs=("gradient",),
    ),
    _mutant(
        "gradient-straight-through",
        "backward leaves out the activation",
        _gradients_of(_straight_through),
        "gradients",
        needs=("gradient",),
    ),
    _mutant(
        "gradient-without-bias",
        "backward computes its pre-activation without bias",
        _gradients_of(lambda c: replace(c, bias=None)),
        "gradients",
        needs=("gradient",),
    ),
    _mutant(
        "gradient-bias",
        "bias gets zeros",
        _gradients(_bias_gradient_dropped),
        "gradients",
        needs=("gradient",),
    ),
    _mutant(
        "gradient-transposed",
        "a square weight gets its gradient transposed",
        _gradients(_weight_gradient_transposed),
        "gradients",
        samples=("17",),
        needs=("gradient",),
    ),
    _mutant(
        "linear-bias-dropped", "no bias", lambda c: c.run(bias=None), op="linear", needs=("bias",)
    ),
    _mutant(
        "linear-k-tail",
        "products past the last full group of 16 are dropped",
        lambda c: _first_of_k(c, lambda k: k // 16 * 16),
        op="linear",
    ),
    _mutant(
        "linear-f32-in-tf32",
        "float32 inputs lose 13 bits",
        lambda c: c.run(x=_ten_bits(c.x), weight=_ten_bits(c.weight)),
        op="linear",
        dtypes=("f32",),
    ),
    _gelu(
        "gelu-tanh-for-erf",
        "the tanh approximation",
        lambda x, a: reference.gelu(x, approximate="tanh" if a == "none" else a),
    ),
    _gelu(
        "gelu-no-tail",
        "0 for x < -4, where gelu is -1.3e-4",
        lambda x, a: _no_tail(x) if a == "none" else reference.gelu(x, approximate=a),
    ),
    _gelu(
        "gelu-nan-lost", "NaN counts as 0", lambda x, a: reference.gelu(lose_nan(x), approximate=a)
    ),
    _gelu(
        "gelu-subnormals-flushed",
        "subnormal elements count as 0",
        lambda x, a: reference.gelu(flush_subnormals(x), approximate=a),
    ),
    _gelu(
        "gelu-strides-ignored",
        "reads x as if it were contiguous",
        lambda x, a: reference.gelu(as_if_contiguous(x), approximate=a),
        samples=("x-strided",),
    ),
    _gelu(
        "gelu-in-place",
        "the result is written over x, undeclared",
        _gelu_over_x,
        killed_by=frozenset({"inputs"}),
    ),
    _gelu(
        "gelu-gradient-identity",
        "backward returns the cotangent",
        _gelu_gradient,
        killed_by=frozenset({"gradients"}),
        needs=("gradient",),
    ),
)
