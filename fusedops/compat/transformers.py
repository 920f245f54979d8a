"""Hugging Face transformers: ``apply_rotary_pos_emb`` of its model files.

Its tables are full width: [B or 1, S, D], every row written twice, attention scaling multiplied in.
They come in as strided views of one half, without a copy.

The models do not agree on what a pair is, though their functions have one name:
    apply_rotary_pos_emb: element j and j + D/2, rows [a, b, a, b]: Llama and most others.
    apply_rotary_pos_emb_glm: neighbours, rows [a, b, a, b]: GLM, Helium, ERNIE 4.5, Moonshine.
    apply_rotary_pos_emb_cohere: neighbours, rows [a, a, b, b]: Cohere, BLT, EfficientLoFTR.
    apply_rotary_pos_emb_interleave: neighbours, rows [a, b, a, b], and the result is sorted into
        halves: DeepSeek-V3 and its kin.
A table of the wrong kind is refused, except in a compiled or transformed call, where values are not
known. Unlike transformers' own, every function rounds once where q is float16 or bfloat16, and
returns q's dtype also where the tables are wider. rotary_dim < D leaves the tail as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedops.compat import _tables
from fusedops.ops import rope_qk

__all__ = [
    "apply_rotary_pos_emb",
    "apply_rotary_pos_emb_cohere",
    "apply_rotary_pos_emb_glm",
    "apply_rotary_pos_emb_interleave",
    "apply_rotary_pos_emb_vision",
]

_LAYOUTS = {1: "bhsd", -3: "bhsd", 2: "bshd", -2: "bshd"}


def apply_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | int | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """``q * cos + rotate_half(q) * sin``, and k.

    Args:
        q: [B, H, S, D] (``unsqueeze_dim=1``) or [B, S, H, D] (2).
        k: like q; fewer heads are fine.
        cos: [B or 1, S, r], or [P, r] with position_ids; both halves of a row are the same.
        sin: like cos.
        position_ids: rows to take of tables [P, r] (transformers before 4.36); otherwise ignored,
            as there. An int is unsqueeze_dim, which transformers 5 has in its place.
        unsqueeze_dim: where the heads are.

    Raises:
        RuntimeError: the halves of the tables differ, and as :func:`fusedops.rope_qk`.
    """
    op = "transformers.apply_rotary_pos_emb"
    halves = _tables.first_half(op, q, cos, sin)
    return _apply(op, q, k, *halves, position_ids, unsqueeze_dim, interleaved=False)


def apply_rotary_pos_emb_glm(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | int | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb`` of models that pair neighbours and repeat halves: GLM, Helium.

    Arguments and errors as for :func:`apply_rotary_pos_emb`.
    """
    op = "transformers.apply_rotary_pos_emb_glm"
    halves = _tables.first_half(op, q, cos, sin)
    return _apply(op, q, k, *halves, position_ids, unsqueeze_dim, interleaved=True)


def apply_rotary_pos_emb_cohere(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | int | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb`` of models that pair neighbours and repeat columns: Cohere.

    Arguments and errors as for :func:`apply_rotary_pos_emb`, but each column of cos and sin is
    there twice, side by side.
    """
    op = "transformers.apply_rotary_pos_emb_cohere"
    halves = _tables.evens(op, q, cos, sin)
    return _apply(op, q, k, *halves, position_ids, unsqueeze_dim, interleaved=True)


def apply_rotary_pos_emb_interleave(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | int | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb`` of ``(x[0], x[2], ..., x[1], x[3], ...)``: DeepSeek-V3.

    The result stays in that order, of which a copy is made. Arguments and errors as for
    :func:`apply_rotary_pos_emb`.
    """
    op = "transformers.apply_rotary_pos_emb_interleave"
    halves = _tables.first_half(op, q, cos, sin)
    q, k = (torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1) for x in (q, k))
    return _apply(op, q, k, *halves, position_ids, unsqueeze_dim, interleaved=False)


def apply_rotary_pos_emb_vision(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """The vision towers' function: q and k [..., S, H, D], cos and sin [..., S, D].

    Pairs are j and j + D/2. Computed in float32 and rounded once, as theirs. Errors as for
    :func:`apply_rotary_pos_emb`.
    """
    op = "transformers.apply_rotary_pos_emb_vision"
    cos, sin = _tables.first_half(op, q, cos, sin)
    if cos.dim() == 2 and q.dim() == 3:
        _tables.need(
            cos.shape[0] == q.shape[0], op, f"cos must have {q.shape[0]} rows", cos.shape[0]
        )
        return rope_qk(q, k, *_tables.accepted(q, cos, sin), layout="bshd")
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _tables.rotate(op, q, cos, sin), _tables.rotate(op, k, cos, sin)


def _apply(
    op: str,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | int | None,
    unsqueeze_dim: int,
    *,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    if isinstance(position_ids, int):
        unsqueeze_dim, position_ids = position_ids, None
    _tables.need(unsqueeze_dim in _LAYOUTS, op, "unsqueeze_dim must be 1 or 2", unsqueeze_dim)
    if cos.dim() == 3:
        position_ids = None
    elif position_ids is None:  # theirs would take two dimensions for [heads, r] or [S, r]
        three = "cos must be [B, S, r] without position_ids"
        raise RuntimeError(f"[{op}] {three} but got shape {[*cos.shape]}")
    cos, sin = _tables.accepted(q, cos, sin)
    layout = _LAYOUTS[unsqueeze_dim]
    return rope_qk(q, k, cos, sin, position_ids, layout=layout, interleaved=interleaved)
