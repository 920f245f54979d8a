"""lucidrains' rotary-embedding-torch: **angles**, every column twice; neighbours are pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedops.compat._tables import evens, need, rotate

__all__ = ["apply_rotary_emb", "rotate_queries_or_keys"]


def apply_rotary_emb(
    freqs: Tensor,
    t: Tensor,
    start_index: int = 0,
    scale: float | Tensor = 1.0,
    seq_dim: int = -2,
    freqs_seq_dim: int | None = None,
) -> Tensor:
    """Rotate ``t[..., start_index : start_index + r]`` by the angles freqs.

    Computed in float32 and rounded once, as theirs where freqs are float32.

    Args:
        freqs: angles, [..., r] with each column twice, broadcasting against t. Where t has three
            dimensions, freqs has two, or freqs_seq_dim is given, its last rows are taken, as many
            as t has along seq_dim.
        t: what is rotated, [..., S, D].
        start_index: the first element of a head that takes part.
        scale: of the result (xPos), a number or a tensor like freqs.
        seq_dim: where the tokens are in t.
        freqs_seq_dim: and in freqs.

    Raises:
        RuntimeError: columns of freqs that do not come twice, r larger than the head, freqs that
            do not broadcast.
    """
    op = "lucidrains.apply_rotary_emb"
    rotary = freqs.shape[-1]
    room = f"freqs must have at most {t.shape[-1] - start_index} columns"
    need(start_index + rotary <= t.shape[-1], op, room, rotary)
    if freqs_seq_dim is None and (freqs.dim() == 2 or t.dim() == 3):
        freqs_seq_dim = 0
    if freqs_seq_dim is not None:
        rows = min(t.shape[seq_dim], freqs.shape[freqs_seq_dim])
        freqs = freqs.narrow(freqs_seq_dim, freqs.shape[freqs_seq_dim] - rows, rows)
    # Every angle, though half of them would do: where the cosine of one lies in memory may decide
    # its last bit, and the result is to have theirs.
    cos, sin = freqs.float().cos() * scale, freqs.float().sin() * scale
    cos, sin = evens(op, t, cos, sin)
    if start_index == 0:
        return rotate(op, t, cos, sin, interleaved=True)
    head, tail = t[..., :start_index], t[..., start_index:]
    return torch.cat((head, rotate(op, tail, cos, sin, interleaved=True)), dim=-1)


def rotate_queries_or_keys(
    self: Any,
    t: Tensor,
    seq_dim: int | None = None,
    offset: int = 0,
    scale: float | Tensor | None = None,
) -> Tensor:
    """The method of ``rotary_embedding_torch.RotaryEmbedding``; assign it to the class, or call it.

    Positions are float32 also where t is bfloat16 or float16: theirs take t's dtype, and so
    bfloat16 loses every second position above 256.

    Args:
        self: a RotaryEmbedding.
        t: [..., S, D]; [..., S, H, D] with seq_dim -3.
        seq_dim: -2 or -3; the default is the module's.
        offset: position of the first token.
        scale: of the result; needed where the module does xPos.

    Raises:
        RuntimeError: a module that does xPos, without scale; and as :func:`apply_rotary_emb`.
    """
    op = "lucidrains.rotate_queries_or_keys"
    xpos = not self.use_xpos or scale is not None
    need(xpos, op, "scale must be given with xPos (rotate_queries_and_keys does both)", None)
    seq_dim = self.default_seq_dim if seq_dim is None else seq_dim
    tokens = t.shape[seq_dim]
    seq = self.get_seq_pos(tokens, device=t.device, dtype=torch.float32, offset=offset)
    freqs = self.forward(seq, seq_len=tokens, offset=offset)
    if seq_dim == -3:
        freqs = freqs.unsqueeze(-2)
    return apply_rotary_emb(freqs, t, scale=1.0 if scale is None else scale, seq_dim=seq_dim)
