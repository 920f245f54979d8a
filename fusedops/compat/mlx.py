"""MLX: ``mlx.core.fast.rope``, for torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedops.compat._tables import need, rotate

__all__ = ["rope"]


def rope(
    a: Tensor,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | Tensor,
    freqs: Tensor | None = None,
) -> Tensor:
    """Rotate the first dims elements of a, [B, ..., T, D].

    The angle of pair j at position t is ``scale * (t + offset) * base ** (-2 j / dims)``, or
    ``scale * (t + offset) / freqs[j]``: **freqs are wavelengths** (over 2 pi), not frequencies.
    Angles and their cosines are computed in float64 and rounded to float32; MLX computes them in
    float32, and so differs by up to 2^-23 of the angle.

    Args:
        a: three dimensions or more; every row of a batch is rotated, also where T is 1.
        dims: how many elements of a head take part; even.
        traditional: pairs are neighbours; otherwise j and j + dims / 2.
        base: of the frequencies; None with freqs.
        scale: of the positions.
        offset: int, or integers [1] or [B].
        freqs: [dims / 2].

    Raises:
        RuntimeError: arguments that MLX refuses.
    """
    op = "mlx.rope"
    need(a.dim() >= 3, op, "a must have at least 3 dimensions", f"shape {[*a.shape]}")
    even = f"dims must be even, positive and at most {a.shape[-1]}"
    need(dims > 0 and dims % 2 == 0 and dims <= a.shape[-1], op, even, dims)
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    if freqs is None:
        if base is None:
            raise RuntimeError(f"[{op}] base or freqs must be given but got None for both")
        pair = torch.arange(dims // 2, dtype=wide, device=a.device)
        inverse = base ** (pair * (-2.0 / dims))
    else:
        need(base is None, op, "base must be None with freqs", base)
        width = f"freqs must be [{dims // 2}]"
        need(freqs.shape == (dims // 2,), op, width, f"shape {[*freqs.shape]}")
        inverse = freqs.to(wide).reciprocal()
    positions = torch.arange(a.shape[-2], device=a.device)
    if isinstance(offset, Tensor):
        integers = not (offset.is_floating_point() or offset.is_complex())
        need(integers, op, "offset must be integers", offset.dtype)
        one = f"offset must have 1 or {a.shape[0]} elements"
        fits = offset.dim() <= 1 and offset.numel() in (1, a.shape[0])
        need(fits, op, one, f"shape {[*offset.shape]}")
        positions = offset.reshape(-1, *[1] * (a.dim() - 3), 1) + positions
    else:
        positions = positions + offset
    angles = (scale * positions.to(wide)).unsqueeze(-1) * inverse
    cos, sin = angles.cos().float(), angles.sin().float()
    return rotate(op, a, cos, sin, interleaved=traditional)
