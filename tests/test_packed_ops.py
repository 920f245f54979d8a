"""Packed weights as the kernels take them: linear_pack, linear_packed, gelu_linear_packed.

Their numbers are those of linear and gelu_linear, whose bound they are held to.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_refused
from torch import Tensor

import fusedops
from fusedops import reference
from fusedops.testing import DTYPES, SPECS, VIEWS, Call, assert_within

ops = torch.ops.fusedops

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_variant = pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])

HEADER = 64


def layer(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(s).to(dtype) for s in ((m, k), (n, k), (n,)))  # type: ignore[return-value]


def cancelling(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The layer with large terms that cancel: the order of the additions shows in 16 bits too."""
    x, w, _ = tensors
    x[:, [0, -1]], w[:, 0], w[:, -1] = 2.0**14, 1.0, -1.0
    return tensors


def assert_within_bound(y: Tensor, x: Tensor, w: Tensor, b: Tensor | None, **options: str) -> None:
    """The bound of linear, and of gelu_linear where the options say its approximate."""
    spec, call = SPECS["gelu_linear" if options else "linear"], Call((x, w, b), options)
    assert_within(y, spec.oracle(call)[0], spec.error_bound(call, False)[0])


# Rows of every kernel; columns of a part of a panel, of whole ones and one more; odd and long K.
SIZES = [
    (1, 64, 32),
    (1, 65, 33),
    (2, 1, 1),
    (3, 70, 100),
    (4, 128, 1027),
    (7, 33, 2500),
    (16, 200, 64),
    (33, 97, 130),
    (130, 70, 100),
    (65, 130, 1100),
]
each_size = pytest.mark.parametrize(("m", "n", "k"), SIZES)


@each_dtype
@each_size
@pytest.mark.parametrize("bias", [False, True])
def test_linear_packed_is_within_the_bound(
    m: int, n: int, k: int, bias: bool, dtype: str, isa: str
) -> None:
    x, w, b = layer(m, n, k, DTYPES[dtype])
    y = ops.linear_packed(x, ops.linear_pack(w), b if bias else None, n)
    assert (y.shape, y.dtype) == ((m, n), x.dtype)
    assert_within_bound(y, x, w, b if bias else None)


@each_dtype
@each_variant
@pytest.mark.parametrize("m", [1, 5, 40])
def test_gelu_linear_packed_is_within_the_bound(
    m: int, approximate: str, dtype: str, isa: str
) -> None:
    x, w, b = layer(m, 75, 120, DTYPES[dtype])
    y = ops.gelu_linear_packed(x, ops.linear_pack(w), b, 75, approximate)
    assert_within_bound(y, x, w, b, approximate=approximate)


# Memory for the result of so many rows, 75 columns wide.
OUTS: dict[str, Callable[[int], Tensor]] = {
    "contiguous": lambda rows: torch.empty(rows, 75),
    "sliced": lambda rows: torch.empty(rows, 90)[:, 3:78],
    "transposed": lambda rows: torch.empty(75, rows).t(),
    "strided": lambda rows: torch.empty(rows, 150)[:, ::2],
}


@each_dtype
@pytest.mark.parametrize("name", ["linear_packed", "gelu_linear_packed"])
@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("rows", [2, 40])
def test_out_has_the_bits_of_a_fresh_result(
    rows: int, out: str, name: str, dtype: str, isa: str
) -> None:
    x, w, b = layer(rows, 75, 50, DTYPES[dtype])
    arguments = (x, ops.linear_pack(w), b, 75, *(["none"] if name.startswith("gelu") else []))
    given = OUTS[out](rows).to(x.dtype)
    expected = getattr(ops, name)(*arguments)
    getattr(ops, name + "_out")(*arguments, given)
    assert torch.equal(given, expected)


@each_dtype
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rows", [2, 40])
def test_every_view_of_x_has_the_bits_of_its_copy(
    rows: int, view: str, dtype: str, isa: str
) -> None:
    x, w, b = layer(rows, 75, 50, DTYPES[dtype])
    packed, viewed = ops.linear_pack(w), VIEWS[view](x[None])
    expected = ops.linear_packed(viewed.clone().contiguous(), packed, b, 75)
    assert torch.equal(ops.linear_packed(viewed, packed, b, 75), expected)


@each_dtype
@pytest.mark.parametrize(
    "view", ["transposed", "strided", "sliced", "offset", "expanded", "negative"]
)
def test_every_view_of_the_weight_packs_alike(view: str, dtype: str) -> None:
    w = VIEWS[view](torch.randn(70, 35).to(DTYPES[dtype]))
    assert torch.equal(ops.linear_pack(w), ops.linear_pack(w.clone().contiguous()))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_weights(shape: tuple[int, int], isa: str) -> None:
    n, k = shape
    packed, b = ops.linear_pack(torch.randn(shape)), torch.randn(n)
    assert packed.numel() == HEADER
    y = ops.linear_packed(torch.randn(3, k), packed, b, n)
    assert torch.equal(y, b.expand(3, n))


