"""What fills an input, and how it lies in memory."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fusedops.testing.errors import wide_dtype

__all__ = ["DISTRIBUTIONS", "VIEWS", "Shape", "fill", "generator"]

Shape = tuple[int, ...]
Fill = Callable[[Shape, torch.dtype, torch.Generator], Tensor]


def _normal(scale: float) -> Fill:
    return lambda shape, dtype, g: scale * torch.randn(shape, dtype=wide_dtype(dtype), generator=g)


def _uniform(low: float, high: float) -> Fill:
    return lambda shape, dtype, g: (
        low + (high - low) * torch.rand(shape, dtype=wide_dtype(dtype), generator=g)
    )


def _sprinkled(value: float) -> Fill:
    """Normal numbers, of which an eighth is value times its own sign."""

    def fill(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
        normal = torch.randn(shape, dtype=wide_dtype(dtype), generator=g)
        return torch.where(torch.rand(shape, generator=g) < 0.125, value * normal.sign(), normal)

    return fill


def _denormals(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    info = torch.finfo(dtype)
    limit = int(1.5 / info.eps)  # in units of the smallest number: two thirds are subnormal
    count = torch.randint(-limit, limit + 1, shape, generator=g).to(torch.float64)
    return count * (info.smallest_normal * info.eps)


def _signed_zeros(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.where(torch.rand(shape, generator=g) < 0.5, 0.0, -0.0)


def _integers(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.randint(-4, 5, shape, generator=g)


# What fills the main input of a case; rounded to dtype afterwards.
DISTRIBUTIONS: Mapping[str, Fill] = {
    "normal": _normal(1.0),
    "tiny": _normal(1e-3),
    "huge": _normal(30.0),
    "uniform": _uniform(0.0, 1.0),
    "negative_tail": _uniform(-12.0, -2.0),
    "denormals": _denormals,
    "signed_zeros": _signed_zeros,
    "inf": _sprinkled(math.inf),
    "nan": _sprinkled(math.nan),
    "integers": _integers,
}


def _strided(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
    wide[..., ::2] = t
    return wide[..., ::2]


def _sliced(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def _offset(t: Tensor) -> Tensor:
    flat = t.new_full((t.numel() + 1,), math.nan)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


# The memory layouts of an input. Each takes a contiguous tensor and returns its values (expanded:
# its first slice repeated); what lies between them in memory is NaN.
VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "outer_swapped": lambda t: t.transpose(-2, -3).contiguous().transpose(-2, -3),
    "strided": _strided,
    "sliced": _sliced,
    "offset": _offset,
    "expanded": lambda t: t[:1].expand(t.shape),
    # torch has no negative strides; its negative view is a lazily negated one.
    "negative": lambda t: torch._neg_view(-t),
}


def generator(*key: object) -> torch.Generator:
    """Seeded by its key."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, key)).encode()))


def fill(
    distribution: str,
    shape: Shape,
    dtype: torch.dtype,
    g: torch.Generator,
    view: str = "contiguous",
) -> Tensor:
    """A tensor of the distribution, rounded to dtype, in the memory layout ``view``."""
    return VIEWS[view](DISTRIBUTIONS[distribution](shape, dtype, g).to(dtype))
