"""From the tables of other libraries to half-width ones, as views."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fusedops import diagnosis
from fusedops._library import is_transformed
from fusedops.ops import rope

__all__ = ["accepted", "evens", "first_half", "need", "rotate"]


def need(met: bool, op: str, requirement: str, got: object) -> None:
    """Raise ``[op] requirement but got got`` unless met."""
    if not met:
        raise RuntimeError(f"[{op}] {requirement} but got {got}")


def accepted(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The tables as rope takes them beside x: of x's dtype or float32."""
    if cos.dtype == sin.dtype and cos.dtype in (x.dtype, torch.float32):
        return cos, sin
    return cos.float(), sin.float()


def first_half(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the first half of each row, where the second one repeats it ([a, b, a, b]).

    Raises:
        RuntimeError: the halves differ. Not looked at while compiling or transforming.
    """
    half = _half_width(op, cos)
    if not _checked(cos, sin, "halves"):
        for table in (cos, sin):
            if not torch.equal(table[..., :half], table[..., half:]):
                _refuse(op, "repeat the first half of each row in the second", x, cos, sin, False)
        _remember(cos, sin, "halves")
    return cos[..., :half], sin[..., :half]


def evens(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Views of every second column, where each is there twice ([a, a, b, b]).

    Raises:
        RuntimeError: two such columns differ. Not looked at while compiling or transforming.
    """
    _half_width(op, cos)
    if not _checked(cos, sin, "columns"):
        for table in (cos, sin):
            if not torch.equal(table[..., 0::2], table[..., 1::2]):
                _refuse(op, "have each column twice, side by side", x, cos, sin, True)
        _remember(cos, sin, "columns")
    return cos[..., 0::2], sin[..., 0::2]


def rotate(op: str, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate x by half-width tables that broadcast against ``x[..., : r / 2]``, any rank.

    Axes along which the tables have one entry are heads, the others tokens: x becomes
    [batch, heads, tokens, D], a view where its strides can say that.
    """
    lead = x.shape[:-1]
    shape = torch.broadcast_shapes(cos.shape, sin.shape)  # type: ignore[no-untyped-call]
    cos, sin = accepted(x, cos.expand(shape), sin.expand(shape))
    axes = len(lead) + 1 - cos.dim()
    fits = axes >= 0 and all(
        t in (1, n) for t, n in zip(cos.shape[:-1], lead[max(axes, 0) :], strict=False)
    )
    need(fits, op, f"cos and sin must broadcast against {[*lead]}", f"shape {[*cos.shape]}")
    cos, sin = (t.reshape((1,) * axes + t.shape) for t in (cos, sin))
    tokens = [axis for axis, size in enumerate(cos.shape[:-1]) if size != 1]
    heads = [axis for axis in range(len(lead)) if axis not in tokens]
    batch, seq = tokens[:-1], tokens[-1:]
    order = [*batch, *heads, *seq]
    sizes = [lead[axis] for axis in order]
    groups = [math.prod(lead[axis] for axis in group) for group in (batch, heads, seq)]
    rows = groups[::2] if batch else groups[2:]
    cos, sin = (t.permute(*tokens, *heads, -1).reshape(*rows, t.shape[-1]) for t in (cos, sin))
    y = rope(x.permute(*order, -1).reshape(*groups, x.shape[-1]), cos, sin, interleaved=interleaved)
    return y.reshape(*sizes, x.shape[-1]).permute(*_inverse(order), -1)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _half_width(op: str, table: Tensor) -> int:
    width = table.shape[-1]
    need(width % 2 == 0, op, "cos and sin must have an even number of columns", width)
    return width // 2


# The tables that were compared last: every layer of a model gets the same ones.
_last: tuple[weakref.ref[Tensor], weakref.ref[Tensor], int, int, str] | None = None


def _checked(cos: Tensor, sin: Tensor, repeats: str) -> bool:
    """Whether these values were compared in the last call, or cannot be: inside a trace."""
    if torch.compiler.is_compiling() or is_transformed():
        return True
    if _last is not None and _last[0]() is cos and _last[1]() is sin and not cos.is_inference():
        return (cos._version, sin._version, repeats) == _last[2:]
    return cos.is_meta or isinstance(cos, FakeTensor)


def _remember(cos: Tensor, sin: Tensor, repeats: str) -> None:
    global _last
    if not cos.is_inference() and not sin.is_inference():  # those have no version
        _last = weakref.ref(cos), weakref.ref(sin), cos._version, sin._version, repeats


def _refuse(
    op: str, requirement: str, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> None:
    hint = diagnosis.hint(x, cos, sin, interleaved=interleaved, full=True)
    got = "a table that does not" + (f". {hint}" if hint else "")
    raise RuntimeError(f"[{op}] cos and sin must {requirement} but got {got}")
