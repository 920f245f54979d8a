"""Every rung of the ladder: the same tests for all, and a reason from those that cannot run."""

from __future__ import annotations

import sys

import mpmath
import numpy as np
import pytest
import torch

from fusedops import coreml, ladder, reference
from fusedops.ladder import device
from fusedops.ladder.numpy import erfc
from fusedops.testing import DTYPES, SPECS, Sample, assert_within

NAMES = (
    *("python", "numpy", "eager", "compile", "cpp", "cpp_fused", "cpp_plan"),
    *("mps_eager", "metal_fused", "coreml"),
)
ALL = [rung for op in ladder.ops() for rung in ladder.rungs(op)]

# Small, one for each option of the op. Shapes and strides are the business of test_accuracy.
SMALL = {
    "rope": (
        *("d34", "neighbours-partial", "no-batch-bshd", "bshd-batched-ids", "ids-32-offset"),
        *("table-3d", "table-f32", "conjugate-neighbours", "x-negative", "empty-tokens"),
    ),
    "gelu_linear": (
        *("33", "33-tanh", "33-quick", "no-bias", "1d", "3d", "empty-k", "empty-rows"),
        *("x-strided", "x-negative", "weight-transposed"),
    ),
}


def grid(*names: str) -> pytest.MarkDecorator:
    """(rung, sample) for the rungs of these names that can run, all others have their reason."""
    return pytest.mark.parametrize(
        ("rung", "sample"),
        [
            pytest.param(rung, sample, id=f"{rung.op}-{rung.name}-{sample}")
            for rung in ALL
            if rung.name in names and rung.unavailable is None
            for sample in SMALL[rung.op]
        ],
    )


def assert_accurate(rung: ladder.Rung, sample: str, distribution: str, dtype: str) -> None:
    spec = SPECS[rung.op]
    with torch.device("cpu"):  # a rung of another device moves what it is given
        call = spec.sample(sample).build(DTYPES[dtype], distribution)
        (actual,), (expected,) = spec.run(rung, call), spec.oracle(call)
        assert (actual.dtype, actual.device) == (call.dtype, torch.device("cpu"))
        assert_within(actual, expected, spec.error_bound(call, rung.stepwise)[0])


each_dtype = pytest.mark.parametrize("dtype", DTYPES)
# Finite ones: PyTorch's own GELU, which eager is, makes NaN of infinity.
each_distribution = pytest.mark.parametrize("distribution", ["normal", "negative_tail", "huge"])


@each_dtype
@each_distribution
@grid("python", "numpy", "eager", "mps_eager", "metal_fused", "cpp", "cpp_fused", "cpp_plan")
def test_rung_is_within_its_bound(
    rung: ladder.Rung, sample: str, distribution: str, dtype: str
) -> None:
    if rung.device == "mps" and dtype == "f64":
        pytest.skip("MPS has no float64")
    assert_accurate(rung, sample, distribution, dtype)


# cpp_fused is the public op, which test_accuracy runs on every instruction set.
@each_dtype
@grid("cpp", "cpp_plan")
def test_rung_on_every_isa(rung: ladder.Rung, sample: str, dtype: str, isa: str) -> None:
    assert_accurate(rung, sample, "normal", dtype)


# A compilation takes seconds: one sample, and the two dtypes that take different ways.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("op", "sample"), [("rope", "ids-32-offset"), ("gelu_linear", "33")])
def test_compile_rung(op: str, sample: str, dtype: str) -> None:
    assert_accurate(ladder.get(op, "compile"), sample, "normal", dtype)


@each_dtype
@pytest.mark.parametrize("sample", SPECS["rope"].samples, ids=lambda sample: sample.name)
def test_python_rope_confirms_the_reference(sample: Sample, dtype: str) -> None:
    assert_accurate(ladder.get("rope", "python"), sample.name, "normal", dtype)


@pytest.mark.parametrize("op", ["rope", "gelu_linear"])
def test_rungs_are_in_ladder_order(op: str) -> None:
    assert tuple(rung.name for rung in ladder.rungs(op)) == NAMES
    assert {rung.op for rung in ladder.rungs(op)} == {op}


@pytest.mark.parametrize("rung", ALL, ids=lambda rung: f"{rung.op}-{rung.name}")
def test_get_finds_a_rung(rung: ladder.Rung) -> None:
    assert ladder.get(rung.op, rung.name) is rung
    assert rung.description


@pytest.mark.parametrize(
    "rung",
    [rung for rung in ALL if rung.unavailable is not None],
    ids=lambda rung: f"{rung.op}-{rung.name}",
)
def test_an_unavailable_rung_says_why(rung: ladder.Rung) -> None:
    assert rung.unavailable
    assert "\n" not in rung.unavailable
    with pytest.raises(RuntimeError) as raised:
        rung(torch.ones(1))
    assert str(raised.value) == (
        f"[ladder] {rung.op}/{rung.name} must be available but got: {rung.unavailable}"
    )


