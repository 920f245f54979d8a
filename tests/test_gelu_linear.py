"""What gelu_linear adds to linear: approximate, save, out=; its gradients, views and the compiler.

What both refuse is in test_linear.py, numbers over samples in test_accuracy.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_refused, exact, memory, mixed, opcheck
from lane import DEVICE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional

import fusedops
from fusedops import reference
from fusedops.testing import DTYPES, VIEWS, assert_same_bits

ops = torch.ops.fusedops

each_variant = pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
each_save = pytest.mark.parametrize("save", ["preact", "none"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def layer(
    *shape: int, n: int = 4, dtype: torch.dtype = torch.float64, bias: bool = True
) -> list[Tensor]:
    """Input of the shape, weight [N, K] and bias, all of which require grad."""
    shapes = [shape, (n, shape[-1]), *([(n,)] if bias else [])]
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def plain(*shape: int, n: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same without grad."""
    return [t.detach() for t in layer(*shape, n=n, dtype=dtype)]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("approximate", ["erf", "", "Tanh"])
@pytest.mark.parametrize("recorded", [False, True])
@each_save
def test_unknown_variant_is_refused(save: str, recorded: bool, approximate: str) -> None:
    tensors = layer(2, 3) if recorded else plain(2, 3)
    message = f"[gelu_linear] approximate must be 'none', 'tanh' or 'quick' but got '{approximate}'"
    call = lambda: fusedops.gelu_linear(*tensors, approximate=approximate, save=save)  # noqa: E731
    assert_refused(call, message, *tensors)


@pytest.mark.parametrize("save", ["", "all", "None", "input"])
@pytest.mark.parametrize("recorded", [False, True])
def test_unknown_save_is_refused(recorded: bool, save: str) -> None:
    tensors = layer(2, 3) if recorded else plain(2, 3)
    message = f"[gelu_linear] save must be 'preact' or 'none' but got {save!r}"
    assert_refused(lambda: fusedops.gelu_linear(*tensors, save=save), message, *tensors)


