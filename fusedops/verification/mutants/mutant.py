"""What a mutant is, and the faults that mutants of several ops share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "Candidate",
    "Mutant",
    "as_if_contiguous",
    "asks",
    "change_gradients",
    "clamp_infinities",
    "flush_subnormals",
    "lose_nan",
]

Candidate = Callable[..., Any]


@dataclass(frozen=True)
class Mutant:
    """An implementation of op with one planted fault.

    wrong: a mistake that a kernel can be shipped with. cheat: what only serves to pass a harness.
    make returns a fresh candidate, which may keep state of its own, with the signature of the op
    (``fusedops.rope`` without ``out``, ``fusedops.gelu_linear`` without ``save`` and ``out``).
    killed_by: checks of verify of which each must object. promises: what the candidate claims to
    verify. by_chance: what it returns depends on what freed memory happened to hold.
    samples and dtypes: where the fault shows, if that is not everywhere. needs: what calls must
    have before the fault can show, words of ``asks``.
    """

    name: str
    op: str
    description: str
    make: Callable[[], Candidate] = field(repr=False)
    killed_by: frozenset[str] = frozenset({"values"})
    kind: Literal["wrong", "cheat"] = "wrong"
    promises: tuple[str, ...] = ()
    by_chance: bool = False
    samples: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def asks(op: str, args: Sequence[Any], options: Mapping[str, Any]) -> set[str]:
    """What a call has that not every call of op has, in the words of ``Mutant.needs``."""
    words = {name for name in ("offset", "conjugate", "interleaved") if options.get(name)}
    if any(isinstance(t, Tensor) and t.requires_grad for t in args):
        words.add("gradient")
    if not op.startswith("rope"):
        bias = args[2] if len(args) > 2 else None
        words |= {"bias"} if bias is not None else set()
        return words | {f"approximate={options.get('approximate', 'none')}"}
    first = 2 if op == "rope_qk" else 1
    x, cos = args[0], args[first]
    ids = args[first + 2] if len(args) > first + 2 else None
    if options.get("layout") == "bshd":
        words.add("bshd")
    if 2 * cos.shape[-1] < x.shape[-1]:
        words.add("partial")
    if cos.requires_grad:
        words.add("table gradient")
    if ids is not None:
        words.add("position_ids")
    if cos.dim() == 3 or (ids is not None and ids.dim() == 2):
        words.add("rows of positions")
    return words


def as_if_contiguous(x: Tensor) -> Tensor:
    """What a kernel sees that ignores the strides of x; zeros past the end of its memory."""
    if x.is_contiguous() and not x.is_neg():
        return x
    size = x.untyped_storage().nbytes() // x.itemsize
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), 0, (size,), (1,))
    memory = memory[x.storage_offset() :]
    missing = memory.new_zeros(max(x.numel() - memory.numel(), 0))
    return torch.cat((memory, missing))[: x.numel()].view(x.shape)


def flush_subnormals(x: Tensor) -> Tensor:
    """Subnormal elements as 0."""
    return torch.where(x.abs() < torch.finfo(x.dtype).smallest_normal, 0.0, x)


def lose_nan(x: Tensor) -> Tensor:
    """NaN as 0."""
    return x.nan_to_num(0.0, posinf=math.inf, neginf=-math.inf)


def clamp_infinities(x: Tensor) -> Tensor:
    """An infinity as the largest number of its sign."""
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


Gradients = list[Tensor | None]
Change = Callable[[Tensor, Gradients], Sequence[Tensor | None]]


def change_gradients(
    formula: Callable[..., Tensor], change: Change, *tensors: Tensor | None
) -> Tensor:
    """``formula(*tensors)`` whose gradients are change(cotangent, the right gradients)."""
    y: Tensor = _Changed.apply(formula, change, *tensors)  # type: ignore[no-untyped-call]
    return y


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, formula: Callable[..., Tensor], change: Change, *tensors: Tensor | None
    ) -> Tensor:
        ctx.formula, ctx.change = formula, change
        ctx.save_for_backward(*tensors)
        return formula(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        pairs = list(zip(ctx.saved_tensors, needed, strict=True))
        tensors = [t.detach().requires_grad_() if need else t for t, need in pairs]
        with torch.enable_grad():
            y = ctx.formula(*tensors)
        asked = [t for t, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, asked, cotangent))
        right = [next(found) if need else None for need in needed]
        changed = ctx.change(cotangent, right)
        return None, None, *(g if need else None for g, need in zip(changed, needed, strict=True))