@pytest.mark.parametrize("op", ["rope", "gelu_linear"])
@pytest.mark.parametrize(
    "name", ["python", "numpy", "eager", "compile", "cpp", "cpp_fused", "cpp_plan"]
)
def test_the_rungs_of_every_machine_are_available(op: str, name: str) -> None:
    assert ladder.get(op, name).unavailable is None


# What is timed is a part of what is tested: the same call, made ahead.
@pytest.mark.parametrize(("op", "sample"), [("rope", "ids-32-offset"), ("gelu_linear", "33")])
def test_a_prepared_rung_computes_the_same(op: str, sample: str) -> None:
    rung, call = ladder.get(op, "cpp_plan"), SPECS[op].sample(sample).build(torch.float32)
    assert rung.prepare is not None
    prepared = rung.prepare(*call.args, **call.kwargs)
    assert torch.equal(prepared(), rung(*call.args, **call.kwargs))
    assert prepared().data_ptr() != prepared().data_ptr() or prepared() is not prepared()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RuntimeError, match=r"rung of rope must be one of python, numpy, .*'nump'"):
        ladder.get("rope", "nump")
    with pytest.raises(RuntimeError, match=r"op must be one of rope, gelu_linear but got 'rop'"):
        ladder.rungs("rop")


# What a Mac is asked for, on a machine that is none.
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="an MPS device is here")
@pytest.mark.parametrize("op", ["rope", "gelu_linear"])
def test_the_rungs_of_a_gpu_name_what_is_missing(op: str) -> None:
    for name in ("mps_eager", "metal_fused"):
        assert ladder.get(op, name).unavailable == "torch finds no MPS device here"
        assert ladder.get(op, name).device == "mps"


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is here")
@pytest.mark.parametrize("op", ["rope", "gelu_linear"])
def test_the_rung_of_core_ml_names_what_is_missing(op: str) -> None:
    rung = ladder.get(op, "coreml")
    assert rung.unavailable == "Core ML programs run on macOS only"
    assert rung.dtypes == (torch.float16,)


@pytest.mark.parametrize(
    ("mps", "kernels", "reason"),
    [
        (True, True, None),
        (True, False, "this build has no Metal kernels"),
        (False, True, "torch finds no MPS device here"),
    ],
)
def test_what_a_metal_rung_needs(
    mps: bool, kernels: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: kernels)
    assert device._metal_missing() == reason


# The work ahead is the conversion; a call is a prediction.
@pytest.mark.parametrize(
    ("op", "sample", "wants"),
    [
        ("rope", "ids-32-offset", {"offset": 11, "interleaved": False}),
        ("gelu_linear", "33-tanh", {"rows": torch.Size((6,)), "approximate": "tanh"}),
    ],
)
def test_the_rung_of_core_ml_converts_ahead(
    op: str, sample: str, wants: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, object]] = []

    def program(*args: object, **options: object) -> object:
        made.append(options)
        return lambda x: x + 1

    monkeypatch.setattr(coreml, op, program)
    rung, call = ladder.get(op, "coreml"), SPECS[op].sample(sample).build(torch.float16)
    assert rung.prepare is not None
    run = rung.prepare(*call.args, **call.kwargs)
    assert torch.equal(run(), call.tensors[0] + 1)
    assert torch.equal(run(), call.tensors[0] + 1)
    assert len(made) == 1
    assert made[0].items() >= wants.items()


def test_a_device_rung_brings_its_result_back() -> None:
    x = torch.randn(3, 4)
    doubled = device.on("meta", lambda t: torch.ones_like(t, device="cpu") * len(t.shape))
    assert torch.equal(doubled(x), torch.full((3, 4), 2.0))


@pytest.mark.parametrize("z", [-6.0, -0.5, 0.0, 1e-9, 0.4, 1.0, 3.0, 9.2, 18.3, 26.0])
def test_numpy_erfc_against_mpmath(z: float) -> None:
    expected = mpmath.erfc(mpmath.mpf(z))
    assert abs(mpmath.mpf(float(erfc(np.array(z)))) - expected) <= 1e-15 * expected


def test_numpy_erfc_at_its_ends() -> None:
    z = np.array([-np.inf, 28.0, np.inf, np.nan])
    np.testing.assert_array_equal(erfc(z), [2.0, 0.0, 0.0, np.nan])


def test_eager_is_the_reference() -> None:
    assert ladder.get("rope", "eager").function is reference.rope
    assert ladder.get("gelu_linear", "eager").function is reference.gelu_linear
