"""pack_linear and what it returns, in place of a weight. Its bytes are in test_packed_ops.py."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_refused
from torch import Tensor
from torch.autograd import forward_ad

import fusedops
from fusedops.ops.packed import PackedLinear
from fusedops.testing import DTYPES, SPECS, Call, assert_same_bits, assert_within

ops = torch.ops.fusedops

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_op = pytest.mark.parametrize("op", ["linear", "gelu_linear"])


def numbers(rows: int = 3, n: int = 75, k: int = 20, dtype: str = "f32") -> list[Tensor]:
    """Input, weight, bias."""
    return [torch.randn(s).to(DTYPES[dtype]) for s in ((rows, k), (n, k), (n,))]


def assert_accurate(op: str, y: Tensor, *tensors: Tensor | None, **options: str) -> None:
    """Within the bound of the op on the plain weight."""
    spec, call = SPECS[op], Call(tensors, options)
    assert_within(y, spec.oracle(call)[0], spec.error_bound(call, False)[0])


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 70])
@each_dtype
@each_op
def test_result_is_within_the_bound(op: str, dtype: str, rows: int, bias: bool, isa: str) -> None:
    x, w, b = numbers(rows, dtype=dtype)
    b_or_none = b if bias else None
    packed = fusedops.pack_linear(w, b_or_none)
    y = getattr(fusedops, op)(x, packed)
    options = {"approximate": "none"} if op == "gelu_linear" else {}
    assert_accurate(op, y, x, w, b_or_none, **options)
    assert packed.dtype == y.dtype == DTYPES[dtype]


# Of so many columns that few rows are packed, and pass the panels in turns.
@pytest.mark.parametrize("k", [20, 200, 2100])
@pytest.mark.parametrize("rows", [7, 12, 16])
@each_dtype
@each_op
def test_few_rows_of_a_wide_layer(op: str, dtype: str, rows: int, k: int, isa: str) -> None:
    x, w, b = numbers(rows, 1050, k, dtype)
    y = getattr(fusedops, op)(x, fusedops.pack_linear(w, b))
    options = {"approximate": "none"} if op == "gelu_linear" else {}
    assert_accurate(op, y, x, w, b, **options)


def test_out_is_counted_as_written() -> None:
    x, w, b = numbers()
    packed, out = fusedops.pack_linear(w, b), torch.ones(3, 75)
    product = torch.ones(3, 75, requires_grad=True) * out  # backward needs out as it is
    fusedops.gelu_linear(x, packed, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_variants_and_out(approximate: str) -> None:
    x, w, b = numbers()
    packed, out = fusedops.pack_linear(w, b), torch.empty(3, 75)
    y = fusedops.gelu_linear(x, packed, approximate=approximate)
    assert_accurate("gelu_linear", y, x, w, b, approximate=approximate)
    assert fusedops.gelu_linear(x, packed, approximate=approximate, out=out) is out
    assert_same_bits(out, y)


def test_a_call_is_linear() -> None:
    x, w, b = numbers()
    packed = fusedops.pack_linear(w, b)
    assert_same_bits(packed(x), fusedops.linear(x, packed))
    assert packed(x.view(1, 3, 1, 20)).shape == (1, 3, 1, 75)


@each_dtype
def test_another_dtype_than_the_weights(dtype: str) -> None:
    _, w, b = numbers()
    packed = fusedops.pack_linear(w, b, dtype=DTYPES[dtype])
    x = torch.randn(3, 20).to(DTYPES[dtype])
    expected = fusedops.pack_linear(w.to(DTYPES[dtype]), b.to(DTYPES[dtype]))(x)
    assert_same_bits(packed(x), expected)


def test_packed_is_a_copy_that_requires_no_grad() -> None:
    x, w, b = numbers()
    w.requires_grad_(), b.requires_grad_()
    packed = fusedops.pack_linear(w, b)
    before = packed(x)
    with torch.no_grad():
        w.zero_(), b.zero_()
    assert not before.requires_grad
    assert_same_bits(packed(x), before)


def test_any_strides_of_the_weight() -> None:
    x, w, b = numbers()
    expected = fusedops.pack_linear(w, b)(x)
    wide = torch.zeros(75, 40)[:, ::2].copy_(w)
    for weight in (w.t().contiguous().t(), wide, torch._neg_view(-w)):
        assert_same_bits(fusedops.pack_linear(weight, b)(x), expected)


def test_packed_is_immutable_and_says_what_it_is() -> None:
    packed = fusedops.pack_linear(torch.ones(4, 3))
    assert repr(packed) == (
        "PackedLinear(in_features=3, out_features=4, bias=False, dtype=torch.float32)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.bias = torch.ones(4)  # type: ignore[misc]


def _saved_and_loaded(packed: PackedLinear) -> PackedLinear:
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    loaded: PackedLinear = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), _saved_and_loaded],
    ids=["copy", "deepcopy", "pickle", "save"],
)
def test_copies(duplicate: Callable[[PackedLinear], PackedLinear]) -> None:
    x, w, b = numbers()
    packed = fusedops.pack_linear(w, b)
    twin = duplicate(packed)
    assert type(twin) is PackedLinear
    assert_same_bits(twin(x), packed(x))


# --- errors ---------------------------------------------------------------------------------------

FLOATING = "must be float32, float16, bfloat16 or float64 but got "


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(4, 3, dtype=torch.int8),), f"weight {FLOATING}torch.int8"),
        ((torch.ones(4, 3), None, torch.int8), f"dtype {FLOATING}torch.int8"),
        ((torch.ones(3),), "weight must have 2 dimensions [N, K] but got shape [3]"),
        ((torch.ones(4, 3), torch.ones(3)), "bias must be [N] = [4] but got shape [3]"),
        ((torch.ones(4, 3), torch.ones(4, 1)), "bias must be [N] = [4] but got shape [4, 1]"),
        (
            (torch.ones(4, 3), torch.ones(4).half()),
            "bias must have weight's dtype Float but got Half",
        ),
        (
            (torch.ones(4, 3), torch.ones(4, device="meta")),
            "bias must be on weight's cpu but got meta",
        ),
        (
            (torch.ones(4, 3).to_sparse(),),
            "weight must be strided but got torch.sparse_coo",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(args: tuple[Any, ...], message: str) -> None:
    assert_refused(lambda: fusedops.pack_linear(*args), f"[pack_linear] {message}")


@each_op
def test_a_bias_beside_the_packed_one_is_refused(op: str) -> None:
    x, w, b = numbers()
    packed = fusedops.pack_linear(w, b)
    message = f"[{op}] bias must be None with a packed weight, which has its own, but got a tensor"
    assert_refused(lambda: getattr(fusedops, op)(x, packed, b), message, x)


@each_op
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 21), "input's last dimension must be weight's K = 20 but got shape [3, 21]"),
        (torch.ones(3, 20).half(), "weight must have input's dtype Half but got Float"),
        (torch.ones(3, 20).int(), f"input {FLOATING}Int"),
        (torch.ones(()), "input must have at least 1 dimension but got shape []"),
    ],
)
def test_bad_input_is_refused(op: str, x: Tensor, message: str) -> None:
    packed = fusedops.pack_linear(*numbers()[1:])
    assert_refused(lambda: getattr(fusedops, op)(x, packed), f"[{op}] {message}", x)


GONE = "a packed weight, which has no gradient, must not be used "


@each_op
def test_a_lost_gradient_is_refused(op: str) -> None:
    x, w, b = numbers()
    packed = fusedops.pack_linear(w, b)
    call = getattr(fusedops, op)
    x.requires_grad_()
    recorded = "where autograd records but got a tensor that requires grad"
    assert_refused(lambda: call(x, packed), f"[{op}] {GONE}{recorded}", x)
    with torch.no_grad():
        assert not call(x, packed).requires_grad
    with torch.inference_mode():
        assert call(x, packed).is_inference()


@each_op
def test_a_lost_tangent_is_refused(op: str) -> None:
    x, w, b = numbers()
    packed = fusedops.pack_linear(w, b)
    call = getattr(fusedops, op)
    message = f"[{op}] {GONE}under a torch.func transform or forward-mode AD but got such a call"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert_refused(lambda: call(dual, packed), message)
    assert_refused(lambda: torch.func.jvp(lambda x: call(x, packed), (x,), (x,)), message, x)
    with pytest.raises(RuntimeError, match=re.escape(f"[{op}] {GONE}")):
        torch.func.grad(lambda x: call(x, packed).sum())(x)
    assert_refused(lambda: torch.vmap(lambda x: call(x, packed))(x), message, x)


@pytest.mark.parametrize(("op", "rest"), [("linear", ()), ("gelu_linear", ("none",))])
def test_the_raw_op_refuses_as_well(op: str, rest: tuple[str, ...]) -> None:
    x, w, b = numbers()
    packed = fusedops.pack_linear(w, b)
    raw = getattr(ops, f"{op}_packed")
    x.requires_grad_()
    message = (
        f"[{op}] torch.ops.fusedops.{op}_packed, which has no gradient, must not be used where "
        "autograd records but got a tensor that requires grad"
    )
    assert_refused(lambda: raw(x, packed.data, b, 75, *rest), message, x)


@pytest.mark.skipif(len(fusedops.isa.supported()) < 2, reason="one instruction set here")
def test_packed_for_another_isa_is_refused() -> None:
    x, w, b = numbers()
    packed = fusedops.pack_linear(w, b)
    before = fusedops.isa.current()
    other = next(name for name in fusedops.isa.supported() if name != before)
    with fusedops.isa.use(other):
        message = (
            f"[linear] packed must be packed for the ISA in use, {other}, but got one for {before}"
            ": pack the weight again"
        )
        assert_refused(lambda: packed(x), message, x)


# --- opcheck and the compiler ---------------------------------------------------------------------


def op_calls() -> dict[str, tuple[Any, ...]]:
    x, w, b = numbers()
    packed = ops.linear_pack(w)
    return {
        "linear_pack": (w,),
        "linear_packed": (x, packed, b, 75),
        "linear_packed_nograd": (x.view(1, 3, 20), packed, None, 75),
        "linear_packed_out": (x, packed, b, 75, torch.empty(3, 75)),
        "gelu_linear_packed": (x, packed, b, 75, "tanh"),
        "gelu_linear_packed_nograd": (x[0], packed, None, 75, "none"),
        "gelu_linear_packed_out": (x, packed, b, 75, "quick", torch.empty(3, 75)),
        "gelu_linear_packed_out_nograd": (x, packed, b, 75, "none", torch.empty(3, 75)),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, op_calls()[name])


@pytest.mark.parametrize("convert", [Tensor.to_sparse, Tensor.to_mkldnn])
@each_op
def test_a_sparse_input_is_refused_as_such(op: str, convert: Callable[[Tensor], Tensor]) -> None:
    x, w, b = numbers()
    given = convert(x)
    message = f"[{op}] tensors must be strided but got {given.layout}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(fusedops, op)(given, fusedops.pack_linear(w, b))


def test_every_op_is_opchecked() -> None:
    names = {name.removeprefix("fusedops::") for name in torch._C._dispatch_get_all_op_names()}
    assert {*op_calls()} == {n for n in names if n.startswith(("linear_pack", "gelu_linear_pack"))}


@pytest.mark.parametrize("name", op_calls())
def test_other_devices_are_refused(name: str) -> None:
    op = getattr(ops, name).default
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fusedops::{name}", "CUDA")
    label = name.split("_packed")[0]
    message = f"[{label}] a packed weight must be on the CPU but got cpu"
    other = torch._C.DispatchKey.CompositeExplicitAutograd
    assert_refused(lambda: op._op_dk(other, *op_calls()[name]), message)


@each_op
def test_compiled(op: str) -> None:
    torch._dynamo.reset()
    _, w, b = numbers()
    packed = fusedops.pack_linear(w, b)
    call = lambda x, p: getattr(fusedops, op)(x, p) * 2  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 20)
        assert_same_bits(compiled(x, packed), call(x, packed))


def test_packing_in_a_graph() -> None:
    torch._dynamo.reset()
    x, w, b = numbers()
    call = lambda x, w, b: fusedops.gelu_linear(x, fusedops.pack_linear(w, b))  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, w, b), call(x, w, b))


def test_a_graph_refuses_a_wrong_input() -> None:
    torch._dynamo.reset()
    packed = fusedops.pack_linear(*numbers()[1:])
    compiled = torch.compile(lambda x: packed(x) * 2, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"weight's K = 20 but got shape \[3, 21\]"):
        compiled(torch.ones(3, 21))
    with pytest.raises(RuntimeError, match="which has no gradient"):
        compiled(torch.ones(3, 20, requires_grad=True))


class _Holder(torch.nn.Module):
    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        return fusedops.gelu_linear(x, self.packed)


@pytest.mark.parametrize("strict", [False, True])
def test_export_round_trip(strict: bool) -> None:
    x, w, b = numbers()
    holder = _Holder(fusedops.pack_linear(w, b))
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    program = torch.export.export(holder, (x,), dynamic_shapes=(rows,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (3, 9):
        x = torch.randn(n, 20)
        assert_same_bits(loaded(x), holder(x))


@each_op
def test_autocast_takes_the_packed_dtype(op: str) -> None:
    x, w, b = numbers()
    packed = fusedops.pack_linear(w, b, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = getattr(fusedops, op)(x, packed)
    assert_same_bits(y, getattr(fusedops, op)(x.bfloat16(), packed))


def test_meta_tensors() -> None:
    packed = fusedops.pack_linear(torch.ones(4, 3, device="meta"), dtype=torch.float16)
    assert packed.data.is_meta
    y = packed(torch.ones(2, 3, device="meta", dtype=torch.float16))
    assert (y.shape, y.is_meta) == ((2, 4), True)


def test_saved_and_loaded_as_plain_data() -> None:
    x, w, b = numbers()
    file, packed = io.BytesIO(), fusedops.pack_linear(w, b)
    torch.save({"packed": packed}, file)
    file.seek(0)
    assert_same_bits(torch.load(file, weights_only=True)["packed"](x), packed(x))


def test_a_module_passes_it_by() -> None:
    module, packed = torch.nn.Module(), fusedops.pack_linear(*numbers()[1:])
    module.packed = packed
    assert not module.half().state_dict()
    assert module.packed is packed
    assert packed.dtype == torch.float32
