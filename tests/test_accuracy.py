"""Every op, dtype, instruction set, sample and distribution against the float64 oracle.

The bounds are those of the OpSpecs, element by element; float64 is also held to mpmath, rope to the
bits of eager, integer matmuls to exact results, and GELU to every float16 and bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import accuracy
import mpmath
import pytest
import torch
from torch import Tensor

import fusedops
from fusedops.testing import (
    DTYPES,
    LINEAR_SAMPLES,
    SPECS,
    Call,
    Linear,
    OpSpec,
    Sample,
    assert_same_bits,
    assert_within,
    gelu_bound,
)
from fusedops.verification.task import one_thread

mpmath.mp.dps = 40

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_narrow_dtype = pytest.mark.parametrize("dtype", ["f16", "bf16"])
each_variant = pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])


def cases(*ops: str) -> pytest.MarkDecorator:
    """(spec, sample, distribution) of every case of the ops."""
    return pytest.mark.parametrize(
        ("spec", "sample", "distribution"),
        [
            pytest.param(spec, sample, distribution, id=f"{spec.name}-{sample.name}-{distribution}")
            for spec in map(SPECS.__getitem__, ops)
            for sample, distribution in spec.cases()
        ],
    )


@functools.cache
@one_thread()
def judged(
    op: str, sample: Sample, distribution: str, dtype: str
) -> tuple[Call, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A case with its exact results and bounds: the same for every instruction set."""
    spec = SPECS[op]
    call = sample.build(DTYPES[dtype], distribution)
    return call, spec.oracle(call), spec.error_bound(call, False)


def assert_pure(call: Call, sample: Sample, distribution: str, outputs: tuple[Tensor, ...]) -> None:
    """The inputs are what they were, and every output is memory of its own."""
    original = sample.build(call.dtype, distribution)
    for t, before in zip(call.tensors, original.tensors, strict=True):
        torch.testing.assert_close(t, before, rtol=0, atol=0, equal_nan=True)
    taken = {t.untyped_storage().data_ptr() for t in call.tensors}
    given = [y.untyped_storage().data_ptr() for y in outputs if y.numel() > 0]
    assert len(taken | {*given}) == len(taken) + len(given)


@each_dtype
@cases("gelu_linear", "linear", "gelu")
def test_result_is_within_its_bound(
    spec: OpSpec, sample: Sample, distribution: str, dtype: str, isa: str
) -> None:
    call, (expected,), (bound,) = judged(spec.name, sample, distribution, dtype)
    (actual,) = outputs = spec.run(spec.public(), call)
    assert actual.dtype == call.dtype
    with one_thread():
        assert_within(actual, expected, bound)
        assert_pure(call, sample, distribution, outputs)


@functools.cache
@one_thread()
def eager(op: str, sample: Sample, distribution: str, dtype: str) -> tuple[Tensor, ...]:
    return SPECS[op].run(SPECS[op].reference, judged(op, sample, distribution, dtype)[0])


@each_dtype
@cases("rope", "rope_qk")
def test_rope_is_within_its_bound_with_the_bits_of_eager(
    spec: OpSpec, sample: Sample, distribution: str, dtype: str, isa: str
) -> None:
    call, expected, bounds = judged(spec.name, sample, distribution, dtype)
    outputs = spec.run(spec.public(), call)
    with one_thread():
        for y, exact, bound in zip(outputs, expected, bounds, strict=True):
            assert_within(y, exact, bound)
        for y, same in zip(outputs, eager(spec.name, sample, distribution, dtype), strict=True):
            assert_same_bits(y, same)
        assert_pure(call, sample, distribution, outputs)


@each_dtype
@pytest.mark.parametrize("sample", LINEAR_SAMPLES, ids=lambda sample: sample.name)
def test_linear_of_integers_is_exact(sample: Sample, dtype: str, isa: str) -> None:
    """No sum of these integers is rounded before the end, so a wrong element cannot hide."""
    call, (expected,), _ = judged("linear", sample, "integers", dtype)
    assert torch.equal(fusedops.linear(*call.args), expected.to(call.dtype))


@functools.cache
def all_values(dtype: str) -> Tensor:
    """The 65,536 values of a 16-bit dtype."""
    return torch.arange(-32768, 32768).to(torch.int16).view(DTYPES[dtype])


@functools.cache
def spread_values(stride: int) -> Tensor:
    """Every stride-th float32 of [-13, 13], by bit pattern: all exponents alike."""
    positive = torch.arange(0, 0x41500001, stride, dtype=torch.int32).view(torch.float32)
    return torch.cat((positive, -positive))