def _out(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    return lambda input, weight, bias: torch.ones(shape, dtype=dtype)


REPEATED = "out must not overlap itself but got strides that repeat elements, shape [6, 4]"
SHARED = "out must not share memory with the inputs but got a view of the same memory"
SHAPE = "out must have the result's shape [6, 4] but got "

BAD_OUT: dict[str, tuple[Callable[..., Tensor], str]] = {
    "dtype": (
        _out(6, 4, dtype=torch.float64),
        "out must have input's dtype Float but got Double",
    ),
    "integer": (_out(6, 4, dtype=torch.int32), "out must have input's dtype Float but got Int"),
    "rows": (_out(5, 4), SHAPE + "[5, 4]"),
    "columns": (_out(6, 3), SHAPE + "[6, 3]"),
    "transposed": (_out(4, 6), SHAPE + "[4, 6]"),
    "flat": (_out(24), SHAPE + "[24]"),
    "rank": (_out(1, 6, 4), SHAPE + "[1, 6, 4]"),
    "empty": (_out(0), SHAPE + "[0]"),
    "expanded": (lambda *_: torch.ones(1, 4).expand(6, 4), REPEATED),
    "windows": (lambda *_: torch.ones(40).as_strided((6, 4), (2, 1)), REPEATED),
    "is-input": (lambda input, weight, bias: input, SHARED),
    "in-input": (lambda input, weight, bias: input.view(-1).view(4, 6).t(), SHARED),
    "in-weight": (
        lambda input, weight, bias: weight.view(-1)[:1].expand(4).as_strided((6, 4), (4, 1)),
        SHARED,
    ),
    "on-bias": (lambda input, weight, bias: bias.as_strided((6, 4), (4, 1), 8), SHARED),
    "meta": (
        lambda *_: torch.ones(6, 4, device="meta"),
        f"tensors must be on one device but got {mixed('meta')}",
    ),
    "negated": (
        lambda *_: torch._neg_view(torch.ones(6, 4)),
        "out must not be a lazily negated view (call resolve_neg) but got one",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_OUT.values(), ids=BAD_OUT)
def test_bad_out_is_refused(make: Callable[..., Tensor], message: str) -> None:
    # Room for an out in the storage of each.
    input, weight, bias = torch.randn(6, 4), torch.randn(40)[:16].view(4, 4), torch.randn(40)[6:10]
    out = make(input, weight, bias)
    assert_refused(
        lambda: fusedops.gelu_linear(input, weight, bias, out=out),
        f"[gelu_linear] {message}",
        input,
        weight,
        bias,
        out,
    )


@pytest.mark.parametrize("learned", [0, 1, 2, 3])
def test_out_where_autograd_records_is_refused(learned: int) -> None:
    tensors = [*plain(6, 3), torch.ones(6, 4)]
    tensors[learned].requires_grad_()
    *inputs, out = tensors
    message = (
        "[gelu_linear] out must not be used where autograd records but got a tensor that "
        "requires grad"
    )
    assert_refused(lambda: fusedops.gelu_linear(*inputs, out=out), message, *tensors)


def test_out_under_a_transform_is_refused() -> None:
    (x, w, b), out = plain(6, 3), torch.ones(6, 4)
    message = (
        "[gelu_linear] out must not be used under a torch.func transform or forward-mode AD but "
        "got such a call"
    )
    mapped = torch.func.vmap(lambda x: fusedops.gelu_linear(x, w, b, out=out))
    assert_refused(lambda: mapped(x.unsqueeze(0)), message, x, w, b, out)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        call = lambda: fusedops.gelu_linear(dual, w, b, out=out)  # noqa: E731
        assert_refused(call, message, x, w, b, out)


def test_raw_writing_op_refuses_to_be_recorded() -> None:
    (x, w, b), out = layer(6, 3), torch.ones(6, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^\[gelu_linear\] "):
        ops.gelu_linear_out(x, w, b, "none", out)


def test_backward_notices_that_a_saved_tensor_was_overwritten() -> None:
    w = torch.randn(6, 4, requires_grad=True)
    saved = w.exp()
    loss = saved.sum()
    fusedops.gelu_linear(*plain(6, 3), out=saved.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- out= -----------------------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("rows", [6, 70])
@pytest.mark.parametrize("view", ["contiguous", "transposed", "strided", "sliced", "offset"])
def test_out_receives_its_elements_only(view: str, rows: int, approximate: str, isa: str) -> None:
    inputs = plain(rows, 19, n=35)
    out = VIEWS[view](torch.zeros(rows, 35))
    expected = memory(out)
    twin = torch.empty(0).set_(
        expected.untyped_storage(), out.storage_offset(), out.shape, out.stride()
    )
    twin.copy_(fusedops.gelu_linear(*inputs, approximate=approximate))
    assert fusedops.gelu_linear(*inputs, approximate=approximate, out=out) is out
    assert torch.equal(memory(out), expected)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 3), (0, 3), (2, 0, 3), (4, 0)])
def test_out_of_every_rank(shape: tuple[int, ...]) -> None:
    inputs = plain(*shape)
    out = torch.full((*shape[:-1], 4), 7.0)
    fusedops.gelu_linear(*inputs, out=out)
    assert_same_bits(out, fusedops.gelu_linear(*inputs))


def test_out_may_lie_between_the_inputs() -> None:
    packed = torch.randn(6, 8)
    x, out, (_, w, b) = packed[:, ::2], packed[:, 1::2], plain(6, 4)
    expected, before = fusedops.gelu_linear(x, w, b), x.clone()
    fusedops.gelu_linear(x, w, b, out=out)
    assert_same_bits(out, expected)
    assert_same_bits(x, before)


# --- values and shapes ----------------------------------------------------------------------------


# The pre-activation's infinities become GELU's limits; other elements do not notice.
@each_variant
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("rows", [5, 70])
def test_nan_and_infinity(rows: int, dtype: str, approximate: str, isa: str) -> None:
    x, w, b = plain(rows, 33, n=37)
    x[1, 32], w[0, 16], w[36, 32], b[3] = torch.nan, -torch.inf, torch.nan, torch.inf
    b[4] = -torch.inf
    x, w, b = (t.to(DTYPES[dtype]) for t in (x, w, b))
    y = fusedops.gelu_linear(x, w, b, approximate=approximate)
    y, z = y.cpu(), functional.linear(*map(exact, (x, w, b)))
    assert torch.equal(y.isnan(), z.isnan())
    assert torch.equal(y == torch.inf, z == torch.inf)
    assert not (y == -torch.inf).any()
    assert (y[z == -torch.inf] == 0).all()
    assert y.isfinite().any()


@each_variant
@each_save
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "n"),
    [((4,), 5), ((0, 4), 5), ((2, 0, 4), 5), ((3, 0), 5), ((0,), 5), ((3, 4), 0), ((0, 0), 0)],
)
def test_vectors_and_empties(
    shape: tuple[int, ...], n: int, bias: bool, save: str, approximate: str
) -> None:
    leaves = layer(*shape, n=n, bias=bias)
    twins = [t.detach().clone().requires_grad_() for t in leaves]
    y = fusedops.gelu_linear(*leaves, approximate=approximate, save=save)
    expected = reference.gelu_linear(*twins, approximate=approximate)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize("rows", [1, 80])
