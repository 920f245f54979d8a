"""What linear and gelu_linear refuse alike; gradients, views and the compiler for linear.

Their numbers over samples are the business of test_accuracy.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_refused, exact, memory, mixed, opcheck
from lane import DEVICE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional

import fusedops
from fusedops.testing import DTYPES, VIEWS, assert_same_bits

ops = torch.ops.fusedops

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


# --- errors: a good call with one thing wrong -----------------------------------------------------


def _into_out(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.ones(*input.shape[:-1], *weight.shape[:1]).to(input.dtype)
    return fusedops.gelu_linear(input, weight, bias, out=out.to(input.device))


FORMS: dict[str, tuple[str, Callable[..., Any]]] = {
    "linear": ("linear", fusedops.linear),
    "linear-op": ("linear", ops.linear),
    "gelu_linear": ("gelu_linear", fusedops.gelu_linear),
    "gelu_linear-out": ("gelu_linear", _into_out),
    "gelu_linear-op": ("gelu_linear", lambda *a: ops.gelu_linear(*a, "none")),
    "gelu_linear_preact": ("gelu_linear", lambda *a: ops.gelu_linear_preact(*a, "none")),
}

FLOATING = "input must be float32, float16, bfloat16 or float64 but got "
LAST = "input's last dimension must be weight's K = 4 but got shape "
BIAS = "bias must be [N] = [5] but got shape "
MIXED = f"tensors must be on one device but got {mixed('meta')}"


def a(*shape: int, dtype: torch.dtype = torch.float32, device: str | None = None) -> Tensor:
    return torch.randn(shape).to(device=device, dtype=dtype)


BAD: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "input-int64": (lambda: {"input": a(3, 4, dtype=torch.int64)}, FLOATING + "Long"),
    "input-int8": (lambda: {"input": a(3, 4, dtype=torch.int8)}, FLOATING + "Char"),
    "input-bool": (lambda: {"input": a(3, 4, dtype=torch.bool)}, FLOATING + "Bool"),
    "input-complex": (lambda: {"input": a(3, 4, dtype=torch.complex64)}, FLOATING + "ComplexFloat"),
    "input-float8": (
        lambda: {"input": a(3, 4, dtype=torch.float8_e4m3fn)},
        FLOATING + "Float8_e4m3fn",
    ),
    "weight-double": (
        lambda: {"weight": a(5, 4, dtype=torch.float64)},
        "weight must have input's dtype Float but got Double",
    ),
    "input-half": (
        lambda: {"input": a(3, 4, dtype=torch.float16)},
        "weight must have input's dtype Half but got Float",
    ),
    "bias-bfloat16": (
        lambda: {"bias": a(5, dtype=torch.bfloat16)},
        "bias must have input's dtype Float but got BFloat16",
    ),
    "input-0-d": (lambda: {"input": a()}, "input must have at least 1 dimension but got shape []"),
    "weight-0-d": (
        lambda: {"weight": a()},
        "weight must have 2 dimensions [N, K] but got shape []",
    ),
    "weight-1-d": (
        lambda: {"weight": a(4)},
        "weight must have 2 dimensions [N, K] but got shape [4]",
    ),
    "weight-3-d": (
        lambda: {"weight": a(1, 5, 4)},
        "weight must have 2 dimensions [N, K] but got shape [1, 5, 4]",
    ),
    "k-long": (lambda: {"input": a(3, 6)}, LAST + "[3, 6]"),
    "k-one": (lambda: {"input": a(3, 1)}, LAST + "[3, 1]"),
    "k-none": (lambda: {"input": a(3, 0)}, LAST + "[3, 0]"),
    "k-1-d": (lambda: {"input": a(5)}, LAST + "[5]"),
    "bias-of-k": (lambda: {"bias": a(4)}, BIAS + "[4]"),
    "bias-one": (lambda: {"bias": a(1)}, BIAS + "[1]"),
    "bias-0-d": (lambda: {"bias": a()}, BIAS + "[]"),
    "bias-row": (lambda: {"bias": a(1, 5)}, BIAS + "[1, 5]"),
    "bias-column": (lambda: {"bias": a(5, 1)}, BIAS + "[5, 1]"),
    "device-input": (lambda: {"input": a(3, 4, device="meta")}, MIXED),
    "device-weight": (lambda: {"weight": a(5, 4, device="meta")}, MIXED),
    "device-bias": (lambda: {"bias": a(5, device="meta")}, MIXED),
    "sparse": (
        lambda: {"input": a(3, 4).to_sparse()},
        "tensors must be strided but got torch.sparse_coo",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused(
    form: str, change: Callable[[], dict[str, Tensor]], message: str
) -> None:
    op, call = FORMS[form]
    good = {"input": a(2, 3, 4), "weight": a(5, 4), "bias": a(5), **change()}
    assert_refused(
        lambda: call(good["input"], good["weight"], good["bias"]),
        f"[{op}] {message}",
        *(t for t in good.values() if t.layout == torch.strided),
    )


# The formula serves transforms: PyTorch would broadcast the bias and take a weight of any rank.
@pytest.mark.parametrize("form", ["linear", "gelu_linear"])
@pytest.mark.parametrize(
    "name",
    [
        "input-int64",
        "weight-double",
        "bias-bfloat16",
        "weight-1-d",
        "k-long",
        "bias-one",
        "bias-row",
    ],
)
def test_transformed_call_refuses_the_same(form: str, name: str) -> None:
    op, call = FORMS[form]
    change, message = BAD[name]
    good = {"input": a(2, 3, 4), "weight": a(5, 4), "bias": a(5), **change()}
    mapped = torch.func.vmap(lambda x: call(x, good["weight"], good["bias"]))
    requirement, _, _ = message.partition(" but got ")
    with pytest.raises(RuntimeError, match=rf"^\[{op}\] {re.escape(requirement)} but got "):
        mapped(good["input"].unsqueeze(0))


# --- values, views and shapes ---------------------------------------------------------------------

# Few rows and many take different kernels; 70 x 100 leaves tails in every direction.
each_size = pytest.mark.parametrize(("rows", "n", "k"), [(3, 70, 100), (130, 70, 100), (60, 5, 33)])


@each_size
@each_dtype
def test_nan_and_infinity_reach_their_elements_only(
    rows: int, n: int, k: int, dtype: str, isa: str
) -> None:
    x, w, b = (torch.randn(s) for s in ((rows, k), (n, k), (n,)))
    x[1, k - 1], x[2, 0], w[0, k // 2], w[n - 1, k - 1] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        torch.nan,
    )
    b[3] = torch.inf
    x[0, 0] = 0.0
    x, w, b = (t.to(DTYPES[dtype]) for t in (x, w, b))
    y = fusedops.linear(x, w, b)
    expected = functional.linear(*map(exact, (x, w, b)))
    y = y.cpu()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y == torch.inf, expected == torch.inf)
    assert torch.equal(y == -torch.inf, expected == -torch.inf)
    assert y.isfinite().any()


MATRIX_VIEWS = ["transposed", "strided", "sliced", "offset", "expanded", "negative"]
ROW_VIEWS = ["strided", "sliced", "offset", "expanded", "negative"]


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_of_the_input(view: str, rows: int, isa: str) -> None:
    x, w, b = VIEWS[view](a(2, rows, 19)), a(33, 19), a(33)
    y = fusedops.linear(x, w, b)
    assert_same_bits(y, fusedops.linear(x.clone(memory_format=torch.contiguous_format), w, b))
    assert y.is_contiguous()


@pytest.mark.parametrize("rows", [1, 80])
@pytest.mark.parametrize("weight_view", MATRIX_VIEWS)
@pytest.mark.parametrize("bias_view", ROW_VIEWS)
def test_every_view_of_weight_and_bias(bias_view: str, weight_view: str, rows: int) -> None:
    x, w, b = a(rows, 19), VIEWS[weight_view](a(33, 19)), VIEWS[bias_view](a(33))
    before = memory(w), memory(b)
    y = fusedops.linear(x, w, b)
    assert_same_bits(y, fusedops.linear(x, *(t.clone().contiguous() for t in (w, b))))
    assert torch.equal(memory(w), before[0])
    assert torch.equal(memory(b), before[1])


# Batches whose rows lie in no single stride; a broadcast one; one of single rows.
@pytest.mark.parametrize(
    "make",
    [
        lambda: a(4, 3, 2, 19).permute(2, 0, 1, 3),
        lambda: a(4, 6, 19)[:, ::2],
        lambda: a(4, 6, 38)[1:3, :5, 19:],
        lambda: a(1, 1, 19).expand(3, 4, 19),
        lambda: a(4, 1, 19).expand(4, 3, 19),
        lambda: a(3, 1).expand(3, 19),
        lambda: a(1, 1, 1, 19),
    ],
    ids=["permuted", "every-other", "window", "one-row", "rows-repeated", "one-element", "ones"],
)
def test_every_stride_of_the_batch(make: Callable[[], Tensor]) -> None:
    x, w = make(), a(33, 19)
    assert_same_bits(fusedops.linear(x, w), fusedops.linear(x.clone().contiguous(), w))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "n"),
    [((4,), 5), ((0, 4), 5), ((2, 0, 4), 5), ((3, 0), 5), ((0,), 5), ((3, 4), 0), ((0, 0), 0)],
)
def test_vectors_and_empties(shape: tuple[int, ...], n: int, bias: bool) -> None:
    leaves = [a(*shape), a(n, shape[-1]), *([a(n)] if bias else [])]
    twins = [t.clone() for t in leaves]
    for t in (*leaves, *twins):
        t.requires_grad_()
    y, expected = fusedops.linear(*leaves), functional.linear(*twins)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad)


# --- gradients ------------------------------------------------------------------------------------


def layer(*shape: int, bias: bool = True) -> list[Tensor]:
    """Input of the shape, weight [4, K] and bias, in float64, all of which require grad."""
    shapes = [shape, (4, shape[-1]), *([(4,)] if bias else [])]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)])
def test_gradcheck(shape: tuple[int, ...], bias: bool) -> None:
    inputs = layer(*shape, bias=bias)
    assert gradcheck(fusedops.linear, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(fusedops.linear, inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some_inputs_only(wanted: tuple[int, ...]) -> None:
    inputs = layer(2, 3)
    for i in {0, 1, 2} - {*wanted}:
        inputs[i].requires_grad_(False)
    assert gradcheck(fusedops.linear, inputs)
    assert gradgradcheck(fusedops.linear, inputs)


def test_dual_numbers_and_transforms() -> None:
    x, w, b = (t.detach() for t in layer(2, 3))
    duals = torch.randn_like(x), torch.randn_like(w), torch.randn_like(b)
    expected = functional.linear(duals[0], w, duals[2]) + functional.linear(x, duals[1])
    with forward_ad.dual_level():
        pairs = zip((x, w, b), duals, strict=True)
        y = fusedops.linear(*(forward_ad.make_dual(*pair) for pair in pairs))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)
    for call in (fusedops.linear, ops.linear):
        torch.testing.assert_close(torch.func.jvp(call, (x, w, b), duals)[1], expected)
    per_row = torch.func.vmap(
        torch.func.grad(lambda w, x: fusedops.linear(x, w, b).sum()), (None, 0)
    )
    torch.testing.assert_close(per_row(w, x), x.unsqueeze(1).expand(2, 4, 3))


# --- opcheck and the compiler ---------------------------------------------------------------------


def op_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    leaves = [t.detach().float().requires_grad_() for t in layer(2, 3)]
    plain = [t.detach() for t in leaves]
    vector = [t.detach().float().requires_grad_() for t in layer(3)]
    return {
        "linear": ("linear", (*leaves,)),
        "linear-no-bias": ("linear", (*leaves[:2], None)),
        "linear-vector": ("linear", (*vector,)),
        "linear-permuted": ("linear", (a(2, 3, 5).permute(1, 2, 0), a(4, 2), None)),
        "linear_backward": ("linear_backward", (a(2, 5), a(2, 3), a(5, 3), True)),
        "linear_backward-recorded": (
            "linear_backward",
            (a(2, 5).requires_grad_(), a(2, 3).requires_grad_(), a(5, 3).requires_grad_(), True),
        ),
        "linear_backward-input": ("linear_backward", (a(2, 5), None, a(5, 3), False)),
        "linear_backward-weight": ("linear_backward", (a(5), a(3), None, False)),
        "linear_backward-bias": ("linear_backward", (a(2, 5), None, None, True)),
        "linear_backward_nograd": ("linear_backward_nograd", (a(2, 5), a(2, 3), a(5, 3), True)),
        "linear_nograd": ("linear_nograd", (*plain,)),
        "linear_nograd-empty": ("linear_nograd", (a(0, 3), *plain[1:])),
        "linear_activation": ("linear_activation", (*leaves, "silu")),
        "linear_activation_nograd": ("linear_activation_nograd", (*plain, "relu")),
        "linear_activation_preact": ("linear_activation_preact", (*leaves, "relu2")),
        "linear_activation_preact_nograd": ("linear_activation_preact_nograd", (*plain, "gelu")),
        "linear_activation_backward": (
            "linear_activation_backward",
            (a(2, 5).requires_grad_(), a(2, 3), a(5, 3), a(2, 5).requires_grad_(), "silu", True),
        ),
        "linear_activation_backward-weight": (
            "linear_activation_backward",
            (a(2, 5), None, a(5, 3), a(2, 5), "relu2", False),
        ),
        "linear_activation_backward_nograd": (
            "linear_activation_backward_nograd",
            (a(2, 5), a(2, 3), None, a(2, 5), "relu", True),
        ),
    }


@pytest.mark.parametrize("call", op_calls())
def test_opcheck(call: str) -> None:
    op, arguments = op_calls()[call]
    opcheck(getattr(ops, op).default, arguments)


def test_every_op_is_opchecked() -> None:
    names = {name.removeprefix("fusedops::") for name in torch._C._dispatch_get_all_op_names()}
    assert {op for op, _ in op_calls().values()} == {
        n for n in names if n.startswith("linear") and "pack" not in n
    }


def test_compiled_for_any_number_of_rows() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    w, b = a(5, 4).requires_grad_(), a(5).requires_grad_()
    run = lambda x: fusedops.linear(x * 2, w, b)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for rows in range(2, 12):
        x = a(rows, 4)
        torch.testing.assert_close(compiled(x), run(x))
        grads = [torch.autograd.grad(f(x).square().sum(), (w, b)) for f in (compiled, run)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool, dtype: str) -> None:
    torch._dynamo.reset()
    leaves = [a(3, 4).requires_grad_(), a(5, 4).requires_grad_(), a(5).requires_grad_()]
    narrow = [t.detach().to(DTYPES[dtype]).requires_grad_() for t in leaves]
    call = fusedops.linear
    if compiled:
        call = torch.compile(fusedops.linear, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, dtype=DTYPES[dtype]):
        y = call(*leaves)
        assert functional.linear(*leaves).dtype == y.dtype == DTYPES[dtype]
    expected = fusedops.linear(*narrow)
    assert_same_bits(y.detach(), expected.detach())
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    for leaf, twin in zip(leaves, narrow, strict=True):
        assert leaf.grad is not None
        assert twin.grad is not None
        assert_same_bits(leaf.grad, twin.grad.float())


def test_autocast_leaves_float64_alone() -> None:
    x, w = a(3, 4, dtype=torch.float64), a(5, 4, dtype=torch.float64)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = fusedops.linear(x, w)
    assert_same_bits(y, fusedops.linear(x, w))


# With autocast off inside, nothing is cast.
def test_autocast_can_be_switched_off() -> None:
    x, w = a(3, 4), a(5, 4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.autocast(DEVICE, enabled=False):
        assert fusedops.linear(x, w).dtype == torch.float32


PACKABLE = torch.ones(3, 2, device="cpu")
BAD_TYPES: dict[str, Callable[[Any], Any]] = {
    "linear input": lambda bad: fusedops.linear(bad, torch.ones(3, 2)),
    "linear weight": lambda bad: fusedops.linear(torch.ones(1, 2), bad),
    "linear bias": lambda bad: fusedops.linear(torch.ones(1, 2), torch.ones(3, 2), bad),
    "gelu_linear input": lambda bad: fusedops.gelu_linear(bad, torch.ones(3, 2)),
    "gelu_linear weight": lambda bad: fusedops.gelu_linear(torch.ones(1, 2), bad),
    "gelu_linear bias": lambda bad: fusedops.gelu_linear(torch.ones(1, 2), torch.ones(3, 2), bad),
    "gelu_linear out": lambda bad: fusedops.gelu_linear(
        torch.ones(1, 2), torch.ones(3, 2), out=bad
    ),
    "linear input packed": lambda bad: fusedops.linear(bad, fusedops.pack_linear(PACKABLE)),
    "gelu_linear input packed": lambda bad: fusedops.gelu_linear(
        bad, fusedops.pack_linear(PACKABLE)
    ),
    "pack_linear weight": lambda bad: fusedops.pack_linear(bad),
    "pack_linear bias": lambda bad: fusedops.pack_linear(PACKABLE, bad),
}


@pytest.mark.parametrize("bad", [None, np.ones((1, 2), np.float32), [[1.0]]], ids=type)
@pytest.mark.parametrize("name", BAD_TYPES)
def test_what_is_no_tensor_is_refused(name: str, bad: Any) -> None:
    op, role, *_ = name.split()
    if bad is None and role in ("bias", "out"):
        assert BAD_TYPES[name](bad) is not None
        return
    message = f"[{op}] {role} must be a torch.Tensor but got {type(bad).__name__}"
    assert_refused(lambda: BAD_TYPES[name](bad), message)
