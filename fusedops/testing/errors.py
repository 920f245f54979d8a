"""Errors in units of the last place, and the two assertions that every result meets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["DTYPES", "assert_same_bits", "assert_within", "ulp", "ulp_error", "wide_dtype"]

# The names of the dtypes in kernels, test ids and result files.
DTYPES: Mapping[str, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that dtype is computed in, which is also the one its random numbers are drawn in."""
    return torch.promote_types(dtype, torch.float32)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of dtype at |value| (float64), subnormals included."""
    info = torch.finfo(dtype)
    # The exponent bits alone are the largest power of two not above |value|.
    bits = value.abs().contiguous().view(torch.int64) & (0x7FF << 52)
    return (bits.view(torch.float64) * info.eps).clamp_min(info.smallest_normal * info.eps)


def ulp_error(actual: Tensor, expected64: Tensor, dtype: torch.dtype) -> Tensor:
    """|actual - expected64| in ulps of dtype at the expected value, as float64.

    NaN against NaN and an infinity against itself count 0, any other non-finite pair inf.
    """
    actual = actual.to(torch.float64)
    same = (actual == expected64) | (actual.isnan() & expected64.isnan())
    error = (actual - expected64).abs() / ulp(expected64, dtype)
    error = torch.where(error.isfinite(), error, math.inf)
    return torch.where(same, 0.0, error)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """AssertionError naming the worst element unless |actual - expected| <= bound everywhere.

    NaN needs NaN and an infinity itself; where expected + bound leaves actual's range, an infinity
    of the right sign will do.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    largest = torch.finfo(actual.dtype).max
    value = actual.detach().to("cpu", torch.float64)
    overflows = expected.isfinite() & (expected.abs() + bound > largest)
    good = expected.isfinite() & ((value - expected).abs() <= bound)
    good |= (value == expected) | (value.isnan() & expected.isnan())
    good |= overflows & value.isinf() & (value.signbit() == expected.signbit())
    if good.all():
        return
    excess = torch.where(good, -1.0, (value - expected).abs() / bound)
    index = int(torch.where(excess.isnan(), math.inf, excess).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), actual.shape))
    got, want, limit = (t.flatten()[index].item() for t in (value, expected, bound))
    raise AssertionError(
        f"{int((~good).sum())} of {good.numel()} elements out of bound; worst at {where}: "
        f"got {got!r}, expected {want!r}, error {abs(got - want):.3g}, bound {limit:.3g}"
    )


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """AssertionError unless both hold the same bits; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    differ = (actual != expected) | (actual.signbit() != expected.signbit())
    differ &= ~(actual.isnan() & expected.isnan())
    if differ.any():
        where = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differ.sum())} of {differ.numel()} elements differ in bits; first at {where}: "
            f"got {actual[where].item()!r}, expected {expected[where].item()!r}"
        )