@pytest.mark.parametrize("weight_view", ["transposed", "strided", "sliced", "expanded"])
@pytest.mark.parametrize("input_view", ["transposed", "strided", "sliced", "expanded", "negative"])
def test_every_view(input_view: str, weight_view: str, rows: int) -> None:
    x, w, b = plain(rows, 19, n=33)
    x, w = VIEWS[input_view](x), VIEWS[weight_view](w)
    expected = fusedops.gelu_linear(x.clone().contiguous(), w.clone().contiguous(), b)
    assert_same_bits(fusedops.gelu_linear(x, w, b), expected)


# --- gradients ------------------------------------------------------------------------------------


@each_variant
@each_save
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)])
def test_gradcheck(shape: tuple[int, ...], bias: bool, save: str, approximate: str) -> None:
    call = lambda *t: fusedops.gelu_linear(*t, approximate=approximate, save=save)  # noqa: E731
    inputs = layer(*shape, bias=bias)
    assert gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, inputs)


@each_save
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some_inputs_only(wanted: tuple[int, ...], save: str) -> None:
    inputs = layer(2, 3)
    for i in {0, 1, 2} - {*wanted}:
        inputs[i].requires_grad_(False)
    call = lambda *t: fusedops.gelu_linear(*t, save=save)  # noqa: E731
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


def test_gradients_of_the_preactivation() -> None:
    inputs = layer(2, 3)
    assert gradcheck(lambda *t: ops.gelu_linear_preact(*t, "none"), inputs, check_forward_ad=True)
    assert gradgradcheck(lambda *t: ops.gelu_linear_preact(*t, "tanh"), inputs)
    both = lambda *t: torch.mul(*ops.gelu_linear_preact(*t, "none"))  # noqa: E731
    assert gradcheck(both, inputs)
    assert gradgradcheck(both, inputs)


# Backward through the activation takes the pre-activation as it was saved: in the input's dtype.
@each_variant
@each_save
@each_dtype
def test_gradient_is_that_of_the_pieces(dtype: str, save: str, approximate: str, isa: str) -> None:
    leaves = layer(40, 19, n=33, dtype=DTYPES[dtype])
    grad = torch.randn(40, 33).to(DTYPES[dtype])
    fusedops.gelu_linear(*leaves, approximate=approximate, save=save).backward(grad)
    x, w, b = (t.detach() for t in leaves)
    z = fusedops.linear(x, w, b)
    expected = ops.gelu_linear_backward(grad, x, w, z, approximate, True)
    for leaf, wanted in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert_same_bits(leaf.grad, wanted)
    dz = ops.gelu_backward(grad, z, approximate)
    assert_same_bits(ops.gelu_linear_dz(grad, z, approximate)[0], dz)
    assert not torch.equal(dz, grad)


