"""The gradients of linear and gelu_linear as kernels: float64, views, thread counts.

Differentiability, twice and in every mode, is the business of test_linear.py and
test_gelu_linear.py; memory at guard pages that of test_bounds.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers import DEVICE, assert_refused, memory, mixed
from test_activation import slope
from test_gelu import exact_derivative
from torch import Tensor
from torch.nn import functional

import fusedops
from fusedops.testing import DTYPES, VIEWS, assert_same_bits, assert_within

ops = torch.ops.fusedops

each_variant = pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)

# Rows around a register, a block of sums (64) and what chooses the matmul (2, 512); odd columns.
SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (5, 17, 3),
    (16, 16, 16),
    (33, 65, 18),
    (63, 31, 70),
    (64, 300, 7),
    (65, 15, 33),
    (130, 257, 40),
    (513, 9, 19),
    (70, 33, 1100),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def a(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def layer(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The gradient, input, weight and pre-activation."""
    return [a(*s, dtype=dtype) for s in ((m, n), (m, k), (n, k), (m, n))]


def exact_dz(grad: Tensor, z: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """In float64 the gradient of the pre-activation, and the bound of the kernel's sum for it.

    7 eps of float32 (float64) are 1.7, the largest size of the derivative's two terms, times the
    7.8 units of 2^-24 that csrc/simd/math.h states, and the product. In float64 the oracle errs as
    much itself.
    """
    wide = torch.finfo(torch.promote_types(z.dtype, torch.float32)).eps
    times = 14 if z.dtype == torch.float64 else 7
    exact = grad.double() * exact_derivative(z, approximate)
    return exact, times * wide * grad.double().abs()


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a result that is rounded once, and subnormals."""
    info = torch.finfo(dtype)
    return info.eps * value.abs() + info.smallest_normal * info.eps


# --- values ---------------------------------------------------------------------------------------


# A sum of m terms adds one by one in chains of 64: at most 64 roundings of partial sums, each below
# the sum of magnitudes, and one for every doubling of rows after.
@each_variant
@each_dtype
@each_shape
def test_dz_and_its_sums(shape: Any, dtype: str, approximate: str, isa: str) -> None:
    grad, _, _, z = layer(*shape, dtype=DTYPES[dtype])
    before = grad.clone(), z.clone()
    dz, db = ops.gelu_linear_dz(grad, z, approximate)
    expected, error = exact_dz(grad, z, approximate)
    assert_within(dz, expected, error + rounding(expected, DTYPES[dtype]))
    wide = torch.finfo(torch.promote_types(DTYPES[dtype], torch.float32)).eps
    bound = error.sum(0) + 64 * wide * expected.abs().sum(0)
    assert_within(db, expected.sum(0), bound + rounding(expected.sum(0), DTYPES[dtype]))
    assert_same_bits(grad, before[0])
    assert_same_bits(z, before[1])


# dz enters the products as it was rounded: the bound is that of linear on these numbers. bf16 pairs
# take subnormals as zero.
@each_dtype
@each_shape
@pytest.mark.parametrize("form", ["linear", "gelu_linear"])
def test_products(form: str, shape: Any, dtype: str, isa: str) -> None:
    grad, x, w, z = layer(*shape, dtype=DTYPES[dtype])
    if form == "linear":
        dz = grad
        dx, dw, db = ops.linear_backward(grad, x, w, True)
        assert_same_bits(db, ops.linear_backward(grad, None, None, True)[2])
    else:
        dz, expected = ops.gelu_linear_dz(grad, z, "none")
        dx, dw, db = ops.gelu_linear_backward(grad, x, w, z, "none", True)
        assert_same_bits(db, expected)
    for actual, left, right in ((dx, dz, w), (dw, dz.t(), x)):
        left, right = left.double(), right.double()
        wide = torch.finfo(torch.promote_types(DTYPES[dtype], torch.float32)).eps
        scale = left.abs() @ right.abs()
        bound = (left.shape[1] + 1) * wide * scale + 2.0**-126 * (
            left.abs().sum(1, keepdim=True) + right.abs().sum(0)
        )
        assert_within(actual, left @ right, bound + rounding(left @ right, DTYPES[dtype]))


# linear's gelu is the op of gelu_linear by another name; of the others, dz is that of the
# elementwise op, and the bias gradient sums what was not rounded.
@each_dtype
@pytest.mark.parametrize("activation", ["relu", "relu2", "silu", "gelu", "gelu_tanh", "gelu_quick"])
@pytest.mark.parametrize("rows", [1, 70, 600])
def test_every_activation(rows: int, activation: str, dtype: str, isa: str) -> None:
    grad, x, w, z = layer(rows, 33, 18, dtype=DTYPES[dtype])
    found = ops.linear_activation_backward(grad, x, w, z, activation, True)
    variant = {"gelu": "none", "gelu_tanh": "tanh", "gelu_quick": "quick"}.get(activation)
    if variant is not None:
        expected = ops.gelu_linear_backward(grad, x, w, z, variant, True)
    else:
        dz = ops.activation_backward(grad, z, activation)
        expected = (*ops.linear_backward(dz, x, w, False)[:2], found[2])
        wide = grad.double() * slope(z.double(), activation)
        eps = torch.finfo(torch.promote_types(DTYPES[dtype], torch.float32)).eps
        bound = 3 * eps * grad.double().abs().sum(0) + 64 * eps * wide.abs().sum(0)
        bound += 3 * eps * (z.double() * grad.double()).abs().sum(0)
        assert_within(found[2], wide.sum(0), bound + rounding(wide.sum(0), DTYPES[dtype]))
    for actual, wanted in zip(found, expected, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_error_is_that_of_pytorch_at_most(dtype: str, seed: int, isa: str) -> None:
    torch.manual_seed(seed)
    grad, x, w, z = layer(600, 48, 40, dtype=DTYPES[dtype])
    ours = ops.gelu_linear_backward(grad, x, w, z, "none", True)
    dz = torch.ops.aten.gelu_backward(grad, z)
    theirs = dz @ w, dz.t() @ x, dz.sum(0)
    exact, _ = exact_dz(grad, z, "none")
    truth = exact @ w.double(), exact.t() @ x.double(), exact.sum(0)
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        own, rival = ((t.double() - true).square().mean().sqrt() for t in (mine, other))
        assert own <= 1.05 * rival


# A running sum would stop at 256 in bf16, at 2048 in f16.
@each_dtype
def test_long_sums_do_not_stall(dtype: str, isa: str) -> None:
    rows = 1 << 14
    grad, z = (
        torch.ones(rows, 3, dtype=DTYPES[dtype]),
        torch.full((rows, 3), 30.0).to(DTYPES[dtype]),
    )
    _, db = ops.gelu_linear_dz(grad, z, "none")
    assert_same_bits(db, torch.full((3,), float(rows), dtype=DTYPES[dtype]))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
@each_dtype
def test_empty(shape: tuple[int, int, int], dtype: str, isa: str) -> None:
    grad, x, w, z = layer(*shape, dtype=DTYPES[dtype])
    found = ops.gelu_linear_backward(grad, x, w, z, "none", True)
    dz, db = ops.gelu_linear_dz(grad, z, "none")
    for actual, expected in zip(found, (dz @ w, dz.t() @ x, db), strict=True):
        assert_same_bits(actual, expected)
    assert (dz.shape, db.shape) == (grad.shape, grad.shape[1:])
    assert shape[0] > 0 or (db == 0).all()


# --- what is not a number -------------------------------------------------------------------------


@each_variant
@each_dtype
@pytest.mark.parametrize("rows", [20, 600])
def test_nan_and_infinity(rows: int, dtype: str, approximate: str, isa: str) -> None:
    grad, x, w, z = layer(rows, 37, 18, dtype=DTYPES[dtype])
    z.abs_().add_(0.5)
    grad[3, 5], grad[4, 30], z[7, 36], x[9, 2], w[11, 3] = math.nan, math.inf, math.nan, math.inf, 1
    dx, dw, db = ops.gelu_linear_backward(grad, x, w, z, approximate, True)
    dz = grad.double() * exact_dz(torch.ones_like(grad), z, approximate)[0]
    dz[4, 30] = math.inf
    expected = dz @ w.double(), dz.t() @ x.double(), dz.sum(0)
    for actual, wanted in zip((dx, dw, db), expected, strict=True):
        assert torch.equal(actual.isnan(), wanted.isnan())
        assert torch.equal(actual.isinf(), wanted.isinf())
        assert actual.isfinite().any()


# An odd number of rows of the weight: pairs of bf16 have half a pair left.
@each_dtype
@pytest.mark.parametrize("n", [1, 33])
def test_what_lies_behind_the_weight_does_not_matter(n: int, dtype: str, isa: str) -> None:
    grad, x, w, _ = layer(7, n, 18, dtype=DTYPES[dtype])
    more = torch.full((n + 4, 18), math.nan, dtype=DTYPES[dtype])
    more[:n] = w
    expected = ops.linear_backward(grad, x, w, False)
    assert_same_bits(ops.linear_backward(grad, x, more[:n], False)[0], expected[0])
    assert not expected[0].isnan().any()


# --- threads, views -------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_dtype
@pytest.mark.parametrize("shape", [(600, 700, 20), (70, 1500, 33)])
def test_bits_do_not_depend_on_threads(
    shape: Any, dtype: str, threads: Callable[[int], None]
) -> None:
    grad, _, _, z = layer(*shape, dtype=DTYPES[dtype])
    threads(1)
    expected = ops.gelu_linear_dz(grad, z, "none")
    for count in (2, 3, 5):
        threads(count)
        for actual, wanted in zip(ops.gelu_linear_dz(grad, z, "none"), expected, strict=True):
            assert_same_bits(actual, wanted)


@each_dtype
@pytest.mark.parametrize(
    ("which", "view"),
    [
        (which, view)
        for which in ("grad", "z", "input", "weight")
        for view in VIEWS
        if (which, view) != ("weight", "outer_swapped")  # of three dimensions
    ],
)
def test_every_view(which: str, view: str, dtype: str) -> None:
    shapes = {"grad": (2, 3, 35), "input": (2, 3, 19), "weight": (35, 19), "z": (2, 3, 35)}
    named = {name: a(*shape, dtype=DTYPES[dtype]) for name, shape in shapes.items()}
    seen = VIEWS[view](named[which])
    named[which] = seen.clone(memory_format=torch.contiguous_format)
    run = lambda t: ops.gelu_linear_backward(  # noqa: E731
        t["grad"], t["input"], t["weight"], t["z"], "none", True
    )
    expected, before = run(named), memory(seen)
    for actual, wanted in zip(run({**named, which: seen}), expected, strict=True):
        assert_same_bits(actual, wanted)
    assert torch.equal(memory(seen), before)


# The gradient of a sum has no memory of its own.
EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda t: t[0, 0, 0].expand(t.shape),
    "rows": lambda t: t[0, 0].expand(t.shape),
    "columns": lambda t: t[..., :1].expand(t.shape),
    "batch": lambda t: t[:1].expand(t.shape),
}


@each_dtype
@pytest.mark.parametrize("kind", EXPANDED)
@pytest.mark.parametrize("form", ["linear", "gelu_linear"])
@pytest.mark.parametrize("rows", [3, 300])
def test_expanded_gradients(rows: int, form: str, kind: str, dtype: str, isa: str) -> None:
    shapes = ((2, rows, 35), (2, rows, 19), (35, 19), (2, rows, 35))
    whole, x, w, z = (a(*s, dtype=DTYPES[dtype]) for s in shapes)
    grad = EXPANDED[kind](whole)
    run = (
        (lambda g: ops.linear_backward(g, x, w, True))
        if form == "linear"
        else (lambda g: ops.gelu_linear_backward(g, x, w, z, "none", True))
    )
    for actual, wanted in zip(run(grad), run(grad.contiguous()), strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0)])
@pytest.mark.parametrize("rows", [4, 600])
@each_dtype
def test_only_what_is_asked_for(wanted: Any, rows: int, dtype: str) -> None:
    grad, x, w, z = layer(rows, 33, 17, dtype=DTYPES[dtype])
    whole = ops.gelu_linear_backward(grad, x, w, z, "none", True)
    to_input, to_weight, to_bias = map(bool, wanted)
    some = ops.gelu_linear_backward(
        grad, x if to_weight else None, w if to_input else None, z, "none", to_bias
    )
    for actual, expected, want in zip(some, whole, wanted, strict=True):
        assert_same_bits(actual, expected if want else grad.new_empty(0))


# --- what autograd keeps and returns --------------------------------------------------------------


def kept(run: Callable[..., Tensor], leaves: dict[str, Tensor]) -> set[str]:
    """Which of the leaves autograd holds for backward; "z" for anything else."""
    names = {t.data_ptr(): name for name, t in leaves.items()}
    found: set[str] = set()

    def pack(t: Tensor) -> Tensor:
        found.add(names.get(t.data_ptr(), "z"))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(*leaves.values())
    return found


@pytest.mark.parametrize(
    ("learned", "expected"),
    [
        ("x", {"w"}),
        ("w", {"x"}),
        ("b", set()),
        ("xb", {"w"}),
        ("wb", {"x"}),
        ("xw", {"x", "w"}),
        ("xwb", {"x", "w"}),
    ],
)
def test_frozen_arguments_keep_nothing_alive(learned: str, expected: set[str]) -> None:
    leaves = {"x": a(6, 3), "w": a(5, 3), "b": a(5)}
    for name in learned:
        leaves[name].requires_grad_()
    assert kept(fusedops.linear, leaves) == expected
    for run in (
        fusedops.gelu_linear,
        partial(fusedops.linear, activation="relu"),
        partial(fusedops.linear, activation="gelu"),
    ):
        assert kept(run, leaves) == expected | {"z"}


@each_dtype
@pytest.mark.parametrize("save", ["preact", "none"])
def test_gradient_of_a_sum(save: str, dtype: str) -> None:
    leaves = [t.requires_grad_() for t in (a(2, 40, 19), a(33, 19), a(33))]
    leaves = [t.detach().to(DTYPES[dtype]).requires_grad_() for t in leaves]
    y = fusedops.gelu_linear(*leaves, save=save)
    actual = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for mine, wanted in zip(actual, expected, strict=True):
        assert_same_bits(mine, wanted)


FORWARD: dict[str, Callable[..., Tensor]] = {
    "linear": fusedops.linear,
    "linear-relu2": partial(fusedops.linear, activation="relu2"),
    "linear-silu": partial(fusedops.linear, activation="silu"),
    "linear_activation": lambda *t: ops.linear_activation(*t, "silu"),
    "gelu_linear": fusedops.gelu_linear,
    "gelu_linear-none": partial(fusedops.gelu_linear, save="none"),
}


# A graph of the gradient takes another way to the same numbers.
@pytest.mark.parametrize("form", FORWARD)
def test_recorded_backward_agrees(form: str) -> None:
    leaves = [t.requires_grad_() for t in (a(70, 19), a(33, 19), a(33))]
    y = FORWARD[form](*leaves)
    grad = a(70, 33)
    plain = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    recorded = torch.autograd.grad(y, leaves, grad, create_graph=True)
    torch.testing.assert_close(plain, recorded, rtol=1e-5, atol=5e-5)  # sums in another order
    assert all(not t.requires_grad for t in plain)


# autocast is on in a backward that is called in its region, where save="none" runs the forward too.
@pytest.mark.parametrize("save", ["preact", "none"])
@pytest.mark.parametrize("rows", [1, 40])
def test_backward_inside_autocast_keeps_its_dtype(rows: int, save: str) -> None:
    leaves = [t.requires_grad_() for t in (a(rows, 19), a(33, 19), a(33))]
    y, grad = fusedops.gelu_linear(*leaves, save=save), a(rows, 33)
    expected = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = torch.autograd.grad(y, leaves, grad)
    for mine, wanted in zip(actual, expected, strict=True):
        assert_same_bits(mine, wanted)


def test_an_eager_layer_learns_the_same() -> None:
    leaves = [t.requires_grad_() for t in (a(40, 19), a(33, 19), a(33))]
    twins = [t.detach().clone().requires_grad_() for t in leaves]
    fusedops.gelu_linear(*leaves).square().sum().backward()
    functional.gelu(functional.linear(*twins)).square().sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-4, atol=1e-4)


# Refused before a copy of all of its elements is made.
@pytest.mark.skipif(DEVICE != "mps", reason="a limit of MPS")
@pytest.mark.parametrize("form", ["linear", "gelu_linear", "dz"])
def test_expanded_grad_past_32_bits_is_refused(form: str) -> None:
    grad = torch.zeros(1).expand(2**16, 2**16)
    calls: dict[str, Callable[[], object]] = {
        "linear": lambda: ops.linear_backward(grad, None, None, True),
        "gelu_linear": lambda: ops.gelu_linear_backward(grad, None, None, grad, "none", True),
        "dz": lambda: ops.gelu_linear_dz(grad, grad, "none"),
    }
    with pytest.raises(RuntimeError, match=r"grad must have at most 2\^32 - 256 elements on MPS"):
        calls[form]()


# --- errors ---------------------------------------------------------------------------------------

FLOATING = "grad must be float32, float16, bfloat16 or float64 but got "
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "grad-int": ({"grad": torch.ones(2, 3, 5, dtype=torch.int32)}, FLOATING + "Int"),
    "grad-0-d": (
        {"grad": torch.tensor(1.0)},
        "grad must have at least 1 dimension but got shape []",
    ),
    "input-dtype": (
        {"input": torch.ones(2, 3, 4, dtype=torch.float64)},
        "input must have grad's dtype Float but got Double",
    ),
    "weight-dtype": (
        {"weight": torch.ones(5, 4, dtype=torch.bfloat16)},
        "weight must have grad's dtype Float but got BFloat16",
    ),
    "input-rank": (
        {"input": torch.ones(6, 4)},
        "input must have grad's shape [2, 3, 5] but for the last dimension but got [6, 4]",
    ),
    "input-rows": (
        {"input": torch.ones(2, 2, 4)},
        "input must have grad's shape [2, 3, 5] but for the last dimension but got [2, 2, 4]",
    ),
    "weight-rank": (
        {"weight": torch.ones(5)},
        "weight must be [N, K] with N = 5 but got shape [5]",
    ),
    "weight-n": (
        {"weight": torch.ones(4, 4)},
        "weight must be [N, K] with N = 5 but got shape [4, 4]",
    ),
    "k": (
        {"input": torch.ones(2, 3, 3)},
        "input's last dimension must be weight's K = 4 but got shape [2, 3, 3]",
    ),
    "z-dtype": (
        {"z": torch.ones(2, 3, 5, dtype=torch.float16)},
        "z must have grad's dtype Float but got Half",
    ),
    "z-shape": ({"z": torch.ones(6, 5)}, "z must have grad's shape [2, 3, 5] but got [6, 5]"),
    "device": (
        {"z": torch.ones(2, 3, 5, device="meta"), "weight": torch.ones(5, 4, device="meta")},
        f"tensors must be on one device but got {mixed('meta')}",
    ),
    "approximate": (
        {"approximate": "erf"},
        "approximate must be 'none', 'tanh' or 'quick' but got 'erf'",
    ),
    "activation": (
        {"activation": "none"},
        "activation must be 'relu', 'relu2', 'silu', 'gelu', 'gelu_tanh' or 'gelu_quick' but got "
        "'none'",
    ),
}

FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "linear_backward": ("linear_backward", ("grad", "input", "weight")),
    "gelu_linear_backward": (
        "gelu_linear_backward",
        ("grad", "input", "weight", "z", "approximate"),
    ),
    "linear_activation_backward": (
        "linear_activation_backward",
        ("grad", "input", "weight", "z", "activation"),
    ),
    "gelu_linear_dz": ("gelu_linear_dz", ("grad", "z", "approximate")),
}


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (form, name)
        for form, (_, arguments) in FORMS.items()
        for name, (change, _) in BAD.items()
        if {*change} <= {*arguments, "weight"} and {*change} & {*arguments}
    ],
)
def test_bad_argument_is_refused(form: str, name: str) -> None:
    op, arguments = FORMS[form]
    change, message = BAD[name]
    good = {"grad": a(2, 3, 5), "input": a(2, 3, 4), "weight": a(5, 4), "z": a(2, 3, 5)}
    given = {**good, "approximate": "none", "activation": "silu", **change}
    values = [given[argument] for argument in arguments]
    if op != "gelu_linear_dz":
        values.append(True)
    tensors = [v for v in values if isinstance(v, Tensor)]
    assert_refused(lambda: getattr(ops, op)(*values), f"[{op}] {message}", *tensors)
