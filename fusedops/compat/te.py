"""TransformerEngine: ``apply_rotary_pos_emb``, which takes **angles**, not their cosines."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedops.compat._tables import evens, first_half, need
from fusedops.ops import rope

__all__ = ["apply_rotary_pos_emb"]


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Rotate t by the angles freqs; cosines and the result are computed in float32.

    Args:
        t: [S, B, H, D] (``tensor_format="sbhd"``), [B, S, H, D] ("bshd") or [T, H, D] ("thd").
        freqs: angles, [positions, 1, 1, r]: each row repeats its first half, or, interleaved, has
            each column twice.
        tensor_format: of t.
        start_positions: integers, one per sequence, added to its positions. Not with cp_size > 1.
        interleaved: pairs are neighbours.
        fused: ignored: it is.
        cu_seqlens: integers [sequences + 1], the boundaries of all ranks' sequences together;
            needed for "thd".
        cp_size: ranks that share each sequence. It is cut into 2 * cp_size pieces, of which t holds
            number cp_rank from the front and from the back.
        cp_rank: which of the ranks this is.

    Raises:
        RuntimeError: arguments that contradict each other, angles that do not repeat, sequences
            that cannot be cut, and as :func:`fusedops.rope`.
    """
    op = "te.apply_rotary_pos_emb"
    formats = "tensor_format must be 'sbhd', 'bshd' or 'thd'"
    need(tensor_format in ("sbhd", "bshd", "thd"), op, formats, repr(tensor_format))
    alone = cp_size == 1 or start_positions is None
    need(alone, op, "start_positions must be None with cp_size > 1", "a tensor")
    packed = tensor_format == "thd"
    if packed and cu_seqlens is None:
        raise RuntimeError(f"[{op}] cu_seqlens must be given with 'thd' but got None")
    rows = freqs.dim() == 4 and freqs.shape[1:3] == (1, 1)
    need(rows, op, "freqs must be [positions, 1, 1, r]", f"shape {[*freqs.shape]}")

    x = t.transpose(0, 1) if tensor_format == "sbhd" else t
    bounds = cu_seqlens if packed else None
    angles = freqs[:, 0, 0].float()
    if start_positions is None and not packed and cp_size == 1:
        angles = angles[: x.shape[1]]
    angles, _ = (evens if interleaved else first_half)(op, x, angles, angles)
    angles = angles.contiguous()
    ids = None
    if cp_size > 1:
        ids, bounds = _positions_of_rank(op, x.shape[-3], bounds, cp_size, cp_rank, t.device), None
    y = rope(
        x,
        angles.cos(),
        angles.sin(),
        ids,
        offset=0 if start_positions is None else start_positions,
        cu_seqlens=bounds,
        layout="bshd",
        interleaved=interleaved,
    )
    return y.transpose(0, 1) if tensor_format == "sbhd" else y


def _positions_of_rank(
    op: str,
    tokens: int,
    cu_seqlens: Tensor | None,
    size: int,
    rank: int,
    device: torch.device,
) -> Tensor:
    """Of each token of this rank: first the piece from the front, then the one from the back."""
    need(0 <= rank < size, op, f"cp_rank must be in [0, {size})", rank)
    index = torch.arange(tokens, device=device)
    local: int | Tensor = tokens
    if cu_seqlens is None:
        need(tokens % 2 == 0, op, "a sequence must have an even number of tokens", tokens)
    else:
        lengths = cu_seqlens.diff()
        if not torch.compiler.is_compiling():
            last = int(cu_seqlens[-1])
            ends = f"cu_seqlens must end at {tokens} tokens times {size} ranks"
            need(last == tokens * size, op, ends, last)
            cut = f"sequences must be multiples of 2 * cp_size = {2 * size}"
            need(not bool((lengths % (2 * size)).any()), op, cut, lengths.tolist())
        begins = cu_seqlens // size
        sequence = torch.bucketize(index, begins[1:], right=True)
        index, local = index - begins[sequence], (lengths // size)[sequence]
    piece = local // 2
    front, back = rank * piece + index, size * local - (rank + 2) * piece + index
    return torch.where(index < piece, front, back)
