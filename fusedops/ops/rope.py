"""Rotary position embedding: rope, rope_, rope_qk, rope_qk_."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from fusedops import _library, reference
from fusedops._library import DTYPE_NAMES, is_plain, is_transformed, ops
from fusedops.ops.positions import positions

_LAYOUTS = ("bhsd", "bshd")
# The kernels as a call that nothing records, transforms or traces reaches them.
_plain = ops.rope_nograd.default
_out_plain = ops.rope_out_nograd.default
_in_place_plain = ops.rope__nograd.default
_qk_plain = ops.rope_qk_nograd.default
_qk_in_place_plain = ops.rope_qk__nograd.default


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    layout: str = "bhsd",
    interleaved: bool = False,
    conjugate: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate each pair ``(x1, x2)`` of x: ``(x1 * cos - x2 * sin, x2 * cos + x1 * sin)``.

    Replaces ``x * cos + rotate_half(x) * sin`` and the copies it makes, at any strides.

    Args:
        x: [B, H, S, D], or [H, S, D]; with ``layout="bshd"`` [B, S, H, D] or [S, H, D]. float32,
            float16, bfloat16 or float64.
        cos: cosines (values, not angles), half width: [P, rotary_dim / 2], read at row
            ``offset + position``; or one row per token, [B or 1, S, rotary_dim / 2].
            float32 or x's dtype. rotary_dim <= D; the elements behind it pass through.
        sin: sines, like cos.
        position_ids: int32 or int64, [S], [1, S] or [B, S]; the default is 0, 1, 2, ...
        offset: added to every position; negative only if no position becomes so. An int, or
            int32 or int64 [B] (with cu_seqlens: one per sequence), as a batched KV cache has it.
        cu_seqlens: int32 or int64 [sequences + 1]: x is [T, H, D] (``layout="bshd"``) and holds
            sequences of different lengths one behind the other, sequence i in tokens
            ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``; each counts its positions from 0. Starts at
            0, never decreases, ends at T. Takes no position_ids.
        max_seqlen: no sequence is longer. Checked, not needed.
        layout: "bhsd" or "bshd".
        interleaved: pairs are (x[2j], x[2j+1]) (GPT-J, Meta) and not
            (x[j], x[j + rotary_dim / 2]) (GPT-NeoX, Hugging Face).
        conjugate: turn by the opposite angle.
        out: receives the result: x itself, or memory that x does not touch.

    Returns:
        A tensor like x (or ``out``). Gradients reach x and, where they require it, cos and sin.

    Raises:
        RuntimeError: ``[rope] requirement but got value``, before anything is written: dtypes,
            ranks, sizes or devices that do not fit, a position outside the table, ``out`` that
            overlaps an input or is asked for while autograd records.

    Accuracy:
        float32 and float64 equal the eager formula bit for bit, on every ISA. float16 and bfloat16
        are computed in float32 and rounded once:
        |error| <= eps / 2 * |y| + 2^-23 (|x1 cos| + |x2 sin|).

    Source: Su et al. 2021, arXiv:2104.09864; signature after pytorch#187286.
    """
    form = _form("rope", layout), interleaved, conjugate
    if cu_seqlens is not None or max_seqlen is not None or type(offset) is not int:
        position_ids, offset = positions(
            "rope", x, form[0], position_ids, offset, cu_seqlens, max_seqlen
        )
    try:
        if out is not None:
            if is_plain(x, cos, sin, out) and _library.is_ordinary(out):
                _out_plain(x, cos, sin, position_ids, offset, *form, out)
                _library.count_write((out,))
                return out
            _library.refuse_recorded("rope", "out", x, cos, sin, out)
            _library.refuse_negated("rope", "out", out)
            _library.write(ops.rope_out, (x, cos, sin, position_ids, offset, *form, out), out)
            return out
        if is_plain(x, cos, sin):
            return _plain(x, cos, sin, position_ids, offset, *form)
        if is_transformed():
            return _formula(x, cos, sin, position_ids, offset, *form)
        return ops.rope(x, cos, sin, position_ids, offset, *form)
    except RuntimeError as error:
        raise _hinted(error, x, cos, sin, position_ids, offset, *form) from None