@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 0, 3)])
def test_any_number_of_leading_dimensions(lead: tuple[int, ...]) -> None:
    x, w = torch.randn(*lead, 20), torch.randn(70, 20)
    y = ops.linear_packed(x, ops.linear_pack(w), None, 70)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w))


# The kinds of ways through the engine: up to 6 rows, up to 16, where x is packed, and more. 33 and
# 300 rows differ in how x is packed; 1100 columns are too many to read x where it lies.
@each_dtype
@pytest.mark.parametrize("k", [100, 1031, 2200])
@pytest.mark.parametrize(
    ("whole", "first", "rows", "n"),
    [(300, 40, 33, 150), (300, 283, 17, 150), (16, 9, 7, 1100), (6, 1, 5, 150), (6, 5, 1, 150)],
)
def test_a_row_has_the_same_bits_in_a_batch_of_its_kind(
    whole: int, first: int, rows: int, n: int, k: int, dtype: str, isa: str
) -> None:
    x, w, b = cancelling(layer(whole, n, k, DTYPES[dtype]))
    packed = ops.linear_pack(w)
    y = ops.linear_packed(x, packed, b, n)
    part = ops.linear_packed(x[first : first + rows], packed, b, n)
    assert torch.equal(part, y[first : first + rows])


# Many rows take panels, which are then transposed as they are needed.
@each_dtype
@pytest.mark.parametrize("k", [100, 1031, 2200])
def test_plain_weight_has_the_bits_of_the_packed_one(k: int, dtype: str, isa: str) -> None:
    x, w, b = cancelling(layer(60, 150, k, DTYPES[dtype]))
    assert torch.equal(ops.linear_nograd(x, w, b), ops.linear_packed(x, ops.linear_pack(w), b, 150))


@each_dtype
def test_threads_do_not_change_the_bits(dtype: str, isa: str) -> None:
    x, w, b = layer(200, 520, 1100, DTYPES[dtype])
    packed, threads = ops.linear_pack(w), torch.get_num_threads()
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results += [ops.linear_packed(x, packed, b, 520), ops.linear_packed(x[:3], packed, b, 520)]
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[4])
    assert torch.equal(results[1], results[3])
    assert torch.equal(results[1], results[5])


# A copy may land on any alignment; the bits are the same.
@each_dtype
@pytest.mark.parametrize("shift", [1, 2, 4, 16, 32, 63])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_packed_weight_at_any_alignment(rows: int, shift: int, dtype: str, isa: str) -> None:
    x, w, b = layer(rows, 75, 130, DTYPES[dtype])
    packed = ops.linear_pack(w)
    moved = torch.empty(packed.numel() + 64, dtype=torch.uint8)[shift:][: packed.numel()]
    moved.copy_(packed)
    y = ops.linear_packed(x, packed, b, 75)
    assert torch.equal(ops.linear_packed(x, moved, b, 75), y)
    assert torch.equal(ops.linear_packed(x, packed.clone(), b, 75), y)


@each_dtype
def test_nan_and_infinity_reach_their_elements_only(dtype: str, isa: str) -> None:
    for m in (1, 3, 50):
        x, w, b = layer(m, 70, 101, DTYPES[dtype])
        x[0, 100], w[3, 5], w[69, 100], b[1] = torch.nan, torch.inf, torch.nan, -torch.inf
        y = ops.linear_packed(x, ops.linear_pack(w), b, 70)
        expected = reference.linear(x.double(), w.double(), b.double())
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y == torch.inf, expected == torch.inf)
        assert torch.equal(y == -torch.inf, expected == -torch.inf)


# --- errors ---------------------------------------------------------------------------------------

WHAT = "packed must be a weight as fusedops::linear_pack returns it"


def _changed(packed: Tensor, at: int, *values: int) -> Tensor:
    packed = packed.clone()
    packed[at : at + len(values)] = torch.tensor(values, dtype=torch.uint8)
    return packed


