"""Wrong kernels of rope and rope_qk: the formula of the reference with one fault."""

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
    """A call of rope."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    ids: Tensor | None
    options: dict[str, Any]

    def run(self, **other: Any) -> Tensor:
        """The right result, with some arguments replaced."""
        call = replace(self, **other)
        return reference.rope(call.x, call.cos, call.sin, call.ids, **call.options)

    def option(self, **other: Any) -> Tensor:
        """The right result, with some options replaced."""
        return self.run(options={**self.options, **other})

    @property
    def passed(self) -> Tensor:
        """Which elements of a head are past rotary_dim."""
        return torch.arange(self.x.shape[-1]) >= 2 * self.cos.shape[-1]

    @property
    def tokens_dim(self) -> int:
        """Of x."""
        return -2 if self.options.get("layout", "bhsd") == "bhsd" else -3


Fault = Callable[[_Call], Tensor]


def _mutant(
    name: str, description: str, fault: Fault, check: str = "values", **more: Any
) -> Mutant:
    make = functools.partial(_candidate, fault)
    return Mutant(name, "rope", description, make, frozenset({check}), **more)


def _candidate(fault: Fault) -> Candidate:
    def rope(
        x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, **options: Any
    ) -> Tensor:
        return fault(_Call(x, cos, sin, position_ids, options))

    return rope


# --- tables and positions -------------------------------------------------------------------------


def _next_row(call: _Call) -> Tensor:
    return call.run(cos=call.cos.roll(-1, -2), sin=call.sin.roll(-1, -2))


def _last_pairs_unturned(call: _Call, count: Callable[[int], int]) -> Tensor:
    width = call.cos.shape[-1]
    turned = torch.arange(width) < width - count(width)
    return call.run(cos=torch.where(turned, call.cos, 1.0), sin=torch.where(turned, call.sin, 0.0))


def _bf16_tables(call: _Call) -> Tensor:
    cos, sin = (t.bfloat16().to(t.dtype) for t in (call.cos, call.sin))
    return call.run(cos=cos, sin=sin)


def _f16_angles(call: _Call) -> Tensor:
    angle = torch.atan2(call.sin, call.cos).half().to(torch.float64)
    return call.run(cos=angle.cos().to(call.cos.dtype), sin=angle.sin().to(call.sin.dtype))


def _theta(call: _Call) -> Tensor:
    """A row per token does not tell its position: such tables stay as they are."""
    if call.cos.dim() == 3:
        return call.run()
    rows, width = call.cos.shape
    frequency = 10000.0 ** (-torch.arange(width, dtype=torch.float64) / max(width, 1))
    more = 0.001 * torch.arange(rows).unsqueeze(-1) * frequency
    c, s = call.cos.to(torch.float64), call.sin.to(torch.float64)
    cos = (c * more.cos() - s * more.sin()).to(call.cos.dtype)
    sin = (s * more.cos() + c * more.sin()).to(call.sin.dtype)
    return call.run(cos=cos, sin=sin)


def _tail_pairs(call: _Call) -> Tensor:
    column = torch.arange(call.cos.shape[-1])
    full = call.cos.shape[-1] // 16 * 16
    column = torch.where(column < full, column, (column - 1).clamp_min(0))
    return call.run(cos=call.cos[..., column], sin=call.sin[..., column])


def _positions_of_row_0(call: _Call) -> Tensor:
    if call.cos.dim() == 3:
        call = replace(call, cos=call.cos[:1], sin=call.sin[:1])
    if call.ids is not None and call.ids.dim() == 2:
        call = replace(call, ids=call.ids[:1])
    return call.run()


def _decode_row_0(call: _Call) -> Tensor:
    y = call.run()
    one_token = call.x.dim() == 4 and call.x.shape[call.tokens_dim] == 1
    return torch.cat((y[:1], call.x[1:])) if one_token else y


# --- what is written ------------------------------------------------------------------------------


def _unwritten(call: _Call) -> Tensor:
    y = call.run()
    out = torch.empty(y.shape, dtype=y.dtype)
    out[..., :-1] = y[..., :-1]
    return out


def _stale() -> Candidate:
    buffers: dict[tuple[Any, ...], Tensor] = {}

    def rope(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        y = reference.rope(x, *rest, **options)
        buffer = buffers.setdefault((x.shape, x.dtype), torch.zeros(y.shape, dtype=y.dtype))
        buffer[..., :-1] = y[..., :-1].detach()
        return buffer.clone()

    return rope


def _over_x(call: _Call) -> Tensor:
    y = call.run()
    if not call.x.is_contiguous() or call.x.is_neg():
        return y
    with torch.no_grad():
        return call.x.copy_(y)


# --- numbers --------------------------------------------------------------------------------------


def _computed_in(call: _Call, asked: torch.dtype, used: torch.dtype) -> Tensor:
    if call.x.dtype != asked:
        return call.run()
    x, cos, sin = (t.to(used) for t in (call.x, call.cos, call.sin))
    return call.run(x=x, cos=cos, sin=sin).to(asked)


def _rounded_steps(call: _Call) -> Tensor:
    products = call.run(sin=torch.zeros_like(call.sin)), call.run(cos=torch.zeros_like(call.cos))
    return torch.where(call.passed, call.x, products[0] + products[1])


# --- gradients, of x, cos and sin -----------------------------------------------------------------

Rule = Callable[[_Call, Tensor, list[Tensor | None]], "list[Tensor | None]"]


def _gradients(rule: Rule) -> Fault:
    def fault(call: _Call) -> Tensor:
        def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return call.run(x=x, cos=cos, sin=sin)

        return change_gradients(formula, functools.partial(rule, call), call.x, call.cos, call.sin)

    return fault


def _of_x(rule: Callable[[_Call, Tensor, Tensor], Tensor]) -> Fault:
    """rule(call, cotangent, right gradient) is the gradient of x; those of the tables are right."""

    def whole(call: _Call, cotangent: Tensor, right: list[Tensor | None]) -> list[Tensor | None]:
        return [right[0] if right[0] is None else rule(call, cotangent, right[0]), *right[1:]]

    return _gradients(whole)


# --- two tensors ----------------------------------------------------------------------------------


def _key(name: str, description: str, fault: Callable[[Tensor, Tensor, int], Tensor]) -> Mutant:
    """The query is right; k becomes fault(k, right result, dimension of the heads)."""

    def make() -> Candidate:
        def rope_qk(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
            y, right = reference.rope_qk(q, k, *rest, **options)
            heads = -3 if options.get("layout", "bhsd") == "bhsd" else -2
            return y, fault(k, right, heads)

        return rope_qk

    return Mutant(name, "rope_qk", description, make)


def _without_last_head(k: Tensor, right: Tensor, heads: int) -> Tensor:
    count = k.shape[heads]
    if count < 2:
        return right
    return torch.cat((right.narrow(heads, 0, count - 1), k.narrow(heads, count - 1, 1)), heads)


MUTANTS = (
    _mutant("off-by-one", "reads the tables at position + 1", _next_row),
    _mutant(
        "wrong-sign",
        "the sign of sin",
        lambda c: c.option(conjugate=not c.options.get("conjugate", False)),
    ),
    _mutant(
        "swapped-pairing",
        "pairs neighbours where halves are asked for, and the reverse",
        lambda c: c.option(interleaved=not c.options.get("interleaved", False)),
    ),
    _mutant(
        "last-pair",
        "the last pair is not turned",
        lambda c: _last_pairs_unturned(c, lambda width: min(width, 1)),
    ),
    _mutant(
        "low-frequencies",
        "the lowest tenth of the frequencies (3 of 32) is not turned",
        lambda c: _last_pairs_unturned(c, lambda width: math.ceil(width * 3 / 32)),
    ),
    _mutant("bf16-tables", "tables rounded to bfloat16", _bf16_tables, dtypes=("f32",)),
    _mutant("f16-angles", "angles rounded to float16", _f16_angles, dtypes=("f32",)),
    _mutant("theta-1.001", "every angle 1.001 times what it is", _theta),
    _mutant(
        "tail-pairs", "pairs past the last full group of 16 read the tables one off", _tail_pairs
    ),
    _mutant(
        "positions-of-row-0",
        "every row of the batch is turned by the positions of the first",
        _positions_of_row_0,
        samples=("table-3d",),
        needs=("rows of positions",),
    ),
    _mutant(
        "decode-row-0",
        "with one token only the first row of the batch is turned",
        _decode_row_0,
        samples=("decode-batch",),
    ),
    _mutant(
        "offset-ignored",
        "offset taken as 0",
        lambda c: c.option(offset=0),
        samples=("decode",),
        needs=("offset",),
    ),
    _mutant(
        "ids-ignored",
        "position_ids taken as absent",
        lambda c: c.run(ids=None),
        samples=("ids",),
        needs=("position_ids",),
    ),
    _mutant(
        "conjugate-ignored",
        "conjugate taken as False",
        lambda c: c.option(conjugate=False),
        samples=("conjugate",),
        needs=("conjugate",),
    ),
    _mutant(
        "neighbours-ignored",
        "interleaved taken as False",
        lambda c: c.option(interleaved=False),
        samples=("neighbours-d18",),
        needs=("interleaved",),
    ),
    _mutant(
        "layout-ignored",
        "layout taken as bhsd: heads are turned by their number, not tokens",
        lambda c: c.option(layout="bhsd"),
        samples=("bshd",),
        needs=("bshd",),
    ),
    _mutant(
        "tail-zero",
        "elements past rotary_dim are 0",
        lambda c: c.run().masked_fill(c.passed, 0.0),
        samples=("neighbours-partial",),
        needs=("partial",),
    ),
    _mutant(
        "tail-scaled",
        "elements past rotary_dim are multiplied by 1 - 2^-12",
        lambda c: torch.where(c.passed, c.x * (1.0 - 2.0**-12), c.run()),
        samples=("neighbours-partial",),
        dtypes=("f32",),
        needs=("partial",),
    ),
    _mutant(
        "unwritten",
        "the last element of each head is never written",
        _unwritten,
        by_chance=True,
    ),
    Mutant("stale", "rope", "the last element of each head is what a workspace held", _stale),
    _mutant("in-place", "the result is written over x, undeclared", _over_x, "inputs"),
    _mutant(
        "strides-ignored",
        "reads x as if it were contiguous",
        lambda c: c.run(x=as_if_contiguous(c.x)),
        samples=("x-strided",),
    ),
    _mutant(
        "f32-in-bf16",
        "float32 is computed in bfloat16",
        lambda c: _computed_in(c, torch.float32, torch.bfloat16),
        dtypes=("f32",),
    ),
    _mutant(
        "f64-in-f32",
        "float64 is computed in float32",
        lambda c: _computed_in(c, torch.float64, torch.float32),
        dtypes=("f64",),
    ),
    _mutant(
        "rounded-steps",
        "float16 and bfloat16 round each product before they are added",
        _rounded_steps,
        dtypes=("bf16", "f16"),
    ),
    _mutant(
        "subnormals-flushed",
        "subnormal elements count as 0",
        lambda c: c.run(x=flush_subnormals(c.x)),
    ),
    _mutant("nan-lost", "NaN counts as 0", lambda c: c.run(x=lose_nan(c.x))),
    _mutant(
        "inf-clamped",
        "an infinity counts as the largest number",
        lambda c: c.run(x=clamp_infinities(c.x)),
    ),
    _mutant(
        "gradient-identity",
        "backward returns the cotangent",
        _of_x(lambda call, cotangent, right: cotangent),
        "gradients",
        needs=("gradient",),
    ),
    _mutant(
        "gradient-sign",
        "backward turns forward again",
        _of_x(lambda call, cotangent, right: call.run(x=cotangent)),
        "gradients",
        needs=("gradient",),
    ),
    _mutant(
        "gradient-zero",
        "backward returns zeros",
        _of_x(lambda call, cotangent, right: torch.zeros_like(right)),
        "gradients",
        needs=("gradient",),
    ),
    _mutant(
        "gradient-tail",
        "backward drops the elements past rotary_dim",
        _of_x(lambda call, cotangent, right: right.masked_fill(call.passed, 0.0)),
        "gradients",
        samples=("neighbours-partial",),
        needs=("gradient", "partial"),
    ),
    _mutant(
        "gradient-tables",
        "cos and sin get the gradients of each other",
        _gradients(lambda call, cotangent, right: [right[0], right[2], right[1]]),
        "gradients",
        needs=("table gradient",),
    ),
    _mutant(
        "gradient-none",
        "no gradient at all, promised to be differentiable",
        lambda c: c.run().detach(),
        "gradients",
        promises=("differentiable",),
        needs=("gradient",),
    ),
    _key("key-unturned", "k comes back as it was", lambda k, right, heads: k.clone()),
    _key("key-last-head", "the last of several heads of k is not turned", _without_last_head),
)
