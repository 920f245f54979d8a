"""flash-attention: the functions and the module of ``flash_attn.layers.rotary``.

Tables are half width, [positions, r / 2]; x is [B, S, H, D], or [T, H, D] with cu_seqlens. Where
flash-attention leaves a token whose position is outside the table as it is, these raise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedops.compat._tables import accepted, need
from fusedops.ops import rope, rope_, rope_qk_

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate x, [B, S, H, D] or, with cu_seqlens, [T, H, D]; into x itself if inplace.

    Args:
        x: what is rotated.
        cos: [positions, r / 2].
        sin: like cos.
        interleaved: pairs are neighbours.
        inplace: write x and return it.
        seqlen_offsets: added to the positions; an int, or int32 or int64 [B], one per sequence.
        cu_seqlens: [sequences + 1], where each sequence begins in T; the last is T.
        max_seqlen: of the longest sequence.

    Raises:
        RuntimeError: as :func:`fusedops.rope`, also for positions outside the table.
    """
    cos, sin = accepted(x, cos, sin)
    return (rope_ if inplace else rope)(
        x,
        cos,
        sin,
        offset=seqlen_offsets,
        cu_seqlens=cu_seqlens,
        max_seqlen=None if cu_seqlens is None else max_seqlen,
        layout="bshd",
        interleaved=interleaved,
    )


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """Rotate x, [B, S, H, D], by tables [S, r / 2] or [B, S, r / 2]."""
    return rope(x, *accepted(x, cos, sin), layout="bshd", interleaved=interleaved)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate the queries and keys of qkv in place; returns qkv.

    Args:
        qkv: [B, S, 3, H, D], or [B, S, H_q + 2 H_k, D] with num_heads_q.
        cos: [positions, r / 2].
        sin: like cos.
        cos_k: the same for keys (xPos); default cos.
        sin_k: the same for keys; default sin.
        interleaved: pairs are neighbours.
        seqlen_offsets: int, or [B].
        num_heads_q: of a qkv with four dimensions.

    Raises:
        RuntimeError: shapes that do not fit, and as :func:`fusedops.rope_qk_`.
    """
    op = "flash_attn.apply_rotary_emb_qkv_"
    q, k = _queries_and_keys(op, qkv, num_heads_q)
    cos, sin = accepted(qkv, cos, sin)
    cos_k, sin_k = accepted(qkv, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
    if cos_k is cos and sin_k is sin and not (torch.is_grad_enabled() and qkv.requires_grad):
        rope_qk_(q, k, cos, sin, offset=seqlen_offsets, layout="bshd", interleaved=interleaved)
    else:  # one view of qkv after the other: autograd follows that
        rope_(q, cos, sin, offset=seqlen_offsets, layout="bshd", interleaved=interleaved)
        _, k = _queries_and_keys(op, qkv, num_heads_q)
        rope_(k, cos_k, sin_k, offset=seqlen_offsets, layout="bshd", interleaved=interleaved)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotate the keys of kv, [B, S, 2, H, D], in place; returns kv.

    Tables, seqlen_offsets and errors as for :func:`apply_rotary_emb_qkv_`.
    """
    op = "flash_attn.apply_rotary_emb_kv_"
    packed = kv.dim() == 5 and kv.shape[2] == 2
    need(packed, op, "kv must be [B, S, 2, H, D]", f"shape {[*kv.shape]}")
    cos, sin = accepted(kv, cos, sin)
    rope_(kv[:, :, 0], cos, sin, offset=seqlen_offsets, layout="bshd", interleaved=interleaved)
    return kv


def _queries_and_keys(op: str, qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    if qkv.dim() == 5:
        three = "a qkv with 5 dimensions must be [B, S, 3, H, D]"
        need(qkv.shape[2] == 3, op, three, f"shape {[*qkv.shape]}")
        return qkv[:, :, 0], qkv[:, :, 1]
    need(qkv.dim() == 4, op, "qkv must have 4 or 5 dimensions", f"shape {[*qkv.shape]}")
    if num_heads_q is None:
        raise RuntimeError(f"[{op}] num_heads_q must be given with a 4-D qkv but got None")
    heads = qkv.shape[2] - num_heads_q
    even = f"qkv must hold {num_heads_q} + 2 H_k heads"
    need(heads >= 0 and heads % 2 == 0, op, even, qkv.shape[2])
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + heads // 2]


class RotaryEmbedding(nn.Module):
    """Rotates qkv, or q and kv, in place by tables of ``base ** (-2 j / dim)`` that it keeps.

    The tables are float32, where flash-attention rounds them to the dtype of qkv, and grow with the
    longest sequence seen. With scale_base (xPos) they are centred on half of that length, as there:
    a table that grows while keys are cached no longer fits them, so pass max_seqlen from the start.

    Args:
        dim: how many elements of a head take part; even.
        base: of the frequencies.
        interleaved: pairs are neighbours.
        scale_base: of xPos, in tokens; None for none.
        device: ignored: tables are made where qkv is.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: object = None,
    ) -> None:
        super().__init__()
        op = "flash_attn.RotaryEmbedding"
        need(dim > 0 and dim % 2 == 0, op, "dim must be positive and even", dim)
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self._rows = 0
        self._q: tuple[Tensor, Tensor] | None = None
        self._k: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate queries and keys in place; returns qkv, or qkv and kv.

        Args:
            qkv: [B, S, 3, H, D], or [B, S, H_q + 2 H_k, D] with num_heads_q; with kv the queries
                alone, [B, S, H, D].
            kv: [B, S, 2, H, D].
            seqlen_offset: int, or integers [B].
            max_seqlen: rows of the tables; needed before the first offset that is a tensor.
            num_heads_q: of a qkv with four dimensions.

        Raises:
            RuntimeError: an offset that is a tensor and no tables yet, and as
                :func:`apply_rotary_emb_qkv_`.
        """
        if max_seqlen is not None:
            self._grow(max_seqlen, qkv.device)
        elif not isinstance(seqlen_offset, Tensor):
            self._grow(qkv.shape[1] + seqlen_offset, qkv.device)
        if self._q is None or self._k is None:
            raise RuntimeError(
                "[flash_attn.RotaryEmbedding] max_seqlen must be given with the first offset that "
                "is a tensor but got None"
            )
        if kv is None:
            cos_k, sin_k = (None, None) if self._k is self._q else self._k
            return apply_rotary_emb_qkv_(
                qkv, *self._q, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, *self._q, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, *self._k, self.interleaved, seqlen_offset)

    def _grow(self, rows: int, device: torch.device) -> None:
        if self._q is not None and rows <= self._rows and self._q[0].device == device:
            return
        self._rows = rows
        # Tables made in a call under inference_mode must serve training as well.
        with torch.inference_mode(False), torch.no_grad():
            even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
            tokens = torch.arange(rows, device=device, dtype=torch.float32)
            phase = torch.outer(tokens, 1.0 / self.base ** (even / self.dim))
            cos, sin = phase.cos(), phase.sin()
            self._q = self._k = cos, sin
            if self.scale_base is not None:
                zeta = (even + 0.4 * self.dim) / (1.4 * self.dim)
                decay = zeta ** ((tokens - rows // 2) / self.scale_base).unsqueeze(-1)
                self._q, self._k = (cos * decay, sin * decay), (cos / decay, sin / decay)
