"""The position of every token, where it comes from sequence boundaries or per-sequence offsets."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["positions"]

_INTEGERS = (torch.int32, torch.int64)


def positions(
    op: str,
    x: Tensor,
    bshd: bool,
    position_ids: Tensor | None,
    offset: Any,
    cu_seqlens: Any,
    max_seqlen: Any,
) -> tuple[Tensor | None, int]:
    """``position_ids`` and the integer offset that say the same to the kernel.

    A tensor offset has one number per sequence; cu_seqlens are the boundaries of sequences that
    lie one behind the other along the tokens of x. Values are checked except while compiling, where
    they are not known: there the kernel still refuses every position outside the table.
    """
    if not isinstance(offset, (Tensor, int, torch.SymInt)) and not hasattr(offset, "__index__"):
        raise RuntimeError(f"[{op}] offset must be an integer or a tensor but got {offset!r}")
    if cu_seqlens is None and not isinstance(offset, Tensor):
        if max_seqlen is not None:
            raise RuntimeError(f"[{op}] max_seqlen must come with cu_seqlens but got {max_seqlen}")
        return position_ids, offset
    if x.dim() not in (3, 4):
        raise RuntimeError(f"[{op}] x must have 3 or 4 dimensions but got shape {[*x.shape]}")
    batch, tokens = x.shape[0] if x.dim() == 4 else 1, x.shape[-3 if bshd else -2]
    if cu_seqlens is None:
        _require_offsets(op, x, offset, batch, "batch")
        if position_ids is None:
            position_ids = torch.arange(tokens, device=x.device)
        return position_ids + offset.unsqueeze(1), 0
    if position_ids is not None:
        raise RuntimeError(f"[{op}] position_ids must be None with cu_seqlens but got a tensor")
    _require_boundaries(op, x, cu_seqlens, max_seqlen, batch, tokens)
    token = torch.arange(tokens, dtype=cu_seqlens.dtype, device=x.device)
    sequence = torch.bucketize(token, cu_seqlens[1:], right=True)
    ids = token - cu_seqlens[sequence]
    if not isinstance(offset, Tensor):
        return ids, offset
    _require_offsets(op, x, offset, cu_seqlens.shape[0] - 1, "sequences")
    return ids + offset[sequence], 0


def _require_offsets(op: str, x: Tensor, offset: Tensor, count: int, of: str) -> None:
    if offset.dtype not in _INTEGERS:
        raise RuntimeError(f"[{op}] a tensor offset must be int32 or int64 but got {offset.dtype}")
    if offset.dim() != 1 or offset.shape[0] != count:
        raise RuntimeError(
            f"[{op}] a tensor offset must be [{of}] = [{count}] but got shape {[*offset.shape]}"
        )
    _require_device(op, "a tensor offset", x, offset)


def _require_device(op: str, name: str, x: Tensor, given: Tensor) -> None:
    if given.device != x.device:
        raise RuntimeError(f"[{op}] {name} must be on x's device {x.device} but got {given.device}")


def _require_boundaries(
    op: str, x: Tensor, cu_seqlens: Any, max_seqlen: Any, batch: int, tokens: int
) -> None:
    def need(met: bool, requirement: str, got: Any) -> None:
        if not met:
            raise RuntimeError(f"[{op}] {requirement} but got {got}")

    if not isinstance(cu_seqlens, Tensor):
        need(False, "cu_seqlens must be a tensor [sequences + 1]", repr(cu_seqlens))
    need(batch == 1, "x must hold one row of tokens ([T, H, D]) with cu_seqlens", f"batch {batch}")
    need(cu_seqlens.dtype in _INTEGERS, "cu_seqlens must be int32 or int64", cu_seqlens.dtype)
    shaped = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 1
    need(shaped, "cu_seqlens must be [sequences + 1]", f"shape {[*cu_seqlens.shape]}")
    _require_device(op, "cu_seqlens", x, cu_seqlens)
    number = max_seqlen is None or isinstance(max_seqlen, (int, torch.SymInt))
    need(number, "max_seqlen must be an int or None", max_seqlen)
    if torch.compiler.is_compiling() or cu_seqlens.is_meta or isinstance(cu_seqlens, FakeTensor):
        return
    bounds = cu_seqlens.tolist()
    ends = f"cu_seqlens must start at 0 and end at the number of tokens {tokens}"
    need(bounds[0] == 0 and bounds[-1] == tokens, ends, f"{bounds[0]} and {bounds[-1]}")
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    need(min(lengths) >= 0, "cu_seqlens must not decrease", bounds)
    if max_seqlen is not None:
        longest = max(lengths)
        need(max_seqlen >= longest, f"max_seqlen must be at least {longest}", max_seqlen)