def saved_for_backward(save: str, dtype: torch.dtype) -> list[Tensor]:
    saved: list[Tensor] = []
    leaves = layer(6, 3, n=5, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.detach()) or t,  # type: ignore[func-returns-value]
        lambda t: t,
    ):
        fusedops.gelu_linear(*leaves, save=save)
    own = {t.data_ptr() for t in leaves}
    return [t for t in saved if t.data_ptr() not in own]


@each_dtype
def test_save_none_keeps_nothing(dtype: str) -> None:
    assert saved_for_backward("none", DTYPES[dtype]) == []


@each_dtype
def test_save_preact_keeps_the_preactivation_alone(dtype: str) -> None:
    torch.manual_seed(1)
    (kept,) = saved_for_backward("preact", DTYPES[dtype])
    torch.manual_seed(1)
    expected = fusedops.linear(*plain(6, 3, n=5, dtype=DTYPES[dtype]))
    assert_same_bits(kept, expected)


def test_nothing_is_kept_without_grad() -> None:
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = fusedops.gelu_linear(*layer(6, 3))
    assert not y.requires_grad
    assert saved == []


@each_save
@each_variant
def test_dual_numbers_and_transforms(approximate: str, save: str) -> None:
    primals = tuple(plain(2, 3, dtype=torch.float64))
    tangents = tuple(torch.randn_like(t) for t in primals)
    call = lambda *t: fusedops.gelu_linear(*t, approximate=approximate, save=save)  # noqa: E731
    formula = lambda *t: reference.gelu_linear(*t, approximate=approximate)  # noqa: E731
    _, expected = torch.func.jvp(formula, primals, tangents)
    with forward_ad.dual_level():
        y = call(*(forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)
    torch.testing.assert_close(torch.func.jvp(call, primals, tangents)[1], expected)
    _, pull = torch.func.vjp(call, *primals)
    _, pull_formula = torch.func.vjp(formula, *primals)
    torch.testing.assert_close(pull(expected), pull_formula(expected))
    raw = lambda *t: ops.gelu_linear_preact(*t, approximate)[0]  # noqa: E731
    torch.testing.assert_close(torch.func.jvp(raw, primals, tangents)[1], expected)


def test_gradients_per_sample() -> None:
    x, w, b = plain(5, 3, dtype=torch.float64)
    loss = lambda w, x: fusedops.gelu_linear(x, w, b).square().sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)
    each = [
        torch.autograd.grad(loss(leaf := w.clone().requires_grad_(), one), leaf)[0] for one in x
    ]
    torch.testing.assert_close(per_sample, torch.stack(each))


# --- opcheck and the compiler ---------------------------------------------------------------------


def op_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    leaves = layer(2, 3, dtype=torch.float32)
    detached = [t.detach() for t in leaves]
    vector = layer(3, dtype=torch.float32)
    permuted = torch.randn(2, 3, 5).permute(1, 2, 0)
    y = torch.randn(2, 4, requires_grad=True)
    backward = torch.randn(2, 4, requires_grad=True), *leaves[:2]
    return {
        "gelu_linear": ("gelu_linear", (*leaves, "none")),
        "gelu_linear-no-bias": ("gelu_linear", (*leaves[:2], None, "quick")),
        "gelu_linear-permuted": ("gelu_linear", (permuted, torch.randn(4, 2), None, "none")),
        "gelu_linear_nograd": ("gelu_linear_nograd", (*detached, "tanh")),
        "gelu_linear_preact": ("gelu_linear_preact", (*leaves, "none")),
        "gelu_linear_preact-vector": ("gelu_linear_preact", (*vector, "tanh")),
        "gelu_linear_preact_nograd": ("gelu_linear_preact_nograd", (*detached, "tanh")),
        "gelu_linear_backward": ("gelu_linear_backward", (*backward, y, "none", True)),
        "gelu_linear_backward-weight": (
            "gelu_linear_backward",
            (*backward[:2], None, y, "tanh", False),
        ),
        "gelu_linear_backward-bias": ("gelu_linear_backward", (y, None, None, y, "quick", True)),
        "gelu_linear_backward_nograd": (
            "gelu_linear_backward_nograd",
            (*(t.detach() for t in backward), y.detach(), "none", True),
        ),
        "gelu_linear_dz": ("gelu_linear_dz", (backward[0], y, "none")),
        "gelu_linear_dz_nograd": ("gelu_linear_dz_nograd", (y.detach(), y.detach(), "tanh")),
        "gelu_linear_out": ("gelu_linear_out", (*detached, "none", torch.ones(2, 4))),
        "gelu_linear_out_nograd": ("gelu_linear_out_nograd", (*detached, "tanh", torch.ones(2, 4))),
    }


