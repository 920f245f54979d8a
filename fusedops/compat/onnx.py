"""ONNX: ``RotaryEmbedding`` of ai.onnx (opset 23) and of com.microsoft, for torch tensors.

Inputs are positional and attributes are keywords, in each operator's own order: **com.microsoft has
position_ids second.** The names are those of ``torch.onnx.ops.rotary_embedding``.
"""

from __future__ import annotations

from torch import Tensor

from fusedops.compat._tables import accepted, need
from fusedops.ops import rope

__all__ = ["microsoft_rotary_embedding", "rotary_embedding"]


def rotary_embedding(
    X: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """``ai.onnx.RotaryEmbedding``, opset 23.

    Args:
        X: [B, num_heads, S, D], or [B, S, num_heads * D] with num_heads.
        cos_cache: [positions, r / 2] with position_ids, otherwise [B, S, r / 2].
        sin_cache: like cos_cache.
        position_ids: [B, S].
        interleaved: pairs are neighbours.
        num_heads: of an X with three dimensions.
        rotary_embedding_dim: r; 0 is D.

    Raises:
        RuntimeError: what the operator's checker refuses, and as :func:`fusedops.rope`.
    """
    op = "onnx.rotary_embedding"
    rank = 3 if position_ids is None else 2
    for name, cache in (("cos_cache", cos_cache), ("sin_cache", sin_cache)):
        dims = (
            f"{name} must have {rank} dimensions {'without' if rank == 3 else 'with'} position_ids"
        )
        need(cache.dim() == rank, op, dims, f"shape {[*cache.shape]}")
    caches = cos_cache, sin_cache
    return _apply(op, X, *caches, position_ids, 0, interleaved, num_heads, rotary_embedding_dim)


def microsoft_rotary_embedding(
    input: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: bool = False,
    is_packed_batching: bool = False,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """``com.microsoft.RotaryEmbedding``, version 1.

    Args:
        input: [B, num_heads, S, D], or [B, S, num_heads * D]; num_heads of 0 means heads of
            twice the caches' width.
        position_ids: [B, S]; or one number, the position of the first token.
        cos_cache: [positions, r / 2].
        sin_cache: like cos_cache.
        interleaved: pairs are neighbours.
        is_packed_batching: refused.
        num_heads: of an input with three dimensions.
        rotary_embedding_dim: r; 0 is D. Needs num_heads.
        scale: anything but 1 is refused: ONNX Runtime's CPU kernel reads it and does not apply it.

    Raises:
        RuntimeError: what is refused, and as :func:`fusedops.rope`.
    """
    op = "onnx.microsoft_rotary_embedding"
    need(not is_packed_batching, op, "is_packed_batching must be False", is_packed_batching)
    need(scale == 1.0, op, "scale must be 1", scale)
    given = rotary_embedding_dim == 0 or num_heads > 0
    need(given, op, "num_heads must be given with rotary_embedding_dim", num_heads)
    offset: int | Tensor = 0
    ids: Tensor | None = position_ids
    if position_ids.dim() < 2 and position_ids.numel() == 1:
        ids, offset = None, position_ids.reshape(1).expand(input.shape[0])
    if input.dim() == 3 and num_heads == 0 and cos_cache.shape[-1] > 0:
        num_heads = input.shape[-1] // (2 * cos_cache.shape[-1])
    caches = cos_cache, sin_cache
    return _apply(op, input, *caches, ids, offset, interleaved, num_heads, rotary_embedding_dim)


def _apply(
    op: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offset: int | Tensor,
    interleaved: bool,
    num_heads: int,
    rotary: int,
) -> Tensor:
    need(x.dim() in (3, 4), op, "X must have 3 or 4 dimensions", f"shape {[*x.shape]}")
    by_head = x
    if x.dim() == 3:
        need(num_heads > 0, op, "num_heads must be given with a 3-D X", num_heads)
        whole = f"X must hold {num_heads} heads"
        need(x.shape[-1] % num_heads == 0, op, whole, f"shape {[*x.shape]}")
        by_head = x.view(*x.shape[:-1], num_heads, -1)
    rotary = rotary or by_head.shape[-1]
    columns = f"cos_cache and sin_cache must have rotary_embedding_dim / 2 = {rotary // 2} columns"
    need(2 * cos.shape[-1] == rotary, op, columns, cos.shape[-1])
    cos, sin = accepted(x, cos, sin)
    y = rope(
        by_head,
        cos,
        sin,
        position_ids,
        offset=offset,
        layout="bshd" if x.dim() == 3 else "bhsd",
        interleaved=bool(interleaved),
    )
    return y.flatten(-2) if x.dim() == 3 else y