def rope_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    layout: str = "bhsd",
    interleaved: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """``rope`` into x itself; returns x.

    Arguments, accuracy and errors as for :func:`rope`. Gradients reach x.

    Raises:
        RuntimeError: also if elements of x share memory, if cos or sin require grad (their gradient
            needs the x that is overwritten), or if x is a leaf that requires grad, or a view that
            autograd does not let anyone write to.
    """
    form = _form("rope_", layout), interleaved, conjugate
    if cu_seqlens is not None or max_seqlen is not None or type(offset) is not int:
        position_ids, offset = positions(
            "rope_", x, form[0], position_ids, offset, cu_seqlens, max_seqlen
        )
    try:
        if is_plain(x, cos, sin) and _library.is_ordinary(x):
            _in_place_plain(x, cos, sin, position_ids, offset, *form)
            _library.count_write((x,))
        else:
            _write("rope_", (x,), (cos, sin, position_ids, offset, *form))
    except RuntimeError as error:
        raise _hinted(error, x, cos, sin, position_ids, offset, *form) from None
    return x


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    layout: str = "bhsd",
    interleaved: bool = False,
    conjugate: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rope`` of queries and keys by the same tables in one call.

    q and k may differ in the number of heads (grouped-query attention). Arguments, accuracy and
    errors as for :func:`rope`.
    """
    form = _form("rope_qk", layout), interleaved, conjugate
    if cu_seqlens is not None or max_seqlen is not None or type(offset) is not int:
        position_ids, offset = positions(
            "rope_qk", q, form[0], position_ids, offset, cu_seqlens, max_seqlen
        )
    try:
        if is_plain(q, k, cos, sin):
            rotated = _qk_plain(q, k, cos, sin, position_ids, offset, *form)
        elif is_transformed():
            rotated = _formula_qk(q, k, cos, sin, position_ids, offset, *form)
        else:
            rotated = ops.rope_qk(q, k, cos, sin, position_ids, offset, *form)
    except RuntimeError as error:
        raise _hinted(error, q, cos, sin, position_ids, offset, *form) from None
    return rotated[0], rotated[1]


def rope_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    layout: str = "bhsd",
    interleaved: bool = False,
    conjugate: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rope_qk`` into q and k themselves; returns them.

    Arguments, accuracy and errors as for :func:`rope_`; q and k must not share memory.
    """
    form = _form("rope_qk_", layout), interleaved, conjugate
    if cu_seqlens is not None or max_seqlen is not None or type(offset) is not int:
        position_ids, offset = positions(
            "rope_qk_", q, form[0], position_ids, offset, cu_seqlens, max_seqlen
        )
    try:
        if is_plain(q, k, cos, sin) and _library.is_ordinary(q) and _library.is_ordinary(k):
            _qk_in_place_plain(q, k, cos, sin, position_ids, offset, *form)
            _library.count_write((q, k))
        else:
            _write("rope_qk_", (q, k), (cos, sin, position_ids, offset, *form))
    except RuntimeError as error:
        raise _hinted(error, q, cos, sin, position_ids, offset, *form) from None
    return q, k


def _form(op: str, layout: str) -> bool:
    if layout not in _LAYOUTS:
        raise RuntimeError(f"[{op}] layout must be 'bhsd' or 'bshd' but got {layout!r}")
    return layout == "bshd"


def _hinted(
    error: RuntimeError,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offset: int,
    bshd: bool,
    interleaved: bool,
    conjugate: bool,
) -> RuntimeError:
    """The error of a check, with a sentence of ``fusedops.doctor`` where it knows the mistake."""
    from fusedops.diagnosis import hint

    if not re.match(r"\[rope.*(rotary_dim|table|cos must be|position_ids must be \[)", str(error)):
        return error
    advice = hint(
        x,
        cos,
        sin,
        _LAYOUTS[bshd],
        interleaved=interleaved,
        position_ids=position_ids,
        offset=offset,
    )
    return RuntimeError(f"{error}. {advice}") if advice else error


