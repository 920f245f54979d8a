"""What tests, verify and bench know about the ops: one OpSpec per op, in ``SPECS``.

A spec names the op and its formula, lists samples (shapes, strides, options), the distributions
that fill them, the bound that every element of a result is held to, named shapes of real models and
the speed that must hold on them. A case is (sample, distribution, dtype) and is deterministic: its
seed is its name.

errors: ulps and assertions. inputs: distributions and memory layouts. samples: what a call is.
devices: calls elsewhere than on a CPU. bounds: how wrong an element may be. tables: the samples of
each op. workloads: shapes of models, random shapes, bars. registry: the specs.
"""

from __future__ import annotations

from fusedops.testing.bounds import (
    gelu_bound,
    gelu_linear_bound,
    linear_bound,
    quantized_bound,
    rope_bound,
)
from fusedops.testing.devices import on_device, synchronize
from fusedops.testing.errors import (
    DTYPES,
    assert_same_bits,
    assert_within,
    ulp,
    ulp_error,
    wide_dtype,
)
from fusedops.testing.inputs import DISTRIBUTIONS, VIEWS
from fusedops.testing.registry import SPECS, OpSpec
from fusedops.testing.samples import Call, Gelu, Linear, Quantized, Rope, Sample
from fusedops.testing.tables import LINEAR_SAMPLES, QUANTIZED_SAMPLES, ROUNDED_SAMPLES
from fusedops.testing.workloads import Bar

__all__ = [
    "DISTRIBUTIONS",
    "DTYPES",
    "LINEAR_SAMPLES",
    "QUANTIZED_SAMPLES",
    "ROUNDED_SAMPLES",
    "SPECS",
    "VIEWS",
    "Bar",
    "Call",
    "Gelu",
    "Linear",
    "OpSpec",
    "Quantized",
    "Rope",
    "Sample",
    "assert_same_bits",
    "assert_within",
    "gelu_bound",
    "gelu_linear_bound",
    "linear_bound",
    "on_device",
    "quantized_bound",
    "rope_bound",
    "synchronize",
    "ulp",
    "ulp_error",
    "wide_dtype",
]