BAD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "weight": (lambda p: torch.randn(70, 20), f"{WHAT}, contiguous bytes, but got Float of shape"),
    "matrix": (lambda p: p.view(2, -1), f"{WHAT}, contiguous bytes, but got Byte of shape"),
    "strided": (
        lambda p: torch.stack((p, p), 1)[:, 0],
        f"{WHAT}, contiguous bytes, but got Byte of shape",
    ),
    "empty": (lambda p: p[:0], f"{WHAT} but got 0 bytes, less than its header"),
    "header-only": (lambda p: p[:63], f"{WHAT} but got 63 bytes, less than its header"),
    "zeros": (torch.zeros_like, f"{WHAT} but got other bytes (its first 8 are not 'fusedops')"),
    "layout": (lambda p: _changed(p, 8, 77), "packed must have layout "),
    "isa": (lambda p: _changed(p, 16, 120), "packed must be packed for the ISA in use, "),
    "dtype": (lambda p: _changed(p, 12, 9), f"{WHAT} but got a header that names no dtype or size"),
    "size": (
        lambda p: _changed(p, 39, 128),
        f"{WHAT} but got a header that names no dtype or size",
    ),
    "huge": (
        lambda p: _changed(p, 44, 1),
        "packed must hold the [70, 4294967316] elements that its header names but got ",
    ),
    "columns": (lambda p: _changed(p, 48, 3), "packed must hold "),
    "truncated": (lambda p: p[:-1], "packed must hold the "),
    "longer": (lambda p: torch.cat((p, p[:1])), "packed must hold the "),
    "other-n": (
        lambda p: ops.linear_pack(torch.randn(71, 20)),
        "out_features must be the packed weight's N = 71 but got 70",
    ),
    "other-k": (
        lambda p: ops.linear_pack(torch.randn(70, 21)),
        "input's last dimension must be weight's K = 21 but got shape [3, 20]",
    ),
    "other-dtype": (
        lambda p: ops.linear_pack(torch.randn(70, 20).half()),
        "weight must have input's dtype Float but got Half",
    ),
}

FORMS: dict[str, tuple[str, Callable[..., object]]] = {
    "linear_packed": ("linear", lambda *a: ops.linear_packed(*a, 70)),
    "linear_packed_out": (
        "linear",
        lambda *a: ops.linear_packed_out(*a, 70, torch.empty(3, 70)),
    ),
    "gelu_linear_packed": ("gelu_linear", lambda *a: ops.gelu_linear_packed(*a, 70, "none")),
    "gelu_linear_packed_out": (
        "gelu_linear",
        lambda *a: ops.gelu_linear_packed_out(*a, 70, "none", torch.empty(3, 70)),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_is_no_packed_weight_is_refused(
    form: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    op, call = FORMS[form]
    packed = change(ops.linear_pack(torch.randn(70, 20)))
    with pytest.raises(RuntimeError) as caught:
        call(torch.randn(3, 20), packed, torch.randn(70))
    assert str(caught.value).startswith(f"[{op}] {message}")


@pytest.mark.parametrize("other", fusedops.isa.supported())
def test_packed_for_another_isa_is_refused(other: str, isa: str) -> None:
    x, w = torch.randn(3, 20), torch.randn(70, 20)
    with fusedops.isa.use(other):
        packed = ops.linear_pack(w)
    if other == isa:
        assert_within_bound(ops.linear_packed(x, packed, None, 70), x, w, None)
        return
    message = (
        f"[linear] packed must be packed for the ISA in use, {isa}, but got one for {other}"
        ": pack the weight again"
    )
    assert_refused(lambda: ops.linear_packed(x, packed, None, 70), message, x, packed)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, 4, dtype=torch.int8), "weight must be float32, float16, bfloat16 or float"),
        (torch.ones(3), "weight must have 2 dimensions [N, K] but got shape [3]"),
        (torch.ones(1, 3, 4), "weight must have 2 dimensions [N, K] but got shape [1, 3, 4]"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        ops.linear_pack(weight)
    assert str(caught.value).startswith(f"[linear_pack] {message}")


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.ones(69), "bias must be [N] = [70] but got shape [69]"),
        (torch.ones(70, 1), "bias must be [N] = [70] but got shape [70, 1]"),
        (torch.ones(70).double(), "bias must have input's dtype Float but got Double"),
    ],
)
def test_wrong_bias_is_refused(bias: Tensor, message: str) -> None:
    x, packed = torch.randn(3, 20), ops.linear_pack(torch.randn(70, 20))
    assert_refused(lambda: ops.linear_packed(x, packed, bias, 70), f"[linear] {message}", x, bias)


def test_out_in_the_packed_weight_is_refused() -> None:
    x, packed = torch.randn(3, 20), ops.linear_pack(torch.randn(70, 20))
    out = packed[HEADER:][: 3 * 70 * 4].view(torch.float32).view(3, 70)
    message = "[linear] out must not share memory with the inputs but got a view of the "
    message += "same memory"
    assert_refused(lambda: ops.linear_packed_out(x, packed, None, 70, out), message, x, packed)
    beside = torch.empty(packed.numel() + 3 * 70 * 4 + 4, dtype=torch.uint8)
    moved = beside[: packed.numel()].copy_(packed)
    behind = beside[packed.numel() :][: 3 * 70 * 4].view(torch.float32).view(3, 70)
    ops.linear_packed_out(x, moved, None, 70, behind)
    assert torch.equal(behind, ops.linear_packed(x, packed, None, 70))
