"""Every sample of every op on the device of FUSEDOPS_TEST_DEVICE, against the float64 oracle.

The oracle and the bounds are computed on the CPU, whose own kernels are test_accuracy.py's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lane import DEVICE

from fusedops.testing import DTYPES, SPECS, OpSpec, Sample, assert_within, on_device

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="FUSEDOPS_TEST_DEVICE names no device")

_DTYPES = [name for name in DTYPES if name != "f64" or DEVICE != "mps"]
_OPS = [spec for spec in SPECS.values() if spec.name != "gelu_linear_quantized"]
CASES = [(spec, *case) for spec in _OPS for case in spec.cases()]


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with torch.device("cpu"):
        yield


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize(
    ("spec", "sample", "distribution"),
    CASES,
    ids=["-".join((spec.name, sample.name, kind)) for spec, sample, kind in CASES],
)
def test_result_is_within_its_bound(
    spec: OpSpec, sample: Sample, distribution: str, dtype: str
) -> None:
    call = sample.build(DTYPES[dtype], distribution)
    there = on_device(call, DEVICE)
    outputs = spec.run(spec.public(), there)
    exact, bounds = spec.oracle(there), spec.error_bound(there, False)
    for y, expected, bound in zip(outputs, exact, bounds, strict=True):
        assert y.device.type == DEVICE
        assert y.dtype == call.dtype
        assert_within(y.cpu(), expected, bound)
    for t, before in zip(there.tensors, call.tensors, strict=True):
        torch.testing.assert_close(t.cpu(), before, rtol=0, atol=0, equal_nan=True)
