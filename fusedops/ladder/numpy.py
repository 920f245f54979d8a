"""Rung ``numpy``: NumPy arrays, no torch arithmetic.

float64 is computed in float64 and everything else in float32, with the matmul of NumPy's BLAS and
GELU in float64. NumPy has no bfloat16: float16 and bfloat16 are widened by torch on the way in and
rounded once by torch on the way out.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from fusedops.ladder.rung import Rung

__all__ = ["RUNGS", "erfc", "gelu_linear", "rope"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


# IEEE results, as torch gives them: inf - inf and an overflow are not worth a warning.
_ieee = np.errstate(invalid="ignore", over="ignore")


@_ieee
def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    offset: int = 0,
    layout: str = "bhsd",
    interleaved: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """``fusedops.rope`` with slices."""
    compute = torch.promote_types(x.dtype, torch.float32)
    tokens = x.shape[-2 if layout == "bhsd" else -3]
    c, s = (
        _rows(_array(table, compute), position_ids, offset, tokens, x.dim(), layout)
        for table in (cos, sin)
    )
    if conjugate:
        s = -s
    half, given = cos.shape[-1], _array(x, compute)
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    x1, x2 = given[..., first], given[..., second]
    y = given.copy()
    y[..., first] = x1 * c - x2 * s
    y[..., second] = x2 * c + x1 * s
    return torch.from_numpy(y).to(x)


@_ieee
def gelu_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    """``fusedops.gelu_linear``: a BLAS matmul, then GELU in float64."""
    compute = torch.promote_types(input.dtype, torch.float32)
    z = _array(input, compute) @ _array(weight, compute).T
    if bias is not None:
        z = z + _array(bias, compute)
    y = _gelu(np.asarray(z, dtype=np.float64), approximate)
    return torch.from_numpy(y).to(input)


def erfc(z: Array) -> Array:
    """The complementary error function in float64, relative error at most 1e-15 for z <= 26.

    For z >= 0, (1 + 2z) exp(z^2) erfc(z) is a Chebyshev series in t = (z - 3) / (z + 3), the form
    of Shepherd and Laframboise 1981; the coefficients were computed with mpmath at 60 digits.
    """
    magnitude = np.minimum(np.abs(z), 28.0)  # from there on the result is 0; infinity has no t
    series = chebyshev.chebval((magnitude - 3.0) / (magnitude + 3.0), _ERFC)
    # exp(-z^2) of a rounded square would lose z^2 eps: square a short head exactly, then correct.
    head = magnitude.astype(np.float32).astype(np.float64)
    square = np.exp(-head * head) * np.exp((head - magnitude) * (head + magnitude))
    tail = square * series / (1.0 + 2.0 * magnitude)
    return np.where(z < 0.0, 2.0 - tail, tail)


def _array(t: Tensor, dtype: torch.dtype) -> Array:
    return t.detach().to("cpu", dtype).resolve_neg().numpy()


def _rows(
    table: Array, position_ids: Tensor | None, offset: int, tokens: int, rank: int, layout: str
) -> Array:
    """The tables' rows, shaped to broadcast against x."""
    if table.ndim == 2:
        ids = np.arange(tokens) if position_ids is None else position_ids.cpu().numpy()
        table = table[ids + offset]
    if table.ndim == 3 and rank == 3:
        table = table[0]
    return np.expand_dims(table, -3 if layout == "bhsd" else -2)


def _gelu(x: Array, approximate: str) -> Array:
    x = np.maximum(x, -500.0)  # -inf * 0 is NaN; the result is 0 there anyway
    if approximate == "none":
        return 0.5 * x * erfc(x * -math.sqrt(0.5))
    if approximate == "tanh":
        v = 2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
    else:
        v = 1.702 * x
    return x / (1.0 + np.exp(-v))  # where exp overflows, x / inf is the 0 that is wanted


_ERFC = (
    1.17756257419656,
    0.005353904539615676,
    -0.09377550342284209,
    0.05436652555744322,
    -0.018976596707845208,
    0.004453426061462712,
    -0.0006335531710553147,
    1.7661719523171593e-05,
    1.2841532864056671e-05,
    -2.0072285659059913e-06,
    -1.807522790414837e-07,
    7.549828343825093e-08,
    1.885668523838603e-09,
    -2.699519049798364e-09,
    -1.460079119939105e-11,
    1.0361607445969489e-10,
    1.475715976623473e-12,
    -4.277340064396911e-12,
    -2.07922492859799e-13,
    1.8134502003176963e-13,
    1.973425574544739e-14,
    -7.287943737592673e-15,
    -1.5169878690228116e-15,
    2.3514112258781403e-16,
    1.0006111691821667e-16,
)

RUNGS = (
    Rung("numpy", "rope", "NumPy slices", rope),
    Rung("numpy", "gelu_linear", "NumPy's BLAS, then a vectorised erfc", gelu_linear),
)