# The ops as formulas, with the ops' own arguments.


def _formula(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offset: int,
    bshd: bool,
    interleaved: bool,
    conjugate: bool,
    *,
    op: str = "rope",
    name: str = "x",
) -> Tensor:
    _require(op, name, x, cos, sin, position_ids, offset, bshd)
    return reference.rope(
        x,
        cos,
        sin,
        position_ids,
        offset=offset,
        layout=_LAYOUTS[bshd],
        interleaved=interleaved,
        conjugate=conjugate,
    )


def _formula_qk(q: Tensor, k: Tensor, *rest: Any, op: str = "rope_qk") -> tuple[Tensor, Tensor]:
    return _formula(q, *rest, op=op, name="q"), _formula(k, *rest, op=op, name="k")


def _require(
    op: str,
    name: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offset: int,
    bshd: bool,
) -> None:
    """The op's checks of dtypes and sizes, for calls that never reach it.

    PyTorch operations would broadcast, promote and ignore what they are not asked for.
    """

    def need(met: bool, requirement: str, got: Any) -> None:
        if not met:
            raise RuntimeError(f"[{op}] {requirement} but got {got}")

    floating = f"{name} must be float32, float16, bfloat16 or float64"
    need(x.dtype in DTYPE_NAMES, floating, x.dtype)
    axes = "([S, H, D] or [B, S, H, D])" if bshd else "([H, S, D] or [B, H, S, D])"
    ranks = f"{name} must have 3 or 4 dimensions {axes}"
    need(x.dim() in (3, 4), ranks, f"shape {[*x.shape]}")
    batch, seq = x.shape[0] if x.dim() == 4 else 1, x.shape[-3 if bshd else -2]
    need(cos.dtype == sin.dtype, "cos and sin must have one dtype", f"{cos.dtype} and {sin.dtype}")
    own = f"cos and sin must be Float or of {name}'s dtype {DTYPE_NAMES[x.dtype]}"
    need(cos.dtype in (x.dtype, torch.float32), own, DTYPE_NAMES.get(cos.dtype, cos.dtype))
    shapes = "cos must be [positions, rotary_dim / 2] or [batch, seq, rotary_dim / 2]"
    need(cos.dim() in (2, 3), shapes, f"shape {[*cos.shape]}")
    both = f"{[*cos.shape]} and {[*sin.shape]}"
    need(cos.shape == sin.shape, "cos and sin must have one shape", both)
    rotary = 2 * cos.shape[-1]
    need(rotary <= x.shape[-1], f"rotary_dim must be at most head_dim {x.shape[-1]}", rotary)
    if cos.dim() == 3:
        need(position_ids is None, "position_ids must be None with a 3-D table", "a tensor")
        need(offset == 0, "offset must be 0 with a 3-D table", offset)
        one = f"a 3-D table must have batch size 1 or {batch}"
        need(cos.shape[0] in (1, batch), one, cos.shape[0])
        need(cos.shape[1] == seq, f"a 3-D table must have {seq} rows", cos.shape[1])
    elif position_ids is None:
        need(offset >= 0, "offset must not be negative", offset)
        least = f"the table must have at least offset + seq = {offset + seq} rows"
        need(seq == 0 or offset + seq <= cos.shape[0], least, cos.shape[0])
    else:
        integer = "position_ids must be int32 or int64"
        need(position_ids.dtype in (torch.int32, torch.int64), integer, position_ids.dtype)
        fits = position_ids.dim() in (1, 2) and position_ids.shape[-1] == seq
        fits = fits and (position_ids.dim() == 1 or position_ids.shape[0] in (1, batch))
        shape = f"shape {[*position_ids.shape]}"
        need(fits, f"position_ids must be [{seq}] or [{batch}, {seq}]", shape)


