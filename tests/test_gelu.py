"""What gelu refuses, how it differentiates, and what it does with every kind of input.

Its numbers over samples and bit patterns are the business of test_accuracy.py; those of its
gradient are here.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_refused, exact, here, memory, mixed, opcheck
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fusedops
from fusedops.testing import DTYPES, VIEWS, assert_same_bits, assert_within

ops = torch.ops.fusedops

each_variant = pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def exact_derivative(x: Tensor, approximate: str) -> Tensor:
    """The derivative in float64; no term is a small difference of large ones but x near -0.75."""
    if x.dtype != torch.float64:
        x = exact(x)
    if approximate == "none":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * density
    c = 2 * math.sqrt(2 / math.pi)
    quick = approximate == "quick"
    w = 1.702 * x if quick else c * (x + 0.044715 * x**3)
    slope = 1.702 if quick else c * (1 + 3 * 0.044715 * x**2)
    return torch.sigmoid(w) + x * slope * torch.sigmoid(w) * torch.sigmoid(-w)


# --- errors ---------------------------------------------------------------------------------------

FLOATING = "must be float32, float16, bfloat16 or float64 but got"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int64, "Long"),
        (torch.int32, "Int"),
        (torch.uint8, "Byte"),
        (torch.bool, "Bool"),
        (torch.complex64, "ComplexFloat"),
        (torch.float8_e5m2, "Float8_e5m2"),
    ],
)
def test_other_dtypes_are_refused(dtype: torch.dtype, name: str) -> None:
    x = torch.randn(5).to(dtype)
    assert_refused(lambda: fusedops.gelu(x), f"[gelu] x {FLOATING} {name}", x)
    grad = torch.randn(5)
    raw = lambda: ops.gelu_backward(grad, x, "none")  # noqa: E731
    assert_refused(raw, f"[gelu_backward] x {FLOATING} {name}", x, grad)


@pytest.mark.parametrize("approximate", ["erf", "", "None", "TANH"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_unknown_variant_is_refused(approximate: str, requires_grad: bool) -> None:
    x = torch.randn(5, requires_grad=requires_grad)
    message = f"approximate must be 'none', 'tanh' or 'quick' but got '{approximate}'"
    assert_refused(lambda: fusedops.gelu(x, approximate=approximate), f"[gelu] {message}", x)
    raw = lambda: ops.gelu_backward(x, x, approximate)  # noqa: E731
    assert_refused(raw, f"[gelu_backward] {message}", x)


def test_unknown_variant_is_refused_under_a_transform() -> None:
    x = torch.randn(5)
    mapped = torch.func.vmap(lambda x: fusedops.gelu(x, approximate="erf"))
    message = "[gelu] approximate must be 'none', 'tanh' or 'quick' but got 'erf'"
    assert_refused(lambda: mapped(x), message, x)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.ones(5, dtype=torch.float64), "grad must have x's dtype Float but got Double"),
        (torch.ones(4), "grad must have x's shape [5] but got [4]"),
        (torch.ones(1, 5), "grad must have x's shape [5] but got [1, 5]"),
        (torch.ones(5, device="meta"), f"tensors must be on one device but got {mixed('meta')}"),
    ],
    ids=["dtype", "size", "rank", "device"],
)
def test_other_gradient_is_refused(grad: Tensor, message: str) -> None:
    x, grad = torch.randn(5), here(grad)
    assert_refused(lambda: ops.gelu_backward(grad, x, "none"), f"[gelu_backward] {message}", x)


def test_sparse_input_is_refused() -> None:
    x = torch.eye(3).to_sparse()
    message = "[gelu] tensors must be strided but got torch.sparse_coo"
    assert_refused(lambda: fusedops.gelu(x), message)


# --- values that are not numbers, shapes that are not rows ----------------------------------------


# F.gelu gives NaN for -inf in some variants; the limit is 0 from below.
@each_variant
@each_dtype
@pytest.mark.parametrize("count", [1, 40])
def test_special_values(count: int, dtype: str, approximate: str, isa: str) -> None:
    largest = torch.finfo(DTYPES[dtype]).max
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, largest, -largest]
    expected = [math.nan, math.inf, -0.0, 0.0, -0.0, largest, -0.0]
    x, y = (torch.tensor(v, dtype=DTYPES[dtype]).repeat(count) for v in (values, expected))
    assert_same_bits(fusedops.gelu(x, approximate=approximate), y)


@each_variant
@each_dtype
def test_special_values_of_the_gradient(dtype: str, approximate: str, isa: str) -> None:
    largest = torch.finfo(DTYPES[dtype]).max
    x = torch.tensor([math.nan, 0.0, -0.0, largest, -largest], dtype=DTYPES[dtype]).repeat(9)
    slope = torch.tensor([math.nan, 0.5, 0.5, 1.0, 0.0], dtype=DTYPES[dtype]).repeat(9)
    actual = ops.gelu_backward(torch.ones_like(x), x, approximate)
    torch.testing.assert_close(actual, slope, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 1, 70)])
def test_every_view(view: str, shape: tuple[int, ...], isa: str) -> None:
    x = VIEWS[view](torch.randn(shape))
    before = memory(x)
    y = fusedops.gelu(x)
    assert_same_bits(y, fusedops.gelu(x.clone(memory_format=torch.contiguous_format)))
    assert y.stride() == torch.empty_like(x).stride()
    assert torch.equal(memory(x), before)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("grad_view", VIEWS)
def test_every_view_of_gradients(view: str, grad_view: str) -> None:
    x, grad = VIEWS[view](torch.randn(2, 3, 5)), VIEWS[grad_view](torch.randn(2, 3, 5))
    before = memory(x), memory(grad)
    dx = ops.gelu_backward(grad, x, "none")
    assert_same_bits(dx, ops.gelu_backward(*(t.clone().contiguous() for t in (grad, x)), "none"))
    assert torch.equal(memory(x), before[0])
    assert torch.equal(memory(grad), before[1])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1, 1, 1, 7)])
@each_dtype
def test_every_rank(shape: tuple[int, ...], dtype: str) -> None:
    x = torch.randn(shape).to(DTYPES[dtype]).requires_grad_()
    y = fusedops.gelu(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert y.shape == x.grad.shape == shape
    assert_same_bits(y.detach(), fusedops.gelu(x.detach().reshape(-1)).reshape(shape))


# --- gradients ------------------------------------------------------------------------------------


def points() -> Tensor:
    """Both tails, the turn of the slope at -0.75, zero."""
    return torch.tensor([-7.0, -3.1, -0.7518, -0.2, 0.0, 0.4, 1.5, 6.0], dtype=torch.float64)


@each_variant
def test_gradcheck(approximate: str) -> None:
    x = points().requires_grad_()
    call = lambda x: fusedops.gelu(x, approximate=approximate)  # noqa: E731
    assert gradcheck(call, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, (x,), check_batched_grad=True)


@each_variant
def test_gradcheck_of_the_backward_op(approximate: str) -> None:
    inputs = torch.randn(8, dtype=torch.float64, requires_grad=True), points().requires_grad_()
    call = lambda grad, x: ops.gelu_backward(grad, x, approximate)  # noqa: E731
    assert gradcheck(call, inputs, check_forward_ad=True)


# dx = dy * gelu'(x): 3 eps of float32 (float64), one for each of the two terms of gelu', both below
# 1.2 in size, and one for their sum; then half an ulp of the result for each of two roundings.
@each_variant
@each_dtype
def test_gradient_is_accurate(dtype: str, approximate: str, isa: str) -> None:
    kind = DTYPES[dtype]
    x = torch.linspace(-14, 14, 3001).to(kind).requires_grad_()
    grad = torch.randn(3001).to(kind)
    fusedops.gelu(x, approximate=approximate).backward(grad)
    assert x.grad is not None
    expected = exact(grad) * exact_derivative(x.detach(), approximate)
    wide = torch.finfo(torch.promote_types(kind, torch.float32)).eps
    bound = torch.finfo(kind).eps * expected.abs() + 3 * wide * exact(grad).abs()
    bound += torch.finfo(kind).smallest_normal * torch.finfo(kind).eps
    assert_within(x.grad, expected, bound)


def test_gradient_is_not_the_identity() -> None:
    x, grad = torch.randn(5, requires_grad=True), torch.randn(5)
    fusedops.gelu(x).backward(grad)
    assert x.grad is not None
    assert_same_bits(x.grad, ops.gelu_backward(grad, x.detach(), "none"))
    assert not torch.equal(x.grad, grad)


@each_variant
def test_dual_numbers_and_transforms(approximate: str) -> None:
    x, tangent = points(), torch.randn(8, dtype=torch.float64)
    call = lambda x: fusedops.gelu(x, approximate=approximate)  # noqa: E731
    expected = tangent * exact_derivative(x, approximate)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(call(dual)).tangent, expected)
    torch.testing.assert_close(torch.func.jvp(call, (x,), (tangent,))[1], expected)
    torch.testing.assert_close(torch.func.vjp(call, x)[1](tangent)[0], expected)
    slopes = torch.func.vmap(torch.func.grad(lambda x: call(x).sum()))(x)
    torch.testing.assert_close(slopes, exact_derivative(x, approximate))
    raw = lambda x: ops.gelu(x, approximate)  # noqa: E731
    torch.testing.assert_close(torch.func.jvp(raw, (x,), (tangent,))[1], expected)
    torch.testing.assert_close(torch.func.vjp(raw, x)[1](tangent)[0], expected)


# --- opcheck and the compiler ---------------------------------------------------------------------


def op_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    x = torch.randn(3, 5, requires_grad=True)
    grad = torch.randn(3, 5, requires_grad=True)
    calls: dict[str, tuple[str, tuple[Any, ...]]] = {
        "gelu": ("gelu", (x, "none")),
        "gelu-tanh": ("gelu", (x, "tanh")),
        "gelu_nograd": ("gelu_nograd", (x.detach(), "quick")),
        "gelu_backward": ("gelu_backward", (grad, x, "none")),
        "gelu_backward-quick": ("gelu_backward", (grad, x, "quick")),
        "activation_backward": ("activation_backward", (grad, x, "silu")),
        "activation_backward_nograd": (
            "activation_backward_nograd",
            (grad.detach(), x.detach(), "relu2"),
        ),
        "gelu_backward_nograd": ("gelu_backward_nograd", (grad.detach(), x.detach(), "tanh")),
    }
    for name in ("transposed", "outer_swapped", "strided", "sliced", "expanded"):
        view = VIEWS[name](torch.randn(2, 3, 5))
        calls[f"gelu-{name}"] = ("gelu", (view, "none"))
        calls[f"gelu_backward-{name}"] = ("gelu_backward", (torch.randn(2, 3, 5), view, "none"))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("call", op_calls())
def test_opcheck(call: str) -> None:
    op, arguments = op_calls()[call]
    opcheck(getattr(ops, op).default, arguments)


def test_every_op_is_opchecked() -> None:
    names = {name.removeprefix("fusedops::") for name in torch._C._dispatch_get_all_op_names()}
    of_gelu = {n for n in names if n.startswith(("gelu", "activation")) and "linear" not in n}
    assert {op for op, _ in op_calls().values()} == of_gelu


@each_variant
def test_compiled(approximate: str) -> None:
    torch._dynamo.reset()
    run = lambda x: fusedops.gelu(x * 2, approximate=approximate)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, requires_grad=True)
    y, expected = compiled(x), run(x)
    assert_same_bits(y.detach(), expected.detach())
    (actual,), (wanted,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, expected))
    torch.testing.assert_close(actual, wanted)