@functools.cache
@one_thread()
def judged_gelu(values: Callable[..., Tensor], key: Any, approximate: str) -> tuple[Tensor, Tensor]:
    """The exact results and bounds of a sweep."""
    call = Call((values(key),), {"approximate": approximate})
    return SPECS["gelu"].oracle(call)[0], gelu_bound(call)[0]


def assert_gelu(values: Callable[..., Tensor], key: Any, approximate: str) -> None:
    x = values(key)
    actual = fusedops.gelu(x, approximate=approximate)
    with one_thread():
        assert_within(actual, *judged_gelu(values, key, approximate))
        assert ((actual.signbit() == x.signbit()) | x.isnan()).all(), "wrong sign"


@each_narrow_dtype
@each_variant
def test_gelu_of_every_16_bit_value(approximate: str, dtype: str, isa: str) -> None:
    assert_gelu(all_values, dtype, approximate)


# 250 thousand values in the fast lane, 2 million otherwise; the strides are primes.
each_stride = pytest.mark.parametrize(
    "stride", [8737, pytest.param(1009, marks=pytest.mark.slow, id="slow-1009")]
)


@each_stride
@each_variant
def test_gelu_of_spread_floats(approximate: str, stride: int, isa: str) -> None:
    assert_gelu(spread_values, stride, approximate)


# --- every activation against exact.cpp -----------------------------------------------------------

# Needs a compiler, and the record whose windows are tried again.
needs_sources = pytest.mark.source


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> accuracy.Exact:
    return accuracy.Exact(tmp_path_factory.mktemp("exact"))


def ulp_limit(isa: str) -> float:
    """Without fused multiply-add each step of a polynomial rounds twice."""
    return 2.5 if isa == "portable" else 2.0


@needs_sources
@pytest.mark.parametrize("stride", [4099, pytest.param(257, marks=pytest.mark.slow, id="slow-257")])
def test_activations_are_within_their_ulps(stride: int, native: accuracy.Exact) -> None:
    """Of thinned floats: benchmarks/accuracy.py covers the rest."""
    for by_isa in accuracy.measure(native, stride).values():
        for isa, worst in by_isa.items():
            assert worst.ulp <= ulp_limit(isa), worst


@needs_sources
@pytest.mark.parametrize("variant", accuracy.VARIANTS)
def test_record_is_of_these_kernels(variant: str, isa: str, native: accuracy.Exact) -> None:
    """Dense around where the largest error was found: the same error is found again."""
    ulp, x = accuracy.recorded()["f32"][variant][isa]
    pattern = int(torch.tensor(x, dtype=torch.float32).view(torch.int32)) & 0xFFFFFFFF
    (window,) = accuracy.floats(pattern - 5000, pattern + 5001, 1)
    actual = accuracy.by_library(variant, torch.from_numpy(window)).numpy()
    worst = native.worst(window, native.values(variant, window), actual)
    assert worst.ulp == pytest.approx(ulp, abs=2e-3)
    assert worst.ulp <= ulp_limit(isa)


# Half an ulp is the rounding; the rest is 2^-15 of the value.
@needs_sources
@each_narrow_dtype
@pytest.mark.parametrize("variant", accuracy.VARIANTS)
def test_sums_are_rounded_once(variant: str, dtype: str, isa: str, native: accuracy.Exact) -> None:
    """float32 sums of a 16-bit linear, which no 16-bit input of gelu itself can be."""
    x = accuracy.narrow_floats(20011)
    rows, weight = accuracy.as_rows(x, DTYPES[dtype])
    y = fusedops.linear(rows, weight, activation=variant).flatten()
    limit = 0.5 + (1 / 16 if dtype == "f16" else 1 / 128)
    assert accuracy.narrow_error(native, variant, x, y) <= limit


# --- float64 against mpmath ---------------------------------------------------------------------


def exact_gelu(t: Any, approximate: str) -> Any:
    if approximate == "none":
        return t * mpmath.erfc(-t / mpmath.sqrt(2)) / 2
    if approximate == "tanh":
        v = 2 * mpmath.sqrt(2 / mpmath.pi) * (t + mpmath.mpf("0.044715") * t**3)
    else:
        v = mpmath.mpf("1.702") * t
    return t / (1 + mpmath.exp(-v))


def exact_elements(t: Tensor) -> list[Any]:
    return [mpmath.mpf(value) for value in t.flatten().tolist()]


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor) -> list[Any]:
    rows, columns = ([exact_elements(row) for row in matrix] for matrix in (x, weight))
    biases = exact_elements(bias)
    return [mpmath.fdot(r, c) + b for r in rows for c, b in zip(columns, biases, strict=True)]


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor) -> list[Any]:
    """Of half pairing and full rotary_dim, from position 0."""
    result = []
    for token, row in enumerate(x.reshape(-1, x.shape[-1])):
        c, s = (exact_elements(table[token % x.shape[-2]]) for table in (cos, sin))
        values, half = exact_elements(row), len(c)
        first, second = values[:half], values[half:]
        result += [a * c[j] - b * s[j] for j, (a, b) in enumerate(zip(first, second, strict=True))]
        result += [b * c[j] + a * s[j] for j, (a, b) in enumerate(zip(first, second, strict=True))]
    return result


