"""Intel Extension for PyTorch: ``ipex.llm.functional.rotary_embedding``. sin comes first."""

from __future__ import annotations

from torch import Tensor

from fusedops.compat._tables import accepted, first_half, need
from fusedops.ops import rope_qk_

__all__ = ["rotary_embedding"]


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    sin: Tensor,
    cos: Tensor,
    rotary_dim: int,
    rotary_half: bool,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate query and key in place, as IPEX does, and return them.

    Args:
        query: [B, S, H, D] or [T, H, D].
        key: like query, any number of heads.
        sin: **before cos**: rows of rotary_dim elements, the second half repeating the first, or
            of rotary_dim / 2; axes of size one between are fine.
        cos: like sin.
        rotary_dim: how many elements of a head take part.
        rotary_half: pairs are j and j + rotary_dim / 2; otherwise neighbours. Rows repeat halves
            either way.
        position_ids: [B, S]; the default is 0, 1, 2, ...

    Raises:
        RuntimeError: tables of another width, and as :func:`fusedops.rope_qk_`.
    """
    op = "ipex.rotary_embedding"
    width = cos.shape[-1]
    widths = f"sin and cos must have {rotary_dim} or {rotary_dim // 2} columns"
    need(2 * width in (rotary_dim, 2 * rotary_dim), op, widths, width)
    cos, sin = (t.reshape(-1, t.shape[-1]) for t in (cos, sin))
    if width == rotary_dim:
        cos, sin = first_half(op, query, cos, sin)
    cos, sin = accepted(query, cos, sin)
    if position_ids is not None and query.dim() == 3:
        position_ids = position_ids.reshape(-1)
    form = {"layout": "bshd", "interleaved": not rotary_half}
    return rope_qk_(query, key, cos, sin, position_ids, **form)  # type: ignore[arg-type]
