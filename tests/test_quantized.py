"""gelu_linear_quantized and quantize_weight: values, bits, errors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_refused
from quantized_layers import KINDS, SPEC, each_dtype, each_kind, each_variant, layer, run
from torch import Tensor
from torch.nn import functional

import fusedops
from fusedops import quantize_weight, reference
from fusedops.testing import (
    DISTRIBUTIONS,
    DTYPES,
    ROUNDED_SAMPLES,
    Call,
    Linear,
    Quantized,
    Sample,
    assert_same_bits,
    assert_within,
    quantized_bound,
)
from fusedops.verification.task import one_thread

ops = torch.ops.fusedops
LEAST = 2.0**-126


# --- numbers --------------------------------------------------------------------------------------

CASES = [
    *SPEC.cases(),
    *(
        (sample, distribution)
        for sample in ROUNDED_SAMPLES
        for distribution in DISTRIBUTIONS
        if distribution == "normal" or sample.layer.name in ("33", "decode-odd", "33-tanh")
    ),
]


@functools.cache
@one_thread()
def judged(
    sample: Sample, distribution: str, dtype: str
) -> tuple[Call, Tensor, Tensor, Tensor | None]:
    """A case, its exact result and bound, and the bits of the best instruction set."""
    call = sample.build(DTYPES[dtype], distribution)
    best = None
    if len(fusedops.isa.supported()) > 1:
        with fusedops.isa.use(fusedops.isa.supported()[0]):
            best = SPEC.run(SPEC.public(), call)[0]
    return call, SPEC.oracle(call)[0], quantized_bound(call)[0], best


@each_dtype
@pytest.mark.parametrize(
    ("sample", "distribution"), [pytest.param(s, d, id=f"{s.name}-{d}") for s, d in CASES]
)
def test_result_is_within_its_bound_with_the_same_bits_everywhere(
    sample: Sample, distribution: str, dtype: str, isa: str
) -> None:
    call, expected, bound, best = judged(sample, distribution, dtype)
    (actual,) = SPEC.run(SPEC.public(), call)
    assert actual.dtype == call.dtype
    with one_thread():
        assert_within(actual, expected, bound)
        if best is not None:
            assert_same_bits(actual, best)


# Weights of one element that are 1 make every float the argument of GELU: a difference between
# two instruction sets in any of its paths shows.
@each_variant
def test_gelu_has_the_same_bits_everywhere(approximate: str, isa: str) -> None:
    bits = torch.arange(-(2**31), 2**31 - 1, 40009, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32).unsqueeze(-1)
    y = fusedops.gelu_linear_quantized(
        x, torch.ones(1, 1, dtype=torch.bfloat16), approximate=approximate
    )
    assert_same_bits(y, _gelu_of_best(approximate, x))


def _gelu_of_best(approximate: str, x: Tensor) -> Tensor:
    with fusedops.isa.use(fusedops.isa.supported()[0]):
        return fusedops.gelu_linear_quantized(
            x, torch.ones(1, 1, dtype=torch.bfloat16), approximate=approximate
        )


@each_kind
@pytest.mark.parametrize(("rows", "k"), [(7, 65), (25, 64), (90, 130), (33, 4100)])
def test_rows_and_threads_do_not_change_bits(kind: str, rows: int, k: int, isa: str) -> None:
    args, _ = layer(kind, rows, k, n=70)
    together = run(kind, args)
    for row in (0, rows // 2, rows - 1):
        alone = run(kind, [args[0][row : row + 1], *args[1:]])
        assert_same_bits(alone, together[row : row + 1])
    with one_thread():
        assert_same_bits(run(kind, args), together)


# Of integers no float sum is rounded, and no integer sum may saturate: 255 and -128 everywhere.
@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("k", [4, 63, 64, 65, 8200])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_extreme_bytes_are_exact(value: float, k: int, rows: int, isa: str) -> None:
    weight = torch.full((33, k), -128, dtype=torch.int8)
    weight[::2] = 127
    y = fusedops.gelu_linear_quantized(
        torch.full((rows, k), value), weight, torch.ones(33), activation_dtype=torch.int8
    )
    # x = 127 * (1 / 127): the scale is a float.
    scale = torch.tensor(1.0) / 127
    sums = (127 * int(value) * weight.double().sum(-1)).float()
    expected = reference.gelu(sums.double() * scale.double()).expand(rows, 33)
    assert_within(y, expected, 8 * torch.finfo(torch.float32).eps * expected.abs())


@pytest.mark.parametrize("rows", [2, 40])
def test_the_longest_k_does_not_overflow(rows: int, isa: str) -> None:
    k = 131072
    weight = torch.full((2, k), 127, dtype=torch.int8)
    weight[1] = -128
    x = torch.ones(rows, k)
    y = fusedops.gelu_linear_quantized(x, weight, torch.ones(2), activation_dtype=torch.int8)
    assert_within(y[:, :1], torch.full((rows, 1), 127.0 * k).double(), torch.full((), 0.01 * k))
    assert (y[:, 1] == 0).all()


@each_kind
@pytest.mark.parametrize("rows", [2, 30])
def test_rows_of_special_values(kind: str, rows: int, isa: str) -> None:
    args, _ = layer(kind, rows, 20, n=17)
    x = args[0]
    x[0] = 0.0
    args[3] = None
    assert (run(kind, args)[0] == 0).all()
    x[0] = 2.5  # all equal: 127 each
    assert run(kind, args)[0].isfinite().all()
    for value in (math.nan, math.inf, -math.inf):
        x[0] = 1.0
        x[0, 7] = value
        y = run(kind, args)
        assert y[1:].isfinite().all(), "one row's values reach another"
        if kind == "w8a8" or math.isnan(value):
            assert y[0].isnan().all()
        else:
            z = functional.linear(x[:1].double(), args[1].double())
            assert_same_bits(y[0], reference.gelu(z)[0].float())


# --- quantisation ---------------------------------------------------------------------------------


def test_int8_weights_are_symmetric_per_channel() -> None:
    w = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [-3.0, 3.0, 1.5]])
    q, scale = quantize_weight(w, torch.int8)
    assert q.tolist() == [[127, -64, 32], [0, 0, 0], [-127, 127, 64]]
    assert scale is not None
    assert scale.tolist() == pytest.approx([1 / 127, LEAST, 3 / 127])
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)


@pytest.mark.parametrize("distribution", ["normal", "denormals", "huge", "uniform", "integers"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_errs_by_half_a_step(dtype: str, distribution: str) -> None:
    sample = Linear("w", (9,), 65, 1)
    w = sample.build(DTYPES[dtype], distribution).tensors[0]
    q, scale = quantize_weight(w, torch.int8)
    assert scale is not None
    assert int(q.min()) >= -127
    assert (scale >= LEAST).all()
    step = scale.double().unsqueeze(-1)
    error = (w.float().double() - step * q.double()).abs()
    assert (error <= 0.50002 * step).all()


def test_ties_round_to_even() -> None:
    w = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    q, scale = quantize_weight(w, torch.int8)
    assert scale is not None
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]
    x = torch.cat((w, torch.zeros(1, 1)), 1)
    eye = torch.eye(7, dtype=torch.int8)
    y = fusedops.gelu_linear_quantized(
        x, eye, torch.ones(7), torch.full((7,), 100.0), activation_dtype=torch.int8
    )
    assert (y - 100).tolist() == [[127, 0, 2, 2, 0, -2, 0]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_channel_that_is_not_finite_gives_nan(value: float) -> None:
    w = torch.randn(3, 5)
    w[1, 2] = value
    q, scale = quantize_weight(w, torch.int8)
    y = fusedops.gelu_linear_quantized(torch.randn(2, 5), q, scale)
    assert y[:, 1].isnan().all()
    assert y[:, ::2].isfinite().all()


# The range of float32: the least scale, its reciprocal, and rows whose largest is the largest.
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-37, 1e-30, 1.0, 1e30, 3e38])
def test_activations_of_any_magnitude(magnitude: float, isa: str) -> None:
    x = (torch.rand(3, 64) * 2 - 1) * magnitude
    q, scale = quantize_weight(torch.randn(5, 64) / max(magnitude, 1.0) ** 0.5, torch.int8)
    call = Call((x, q, scale, None), {"approximate": "none", "activation_dtype": torch.int8})
    (y,) = SPEC.run(SPEC.public(), call)
    assert_within(y, SPEC.oracle(call)[0], quantized_bound(call)[0])
    assert y.isfinite().all()


def test_bf16_weights_are_rounded_once() -> None:
    w = torch.randn(3, 5)
    q, scale = quantize_weight(w, torch.bfloat16)
    assert scale is None
    assert_same_bits(q, w.to(torch.bfloat16))


@each_kind
def test_empty_k_and_rows(kind: str) -> None:
    args, _ = layer(kind, 3, 0)
    bias = args[3].unsqueeze(-1)
    alone = fusedops.gelu_linear_quantized(bias, torch.ones(1, 1, dtype=torch.bfloat16))
    assert_same_bits(run(kind, args), alone.squeeze(-1).expand(3, 4))
    args, _ = layer(kind, 0, 5)
    assert run(kind, args).shape == (0, 4)
    args, _ = layer(kind, 3, 5, n=0)
    assert run(kind, args).shape == (3, 0)


# What the rounding itself costs, before GELU: as the docstring bounds it.
@each_kind
def test_stated_error_against_the_float_layer(kind: str) -> None:
    x, w = torch.randn(40, 200), torch.randn(30, 200)
    q, scale = quantize_weight(w, KINDS[kind]["weight_dtype"])
    stored = q.double() * (1.0 if scale is None else scale.double().unsqueeze(-1))
    change = x.double().abs() @ (w.double() - stored).abs().t()
    if scale is not None:
        worst = x.double().abs().sum(-1, keepdim=True) * 0.50002 * scale.double()
        assert (change <= worst).all()
        change = worst
    if kind == "w8a8":
        step = x.abs().amax(-1, keepdim=True).double() / 127
        change = change + 0.50002 * step * stored.abs().sum(-1)
    exact = reference.gelu(functional.linear(x.double(), w.double()))
    y = run(kind, [x, q, scale, None])
    assert_within(y, exact, 1.13 * change + 1e-4)


# --- errors ---------------------------------------------------------------------------------------

_OP = "[gelu_linear_quantized] "
BAD: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "input-dtype": (
        lambda a: [a[0].double(), *a[1:]],
        "input must be float32, float16 or bfloat16 but got Double",
    ),
    "weight-dtype": (
        lambda a: [a[0], a[1].float(), *a[2:]],
        "weight must be bfloat16 or int8 but got Float",
    ),
    "input-rank": (
        lambda a: [a[0][0, 0], *a[1:]],
        "input must have at least 1 dimension but got shape []",
    ),
    "weight-rank": (
        lambda a: [a[0], a[1][0], *a[2:]],
        "weight must have 2 dimensions [N, K] but got shape [3]",
    ),
    "k": (
        lambda a: [a[0][:, :2], *a[1:]],
        "input's last dimension must be weight's K = 3 but got shape [2, 2]",
    ),
    "no-scale": (
        lambda a: [*a[:2], None, a[3]],
        "scale must be given for an int8 weight but got None",
    ),
    "scale-for-bf16": (
        lambda a: [a[0], a[1].bfloat16(), *a[2:]],
        "scale must be None for a bfloat16 weight but got a tensor",
    ),
    "scale-dtype": (
        lambda a: [*a[:2], a[2].half(), a[3]],
        "scale must be float32 but got Half",
    ),
    "scale-length": (
        lambda a: [*a[:2], a[2][:3], a[3]],
        "scale must be [N] = [4] but got shape [3]",
    ),
    "scale-rank": (
        lambda a: [*a[:2], a[2].unsqueeze(-1), a[3]],
        "scale must be [N] = [4] but got shape [4, 1]",
    ),
    "bias-dtype": (
        lambda a: [*a[:3], a[3].double()],
        "bias must be float32 but got Double",
    ),
    "bias-length": (
        lambda a: [*a[:3], torch.randn(5)],
        "bias must be [N] = [4] but got shape [5]",
    ),
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(
    change: Callable[[list[Any]], list[Any]], message: str, recorded: bool
) -> None:
    args = change(layer("int8", 2, 3)[0])
    if recorded and args[0].is_floating_point():
        args[0] = args[0].detach().requires_grad_()
    assert_refused(lambda: fusedops.gelu_linear_quantized(*args), _OP + message)
    meta = [None if a is None else a.detach().to("meta") for a in args]
    if "Char" not in message:
        assert_refused(lambda: fusedops.gelu_linear_quantized(*meta), _OP + message)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_options(device: str) -> None:
    def call(kind: str, k: int = 3, **options: Any) -> None:
        args, _ = layer(kind, 2, k)
        moved = [None if a is None else a.to(device) for a in args]
        fusedops.gelu_linear_quantized(*moved, **options)

    variant = "approximate must be 'none', 'tanh' or 'quick' but got 'erf'"
    assert_refused(lambda: call("int8", approximate="erf"), _OP + variant)
    for dtype in (torch.bfloat16, torch.uint8, "int8"):
        message = f"activation_dtype must be None or torch.int8 but got {dtype}"
        assert_refused(lambda d=dtype: call("int8", activation_dtype=d), _OP + message)
    message = "activation_dtype must be None for a bfloat16 weight but got torch.int8"
    assert_refused(lambda: call("bf16", activation_dtype=torch.int8), _OP + message)
    message = "K must be at most 131072 for activation_dtype=torch.int8 but got 131073"
    assert_refused(lambda: call("int8", 131073, activation_dtype=torch.int8), _OP + message)


def test_bad_weights_to_quantize() -> None:
    op = "[quantize_weight] "
    w = torch.randn(3, 4)
    message = "dtype must be torch.bfloat16 or torch.int8 but got torch.float16"
    assert_refused(lambda: quantize_weight(w, torch.float16), op + message)
    message = "weight must be floating point but got torch.int8"
    assert_refused(lambda: quantize_weight(w.to(torch.int8), torch.int8), op + message)
    message = "weight must have 2 dimensions [N, K] but got shape [4]"
    assert_refused(lambda: quantize_weight(w[0], torch.int8), op + message)


def test_a_packed_weight_is_refused() -> None:
    x, packed = torch.randn(3, 6), fusedops.pack_linear(torch.randn(9, 6))
    message = "[gelu_linear_quantized] weight must be a tensor but got PackedLinear"
    assert_refused(lambda: fusedops.gelu_linear_quantized(x, packed), message)  # type: ignore[arg-type]


def test_mixed_devices() -> None:
    args, _ = layer("int8", 2, 3)
    message = "tensors must be on one device but got cpu and meta"
    assert_refused(lambda: run("int8", [args[0].to("meta"), *args[1:]]), _OP + message)


def test_samples_of_rounded_activations_are_of_the_op() -> None:
    assert all(isinstance(s, Quantized) and s.rounded for s in ROUNDED_SAMPLES)
    assert not any(s.rounded for s in SPEC.samples if isinstance(s, Quantized))
