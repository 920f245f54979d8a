"""vLLM (and SGLang): ``rotary_embedding`` of ``vllm._custom_ops``, in place."""

from __future__ import annotations

from torch import Tensor

from fusedops.compat._tables import accepted, need
from fusedops.ops import rope_, rope_qk_

__all__ = ["rotary_embedding"]


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """Rotate query and key in place; returns nothing.

    Args:
        positions: int32 or int64, [T] or [B, S].
        query: [T, H * head_size] or [T, H, head_size]; [B, S, ...] with positions [B, S]; any
            strides.
        key: like query, any number of heads; or None.
        head_size: D.
        cos_sin_cache: [P, r]: cosines in the first half of a row, sines in the second.
        is_neox: pairs are j and j + r / 2; otherwise neighbours.
        rope_dim_offset: the first element of a head that takes part.
        inverse: turn by the opposite angle.

    Raises:
        RuntimeError: shapes that do not fit, and as :func:`fusedops.rope_qk_`: also for positions
            outside the cache, which vLLM reads regardless.
    """
    op = "vllm.rotary_embedding"
    two = cos_sin_cache.dim() == 2 and cos_sin_cache.shape[1] % 2 == 0
    need(two, op, "cos_sin_cache must be [P, r] with even r", f"shape {[*cos_sin_cache.shape]}")
    cos, sin = accepted(query, *cos_sin_cache.chunk(2, dim=-1))
    form = {"layout": "bshd", "interleaved": not is_neox, "conjugate": inverse}
    q = _by_head(op, "query", query, positions, head_size)[..., rope_dim_offset:]
    ids = positions if q.dim() == 4 else positions.reshape(-1)
    if key is None:
        rope_(q, cos, sin, ids, **form)  # type: ignore[arg-type]
        return
    k = _by_head(op, "key", key, positions, head_size)[..., rope_dim_offset:]
    rope_qk_(q, k, cos, sin, ids, **form)  # type: ignore[arg-type]


def _by_head(op: str, name: str, x: Tensor, positions: Tensor, head_size: int) -> Tensor:
    """A view [T, H, D] or [B, S, H, D] of x."""
    flat = x.dim() == positions.dim() + 1 or (x.dim() == 2 and positions.dim() == 2)
    if flat:
        whole = f"{name} must hold whole heads of {head_size}"
        need(x.shape[-1] % head_size == 0, op, whole, f"shape {[*x.shape]}")
        x = x.view(*x.shape[:-1], -1, head_size)
    fits = x.shape[:-2] in (positions.shape, (positions.numel(),))
    tokens = f"{name} must have the tokens of positions {[*positions.shape]}"
    need(fits and x.shape[-1] == head_size, op, tokens, f"shape {[*x.shape]}")
    return x
