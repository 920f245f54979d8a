"""linear's activations: what they refuse, how they differentiate, the compiler, special values.

Their numbers over samples and bit patterns are the business of test_accuracy.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import assert_refused
from test_gelu import exact_derivative
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional

import fusedops
from fusedops import reference
from fusedops.testing import DTYPES, assert_same_bits, assert_within

ops = torch.ops.fusedops

each_activation = pytest.mark.parametrize("activation", reference.ACTIVATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def layer(rows: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Input, weight [4, 5] and bias, which require grad; no sum is near relu's kink."""
    leaves = [torch.randn(rows, 5), torch.randn(4, 5), torch.randn(4)]
    return [t.to(dtype).requires_grad_() for t in leaves]


@pytest.mark.parametrize("name", ["", "none", "GELU", "tanh"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_unknown_activation_is_refused(name: str, requires_grad: bool) -> None:
    x, w = torch.randn(2, 3, requires_grad=requires_grad), torch.randn(4, 3)
    *names, last = reference.ACTIVATIONS
    known = "'" + "', '".join(names) + f"' or '{last}'"
    message = f"activation must be {known} but got '{name}'"
    assert_refused(lambda: fusedops.linear(x, w, activation=name), f"[linear] {message}", x, w)
    mapped = torch.func.vmap(lambda x: fusedops.linear(x, w, activation=name))
    assert_refused(lambda: mapped(x.detach()), f"[linear] {message}", x)
    raw = lambda: ops.activation_backward(x, x, name)  # noqa: E731
    assert_refused(raw, f"[activation_backward] {message}", x)


def test_shapes_are_checked_as_without_one() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 5)
    message = "[linear] input's last dimension must be weight's K = 5 but got shape [2, 3]"
    assert_refused(lambda: fusedops.linear(x, w, activation="relu"), message, x, w)


def test_none_is_linear() -> None:
    x, w, b = (t.detach() for t in layer())
    assert_same_bits(fusedops.linear(x, w, b, activation=None), fusedops.linear(x, w, b))


@each_activation
@each_dtype
@pytest.mark.parametrize("rows", [1, 70])
def test_special_sums(rows: int, dtype: str, activation: str, isa: str) -> None:
    """NaN stays, infinities go to the limits, and an infinite bias leaves other columns alone."""
    x, w = torch.zeros(rows, 3, dtype=DTYPES[dtype]), torch.zeros(6, 3, dtype=DTYPES[dtype])
    b = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 2.0, -2.0], dtype=DTYPES[dtype])
    y = fusedops.linear(x, w, b, activation=activation)
    expected = reference.activate(b.double(), activation).to(b.dtype).expand(rows, 6)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True)


@each_activation
def test_gradcheck(activation: str) -> None:
    call = lambda *t: fusedops.linear(*t, activation=activation)  # noqa: E731
    inputs = layer()
    assert gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, inputs)
    raw = lambda *t: ops.linear_activation(*t, activation)  # noqa: E731
    assert gradcheck(raw, inputs)
    assert gradgradcheck(raw, inputs)


def slope(x: Tensor, activation: str) -> Tensor:
    """The derivative in float64."""
    if activation == "relu":
        return (x > 0).double()
    if activation == "relu2":
        return 2 * torch.relu(x)
    if activation == "silu":
        return torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))
    return exact_derivative(x, {"gelu": "none"}.get(activation, activation.removeprefix("gelu_")))


@each_activation
@each_dtype
def test_backward_is_accurate(dtype: str, activation: str, isa: str) -> None:
    """Two terms below 1.2 in size (relu2: one that doubles x), as in test_gelu.py."""
    kind = DTYPES[dtype]
    x, grad = torch.linspace(-14, 14, 3001).to(kind), torch.randn(3001).to(kind)
    expected = grad.double() * slope(x.double(), activation)
    eps = torch.finfo(torch.promote_types(kind, torch.float32)).eps
    bound = torch.finfo(kind).eps * expected.abs() + 3 * eps * grad.double().abs()
    bound += torch.finfo(kind).smallest_normal * torch.finfo(kind).eps
    assert_within(ops.activation_backward(grad, x, activation), expected, bound)


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_slope_at_zero_is_pytorchs(activation: str, isa: str) -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -1.0])
    slope = torch.tensor([0.0, 0.0, 1.0 if activation == "relu" else 2.0, 0.0])
    assert torch.equal(ops.activation_backward(torch.ones(4), x, activation), slope)


@each_activation
def test_transforms(activation: str) -> None:
    x, w, b = (t.detach() for t in layer())
    call = lambda x: fusedops.linear(x, w, b, activation=activation)  # noqa: E731
    formula = lambda x: reference.linear(x, w, b, activation=activation)  # noqa: E731
    tangent = torch.randn_like(x)
    expected = torch.func.jvp(formula, (x,), (tangent,))[1]
    torch.testing.assert_close(torch.func.jvp(call, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    torch.testing.assert_close(torch.func.vmap(call)(x), formula(x))


@each_activation
def test_compiled(activation: str) -> None:
    torch._dynamo.reset()
    leaves = layer(dtype=torch.float32)
    run = lambda *t: fusedops.linear(*t, activation=activation)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_bits(compiled(*leaves), run(*leaves))
    grads = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, run)]
    torch.testing.assert_close(*grads)


def test_autocast() -> None:
    x, w, b = (t.detach() for t in layer(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fusedops.linear(x, w, b, activation="silu")
        expected = functional.silu(functional.linear(x, w, b))
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_meta_tensors_keep_the_shape() -> None:
    x, w = torch.empty(2, 7, 3, device="meta"), torch.empty(4, 3, device="meta")
    assert fusedops.linear(x, w, activation="relu").shape == (2, 7, 4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_relu_of_nan_whatever_its_sign(activation: str, sign: float, isa: str) -> None:
    z = torch.tensor([math.nan, 1.0]).copysign(torch.tensor(sign))
    z[1] = 1.0
    dz = torch.ops.fusedops.activation_backward(torch.ones(2), z, activation)
    assert dz[0].item() == 0 if activation == "relu" else dz[0].isnan()
    assert dz[1].item() == (1 if activation == "relu" else 2)


# torch multiplies an infinity by 0: NaN for -inf, and for the gradients at both infinities.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "gelu_quick", "silu"])
def test_infinite_sums_give_the_limit_where_torch_gives_nan(
    activation: str, dtype: str, isa: str
) -> None:
    kind = DTYPES[dtype]
    one = torch.ones(1, 1, dtype=kind)
    x = torch.tensor([[-math.inf], [math.inf], [math.nan]], dtype=kind, requires_grad=True)
    y = fusedops.linear(x, one, activation=activation)
    limits = torch.tensor([-0.0, math.inf, math.nan], dtype=kind)
    assert_same_bits(y.detach().flatten(), limits)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.flatten()[:2].tolist() == [0.0, 1.0]
    assert dx[2].isnan()
    if activation != "silu":
        approximate = {"gelu": "none"}.get(activation, activation[5:])
        for weight in (one, fusedops.pack_linear(one)):
            again = fusedops.gelu_linear(x.detach(), weight, approximate=approximate)
            assert_same_bits(again.flatten(), limits)


@pytest.mark.parametrize("theirs", [torch.nn.functional.gelu, torch.nn.functional.silu])
def test_torch_gives_nan_for_minus_infinity(theirs: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([-math.inf, math.inf], dtype=torch.float64, requires_grad=True)
    y = theirs(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y[0].isnan()
    assert dx.isnan().all()