@pytest.mark.parametrize("call", op_calls())
def test_opcheck(call: str) -> None:
    op, arguments = op_calls()[call]
    opcheck(getattr(ops, op).default, arguments)


def test_every_op_is_opchecked() -> None:
    names = {name.removeprefix("fusedops::") for name in torch._C._dispatch_get_all_op_names()}
    assert {op for op, _ in op_calls().values()} == {
        n
        for n in names
        if n.startswith("gelu_linear") and "packed" not in n and "quantized" not in n
    }


@pytest.mark.slow
@each_save
@each_variant
def test_compiled_training(approximate: str, save: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = lambda *t: fusedops.gelu_linear(*t, approximate=approximate, save=save)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for rows in (2, 3, 7, 5):
        leaves = layer(rows, 3, dtype=torch.float32)
        torch.testing.assert_close(compiled(*leaves), run(*leaves), rtol=0, atol=0)
        grads = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, run)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("owner", ["graph", "caller"])
def test_compiled_out(owner: str) -> None:
    torch._dynamo.reset()
    inputs, out = plain(6, 3), torch.zeros(6, 4)

    def run(*t: Tensor) -> Tensor:
        target = torch.zeros(6, 4) if owner == "graph" else out
        fusedops.gelu_linear(*t, out=target)
        return target + 1

    expected = fusedops.gelu_linear(*inputs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*inputs), expected + 1)
    assert torch.equal(out, expected) is (owner == "caller")


@pytest.mark.slow
def test_inductor() -> None:
    torch._dynamo.reset()
    leaves = layer(6, 3, dtype=torch.float32)

    def train(*t: Tensor) -> Tensor:
        kept = fusedops.gelu_linear(*t) + fusedops.gelu(t[0].sum(-1, keepdim=True))
        return (kept * fusedops.gelu_linear(*t, save="none", approximate="tanh")).sum()

    expected = torch.autograd.grad(train(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(train, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(actual, expected)


class _Feed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = fusedops.nn.GELULinear(3, 8, approximate="tanh"), torch.nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return fusedops.gelu(fusedops.linear(self.up(x), self.down.weight, self.down.bias))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export_round_trip(strict: bool) -> None:
    torch._dynamo.reset()
    module, rows = _Feed(), torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(
        module, (torch.randn(5, 3),), dynamic_shapes=({0: rows},), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(9, 3)
    assert_same_bits(torch.export.load(file).module()(x).detach(), module(x).detach())


# --- autocast -------------------------------------------------------------------------------------


@each_save
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_autocast(dtype: str, save: str) -> None:
    leaves = layer(3, 4, n=5, dtype=torch.float32)
    narrow = [t.detach().to(DTYPES[dtype]).requires_grad_() for t in leaves]
    with torch.autocast(DEVICE, dtype=DTYPES[dtype]):
        y = fusedops.gelu_linear(*leaves, save=save)
    expected = fusedops.gelu_linear(*narrow, save=save)
    assert_same_bits(y.detach(), expected.detach())
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    for leaf, twin in zip(leaves, narrow, strict=True):
        assert leaf.grad is not None
        assert twin.grad is not None
        assert_same_bits(leaf.grad, twin.grad.float())


def test_autocast_into_out() -> None:
    inputs, out = plain(3, 4, n=5), torch.zeros(3, 5, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        fusedops.gelu_linear(*inputs, out=out)
    assert_same_bits(out, fusedops.gelu_linear(*(t.bfloat16() for t in inputs)))