EXACT: dict[tuple[str, str], Callable[..., list[Any]]] = {
    ("rope", "d34"): lambda x, cos, sin, _: exact_rope(x, cos, sin),
    ("linear", "17"): exact_linear,
    ("gelu_linear", "17"): lambda *args: [exact_gelu(z, "none") for z in exact_linear(*args)],
    ("gelu", "n33"): lambda x: [exact_gelu(t, "none") for t in exact_elements(x)],
    ("gelu", "tanh-33"): lambda x: [exact_gelu(t, "tanh") for t in exact_elements(x)],
    ("gelu", "quick-33"): lambda x: [exact_gelu(t, "quick") for t in exact_elements(x)],
}


@functools.cache
def exact(op: str, sample: str, distribution: str) -> list[Any]:
    return EXACT[op, sample](*judged(op, SPECS[op].sample(sample), distribution, "f64")[0].args)


@pytest.mark.parametrize("distribution", ["normal", "negative_tail"])
@pytest.mark.parametrize(("op", "sample"), EXACT)
def test_float64_agrees_with_mpmath(op: str, sample: str, distribution: str, isa: str) -> None:
    spec = SPECS[op]
    call, _, (bound,) = judged(op, spec.sample(sample), distribution, "f64")
    actual = exact_elements(spec.run(spec.public(), call)[0])
    errors = [a - e for a, e in zip(actual, exact(op, sample, distribution), strict=True)]
    # The bound allows for the oracle's own error as well, which mpmath does not have.
    assert_within(
        torch.tensor([float(e) for e in errors], dtype=torch.float64),
        torch.zeros(len(errors), dtype=torch.float64),
        bound.flatten() / 2,
    )


# --- matmuls against PyTorch --------------------------------------------------------------------


def rms_error(
    function: Callable[..., Tensor], op: str, rows: int, dtype: str, k: int = 512, n: int = 80
) -> float:
    """Over 20 seeds; a sample's seed is its name."""
    approximate = "none" if op == "gelu_linear" else None
    errors = []
    for seed in range(20):
        sample = Linear(f"seed-{seed}", (rows,), k, n, approximate=approximate)
        call, (expected,), _ = judged(op, sample, "normal", dtype)
        errors.append(function(*call.args, **call.kwargs).double() - expected)
    return torch.stack(errors).square().mean().sqrt().item()


# In float64 the oracle is PyTorch itself. Few rows and many take different kernels.
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("rows", [3, 96])
@pytest.mark.parametrize("op", ["linear", "gelu_linear"])
def test_matmul_errs_no_more_than_pytorch(op: str, rows: int, dtype: str, isa: str) -> None:
    spec = SPECS[op]
    ours, theirs = (rms_error(f, op, rows, dtype) for f in (spec.public(), spec.reference))
    assert ours <= 1.05 * theirs


def packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return fusedops.linear(x, fusedops.pack_linear(weight, bias))


def planned(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return fusedops.plan.gelu_linear(weight, bias, rows=x.shape[0], approximate=approximate)(x)


# Sums of any length, in each family of kernels; a wide layer has one more for few rows.
@pytest.mark.parametrize("k", [64, 256, pytest.param(4096, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("rows", "n"), [(1, 80), (4, 80), (7, 80), (96, 80), (7, 1050), (16, 1050)]
)
@pytest.mark.parametrize("way", ["plain", "packed", "plan"])
def test_float32_sums_err_no_more_than_pytorch_s(
    way: str, rows: int, n: int, k: int, isa: str
) -> None:
    op = "gelu_linear" if way == "plan" else "linear"
    function = {"plain": fusedops.linear, "packed": packed, "plan": planned}[way]
    ours, theirs = (rms_error(f, op, rows, "f32", k, n) for f in (function, SPECS[op].reference))
    assert ours <= 1.05 * theirs


# The order of many rows, where PyTorch sums a few in shorter chains.
@pytest.mark.parametrize("k", [16, 64, 128, 256, 4096])
@pytest.mark.parametrize("rows", [1, 2])
def test_deterministic_errs_little_more(rows: int, k: int, isa: str) -> None:
    with fusedops.deterministic(True):
        ours = rms_error(fusedops.linear, "linear", rows, "f32", k)
    assert ours <= 1.4 * rms_error(SPECS["linear"].reference, "linear", rows, "f32", k)