# Gradients.


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, *form: Any
    ) -> Tensor:
        return ops.rope_nograd(x, cos, sin, position_ids, *form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, cos, sin, position_ids, ctx.offset, ctx.bshd, ctx.interleaved, ctx.conjugate = inputs
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if learned else None, cos, sin, position_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, position_ids = ctx.saved_tensors
        tables = cos, sin, position_ids, ctx.offset, ctx.bshd, ctx.interleaved
        grad_x = grad_cos = grad_sin = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.rope(grad, *tables, not ctx.conjugate)
        if x is not None:
            grad_cos, grad_sin = _table_gradients(grad, x, *tables, ctx.conjugate)
        return grad_x, grad_cos, grad_sin, None, None, None, None, None


def _table_gradients(
    grad: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offset: int,
    bshd: bool,
    interleaved: bool,
    conjugate: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of cos and sin, summed over heads and over all tokens that read a row."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rotary = 2 * cos.shape[-1]
    g1, g2 = _pairs(grad[..., :rotary].to(wide), interleaved)
    x1, x2 = _pairs(x[..., :rotary].to(wide), interleaved)
    heads = -2 if bshd else -3
    to_cos = (g1 * x1 + g2 * x2).sum(heads)
    to_sin = (g2 * x1 - g1 * x2).sum(heads)
    if conjugate:
        to_sin = -to_sin
    return (
        _to_rows(to_cos, cos, position_ids, offset).to(cos.dtype),
        _to_rows(to_sin, sin, position_ids, offset).to(sin.dtype),
    )


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _to_rows(tokens: Tensor, table: Tensor, position_ids: Tensor | None, offset: int) -> Tensor:
    """Add the contributions of the tokens, [B, S, r/2] or [S, r/2], to the rows they came from."""
    if table.dim() == 3:
        tokens = tokens if tokens.dim() == 3 else tokens.unsqueeze(0)
        return tokens.sum(0, keepdim=True) if table.shape[0] == 1 else tokens
    if position_ids is None:
        tokens = tokens.sum(0) if tokens.dim() == 3 else tokens
        return torch.nn.functional.pad(
            tokens, (0, 0, offset, table.shape[0] - offset - tokens.shape[-2])
        )
    if tokens.dim() == 2 and position_ids.dim() == 2:
        position_ids = position_ids.squeeze(0)
    rows = (position_ids + offset).expand(tokens.shape[:-1]).reshape(-1)
    zeros = tokens.new_zeros(table.shape)
    return zeros.index_add(0, rows, tokens.reshape(-1, tokens.shape[-1]))


class _RopeInPlace(torch.autograd.Function):
    """Writes through a declared in-place op and tells autograd so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        cos, sin, position_ids, ctx.offset, ctx.bshd, ctx.interleaved, ctx.conjugate = rest
        ops.rope_(x, *rest)
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin, position_ids)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        form = ctx.offset, ctx.bshd, ctx.interleaved, not ctx.conjugate
        return ops.rope(grad, *ctx.saved_tensors, *form), *[None] * 7


def _write(op: str, targets: tuple[Tensor, ...], rest: tuple[Any, ...]) -> None:
    """Rotate every target in place, recorded where autograd asks for it."""
    cos, sin = rest[:2]
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise RuntimeError(
            f"[{op}] cos and sin must not require grad in place (their gradient needs the "
            "overwritten values) but got a table that does"
        )
    _library.refuse_negated(op, "a tensor written in place", *targets)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in targets)
    compiling = torch.compiler.is_compiling()
    if is_plain(*targets) or (compiling and not recorded):
        _library.write(getattr(ops, op), (*targets, *rest), *targets)
    elif compiling or is_transformed() or forward_ad._current_level >= 0:
        # copy_ is what the compiler, the transforms and forward-mode duals follow.
        turn = ops.rope if compiling else functools.partial(_formula, op=op)
        rotated = [turn(target, *rest) for target in targets]  # all, before the first write
        for target, result in zip(targets, rotated, strict=True):
            target.copy_(result)
    else:
        for target in targets:
            _require_writable(op, target)
        if len(targets) == 2:
            ops.rope_qk_check(*targets, *rest)
        for target in targets:
            _RopeInPlace.apply(target, *rest)  # type: ignore[no-untyped-call]


def _require_writable(op: str, target: Tensor) -> None:
    """PyTorch refuses these as well, but only after a custom function has written."""
    if not target.requires_grad:
        return
    base = target._base if target._is_view() else target
    if base is not None and base.is_leaf and base.requires_grad:
        raise RuntimeError(
            f"[{op}] a tensor written in place must not be a leaf that requires grad, or a view of "
            f"one, but got such a tensor of shape {list(target.shape)}"
        )
    kind = torch._C._autograd._get_creation_meta(target) if target._is_view() else None
    if kind not in (None, torch._C._autograd.CreationMeta.DEFAULT):
        raise RuntimeError(
            f"[{op}] a tensor written in place must not be one of several views made by one call "
            f"(unbind, split, chunk), or made under no_grad, but got {kind}"
        )


# Registration.


def _differentiable(x: Tensor, *rest: Any) -> Tensor:
    return _Rope.apply(x, *rest)  # type: ignore[no-untyped-call]


def _differentiable_qk(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return ops.rope(q, *rest), ops.rope(k, *rest)


def _fake(x: Tensor, *rest: Any, op: str = "rope", name: str = "x") -> Tensor:
    # Sizes of a trace may be symbols, which a check would pin: there the kernel checks, later.
    if not isinstance(x, FakeTensor):
        _require(op, name, x, *rest[:5])
    return torch.empty_like(x)


def _fake_qk(q: Tensor, k: Tensor, *rest: Any, op: str = "rope_qk") -> tuple[Tensor, Tensor]:
    return _fake(q, *rest, op=op, name="q"), _fake(k, *rest, op=op, name="k")


def _fake_written(x: Tensor, *rest: Any) -> None:
    _fake(x, *rest, op="rope_")


def _fake_written_qk(q: Tensor, k: Tensor, *rest: Any) -> None:
    _fake_qk(q, k, *rest, op="rope_qk_")


def _fake_out(x: Tensor, *rest: Any) -> None:
    _fake(x, *rest)
    _require_out(x, rest[-1])


def _copy_formula(x: Tensor, *rest: Any) -> None:
    x.copy_(_formula(x, *rest, op="rope_"))


def _copy_formula_qk(q: Tensor, k: Tensor, *rest: Any) -> None:
    rotated = _formula_qk(q, k, *rest, op="rope_qk_")
    q.copy_(rotated[0])
    k.copy_(rotated[1])


def _check_formula_qk(q: Tensor, k: Tensor, *rest: Any) -> None:
    for name, x in (("q", q), ("k", k)):
        _require("rope_qk_", name, x, *rest[:5])


def _require_out(x: Tensor, out: Tensor) -> None:
    for attribute in ("dtype", "shape"):  # copy_ would convert and broadcast
        got, expected = getattr(out, attribute), getattr(x, attribute)
        if got != expected:
            raise RuntimeError(f"[rope] out must have x's {attribute} {expected} but got {got}")


def _out_formula(x: Tensor, *rest: Any) -> None:
    *rest_of_call, out = rest
    _require_out(x, out)
    out.copy_(_formula(x, *rest_of_call))


for _name, _shape, _composed in (
    ("rope", _fake, _formula),
    ("rope_nograd", _fake, _formula),
    ("rope_unfused", _fake, _formula),
    ("rope_qk", _fake_qk, _formula_qk),
    ("rope_qk_nograd", _fake_qk, _formula_qk),
    ("rope_", _fake_written, _copy_formula),
    ("rope__nograd", _fake_written, _copy_formula),
    ("rope_qk_", _fake_written_qk, _copy_formula_qk),
    ("rope_qk__nograd", _fake_written_qk, _copy_formula_qk),
    ("rope_qk_check", _fake_written_qk, _check_formula_qk),
    ("rope_out", _fake_out, _out_formula),
    ("rope_out_nograd", _fake_out, _out_formula),
):
    _library.register_fake(_name, _shape)
    _library.register_fallback(_name, _composed)
for _name in ("rope_", "rope_qk_", "rope_out"):
    _library.register_write(_name)
_library.register_autograd("rope", _differentiable, ops.rope_nograd, _formula)
_library.register_autograd("rope_qk", _differentiable_qk, ops.rope_qk_nograd, _formula_qk)
