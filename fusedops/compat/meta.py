"""Meta's Llama code: ``apply_rotary_emb`` by complex numbers. Neighbours are pairs."""

from __future__ import annotations

from torch import Tensor

from fusedops.compat._tables import need, rotate
from fusedops.ops import rope_qk

__all__ = ["apply_rotary_emb"]


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply pairs of neighbours, as complex numbers, by freqs_cis.

    Args:
        xq: [B, S, H, D]; computed in float32 and rounded once, as theirs.
        xk: like xq, any number of heads.
        freqs_cis: complex, ``cos + i sin``: [S, D / 2] (Llama 2 and 3), [B, S, D / 2] (Llama 4),
            or with an axis of size one for the heads.

    Raises:
        RuntimeError: freqs_cis of another shape or not complex, and as :func:`fusedops.rope_qk`.
    """
    op = "meta.apply_rotary_emb"
    need(freqs_cis.is_complex(), op, "freqs_cis must be complex", freqs_cis.dtype)
    columns = f"freqs_cis must have {xq.shape[-1] // 2} columns"
    need(2 * freqs_cis.shape[-1] == xq.shape[-1], op, columns, freqs_cis.shape[-1])
    cos, sin = freqs_cis.real.float(), freqs_cis.imag.float()
    if freqs_cis.dim() == 4:
        q, k = (rotate(op, x, cos, sin, interleaved=True) for x in (xq, xk))
        return q, k
    rows = f"freqs_cis must have a row for each of {xq.shape[1]} tokens"
    need(freqs_cis.shape[-2] == xq.shape[1], op, rows, f"shape {[*freqs_cis.shape]}")
    return rope_qk(xq, xk, cos, sin, layout="bshd", interleaved=True)
