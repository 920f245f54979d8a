"""Plans: the numbers of the op, results in memory of their own, errors, threads."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_refused, memory
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fusedops
from fusedops import plan
from fusedops.testing import DTYPES, SPECS, Call, Rope, assert_same_bits, assert_within

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def layer(n: int = 75, k: int = 20, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)


def tables(rows: int = 12, half: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    angles = torch.randn(rows, half)
    return [angles.cos().to(dtype), angles.sin().to(dtype)]


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
@pytest.mark.parametrize("rows", [1, 5, 70])
@each_dtype
def test_gelu_linear_is_within_the_bound(
    dtype: str, rows: int, approximate: str, bias: bool, isa: str
) -> None:
    kind, spec = DTYPES[dtype], SPECS["gelu_linear"]
    (w, b), x = layer(dtype=kind), torch.randn(rows, 20).to(kind)
    call = Call((x, w, b if bias else None), {"approximate": approximate})
    planned = plan.gelu_linear(*call.args[1:], rows=rows, approximate=approximate)  # type: ignore[arg-type]
    y, out = planned(x), torch.full((rows, 75), torch.nan, dtype=kind)
    assert planned(x, out) is out
    assert planned(x, out=out) is out
    assert_same_bits(out, y)
    assert_within(y, spec.oracle(call)[0], spec.error_bound(call, False)[0])


@pytest.mark.parametrize("threads", [1, torch.get_num_threads()])
@each_dtype
def test_gelu_linear_of_many_tasks(dtype: str, threads: int) -> None:
    (w, b), x = layer(300, 257, DTYPES[dtype]), torch.randn(130, 257).to(DTYPES[dtype])
    y = plan.gelu_linear(w, b, rows=(2, 65), threads=threads)(x.view(2, 65, 257))
    call, spec = Call((x, w, b), {"approximate": "none"}), SPECS["gelu_linear"]
    assert_within(y.view(130, 300), spec.oracle(call)[0], spec.error_bound(call, False)[0])


@pytest.mark.parametrize(("rows", "n", "k"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), ((), 3, 4)])
def test_empty_and_single(rows: Any, n: int, k: int) -> None:
    (w, b), lead = layer(n, k), (rows,) if isinstance(rows, int) else rows
    x = torch.randn(*lead, k)
    expected = fusedops.gelu_linear(x, w, b)
    torch.testing.assert_close(plan.gelu_linear(w, b, rows=rows)(x), expected)


def test_another_dtype_than_the_weights() -> None:
    (w, b), x = layer(), torch.randn(3, 20).bfloat16()
    expected = plan.gelu_linear(w.bfloat16(), b.bfloat16(), rows=3)(x)
    assert_same_bits(plan.gelu_linear(w, b, rows=3, dtype=torch.bfloat16)(x), expected)


ROPES = [s for s in SPECS["rope"].samples if isinstance(s, Rope)]


@each_dtype
@pytest.mark.parametrize("sample", ROPES, ids=lambda sample: sample.name)
def test_rope_is_the_op_bit_for_bit(sample: Rope, dtype: str) -> None:
    call = sample.build(DTYPES[dtype])
    x, *rest = call.args
    assert x is not None
    x = x.resolve_neg().contiguous()
    planned = plan.rope(x.shape, *rest, dtype=x.dtype, **call.kwargs)  # type: ignore[arg-type]
    expected = fusedops.rope(x, *rest, **call.kwargs)  # type: ignore[arg-type]
    assert_same_bits(planned(x), expected)
    out = torch.full_like(x, torch.nan)
    assert_same_bits(planned(x, out), expected)
    assert planned(x, x) is x
    assert_same_bits(x, expected)


def test_rope_on_every_isa(isa: str) -> None:
    x, (cos, sin) = torch.randn(2, 3, 5, 8), tables()
    assert_same_bits(plan.rope(x.shape, cos, sin)(x), fusedops.rope(x, cos, sin))


@pytest.mark.parametrize("ids", [None, [[4, 0, 1]]], ids=["in order", "by position_ids"])
@pytest.mark.parametrize("offset", [None, 0, 7])
def test_rope_at_any_offset(offset: int | None, ids: list[list[int]] | None) -> None:
    x, (cos, sin) = torch.randn(1, 2, 3, 8), tables()
    positions = None if ids is None else torch.tensor(ids)
    planned = plan.rope(x.shape, cos, sin, positions, offset=2)
    expected = fusedops.rope(x, cos, sin, positions, offset=2 if offset is None else offset)
    assert_same_bits(planned(x, offset=offset), expected)
    assert_same_bits(planned(x, torch.empty_like(x), offset=offset), expected)


@pytest.mark.parametrize(
    ("ids", "last", "offset"),
    [
        (ids, last, offset)
        for ids, last in ((None, 9), ([[4, 0, 1]], 7))
        for offset in (-1, last + 1, 2**62, -(2**63))
    ],
)
def test_an_offset_past_the_tables_is_refused(
    ids: list[list[int]] | None, last: int, offset: int
) -> None:
    x, (cos, sin) = torch.randn(1, 2, 3, 8), tables()
    planned = plan.rope(x.shape, cos, sin, None if ids is None else torch.tensor(ids))
    message = f"[plan.rope] offset must be in [0, {last}] for these tables and positions but got "
    assert_refused(lambda: planned(x, offset=offset), message + str(offset), x)


# --- what a plan keeps, and what it hands out -----------------------------------------------------


def test_results_are_fresh() -> None:
    (w, b), x = layer(), torch.randn(3, 20)
    planned = plan.gelu_linear(w, b, rows=3)
    results = [planned(x + i) for i in range(4)]
    kept = [y.clone() for y in results]
    planned(x)
    assert len({y.data_ptr() for y in results}) == 4
    for y, before in zip(results, kept, strict=True):
        assert_same_bits(y, before)


def test_a_plan_copies_what_it_is_given() -> None:
    (w, b), x = layer(), torch.randn(3, 20)
    planned = plan.gelu_linear(w, b, rows=3)
    before = planned(x)
    w.zero_(), b.zero_()
    assert_same_bits(planned(x), before)
    t, (cos, sin), ids = torch.randn(1, 2, 3, 8), tables(), torch.tensor([2, 0, 1])
    rotated = plan.rope(t.shape, cos, sin, ids)
    before = rotated(t)
    cos.zero_(), sin.zero_(), ids.fill_(0)
    assert_same_bits(rotated(t), before)


def test_out_receives_its_elements_only() -> None:
    (w, b), x = layer(), torch.randn(3, 20)
    row = torch.full((5, 75), 7.0)
    plan.gelu_linear(w, b, rows=3)(x, row[1:4])
    assert (memory(row)[: 75 * 4] == memory(torch.full((75,), 7.0))).all()
    assert (row[4] == 7.0).all()


def test_the_isa_of_the_packing_stays() -> None:
    (w, b), x = layer(), torch.randn(3, 20)
    planned = plan.gelu_linear(w, b, rows=3)
    before = planned(x)
    for isa in fusedops.isa.supported():
        with fusedops.isa.use(isa):
            assert_same_bits(planned(x), before)


def test_copies_are_the_plan_and_pickles_are_refused() -> None:
    planned = plan.gelu_linear(*layer(), rows=3)
    assert copy.copy(planned) is planned
    assert copy.deepcopy({"a": planned})["a"] is planned
    message = "[plan.gelu_linear] a plan must be made where it runs but got a call to pickle it"
    assert_refused(lambda: pickle.dumps(planned), message)
    with pytest.raises(TypeError, match="cannot create"):
        plan.Plan()


def test_a_plan_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Tensor]] = []
    given = plan._given

    def noted(op: str, shape: Any, like: Tensor) -> dict[str, Any]:
        kept.append(weakref.ref(like))
        return given(op, shape, like)

    monkeypatch.setattr(plan, "_given", noted)
    plans = [plan.gelu_linear(*layer(), rows=3), plan.rope((2, 3, 8), *tables())]
    assert [like() is None for like in kept] == [False, False]
    del plans
    assert [like() is None for like in kept] == [True, True]


def test_backward_notices_that_a_saved_tensor_was_overwritten() -> None:
    (w, b), x = layer(), torch.randn(3, 20)
    leaf, out = torch.ones(3, 75, requires_grad=True), torch.ones(3, 75)
    product = leaf * out
    plan.gelu_linear(w, b, rows=3)(x, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_inference_tensors() -> None:
    (w, b), x = layer(), torch.randn(3, 20)
    planned = plan.gelu_linear(w, b, rows=3)
    with torch.inference_mode():
        y, out = planned(x), torch.empty(3, 75)
        assert y.is_inference()
        planned(y.new_ones(3, 20), out)
        own = planned(x)
        assert_same_bits(planned(x, out), own)
    message = "[plan.gelu_linear] out, an inference tensor, must be written inside inference_mode "
    assert_refused(lambda: planned(x, out), message + "but got a call outside it", out)
    with torch.inference_mode():
        made_inside = plan.gelu_linear(w, b, rows=3)
    assert_same_bits(made_inside(x), own.clone())


# Two threads in one plan: the second one works in memory of its own.
def test_threads_share_a_plan() -> None:
    (w, b), xs = layer(192, 256), torch.randn(2, 64, 256)
    planned = plan.gelu_linear(w, b, rows=64, dtype=torch.float16)
    inputs = [x.half() for x in xs]
    expected = [planned(x) for x in inputs]
    wrong: list[int] = []
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(100):
            if not torch.equal(planned(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_another_number_of_threads_after_planning(threads: int) -> None:
    (w, b), x = layer(300, 257), torch.randn(130, 257)
    planned = plan.gelu_linear(w, b, rows=130)
    before, count = planned(x), torch.get_num_threads()
    torch.set_num_threads(threads)
    after = planned(x)
    torch.set_num_threads(count)
    assert_same_bits(after, before)


# --- errors ---------------------------------------------------------------------------------------


class _Subclass(Tensor):
    pass


NO_MEMORY = "have memory but got a tensor without"


def _freed() -> Tensor:
    t = torch.ones(3, 20)
    t.untyped_storage().resize_(0)
    return t


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "be a torch.Tensor and no subclass of it but got NoneType"),
    "list": (lambda: [1.0], "be a torch.Tensor and no subclass of it but got list"),
    "subclass": (
        lambda: torch.ones(3, 20).as_subclass(_Subclass),
        "be a torch.Tensor and no subclass of it but got _Subclass",
    ),
    "dtype": (lambda: torch.ones(3, 20).half(), "have the plan's dtype Float but got Half"),
    "integer": (
        lambda: torch.ones(3, 20, dtype=torch.int32),
        "have the plan's dtype Float but got torch.int32",
    ),
    "rows": (lambda: torch.ones(4, 20), "have the plan's shape [3, 20] but got [4, 20]"),
    "columns": (lambda: torch.ones(3, 19), "have the plan's shape [3, 20] but got [3, 19]"),
    "rank": (lambda: torch.ones(1, 3, 20), "have the plan's shape [3, 20] but got [1, 3, 20]"),
    "strides": (lambda: torch.ones(20, 3).t(), "be contiguous but got (1, 3)"),
    "expanded": (lambda: torch.ones(1, 20).expand(3, 20), "be contiguous but got (0, 1)"),
    "sparse": (lambda: torch.ones(3, 20).to_sparse(), "be contiguous but got torch.sparse_coo"),
    "device": (lambda: torch.ones(3, 20, device="meta"), "be on the CPU but got meta"),
    "negated": (
        lambda: torch._neg_view(torch.ones(3, 20)),
        "not be a lazily negated view (call resolve_neg) but got one",
    ),
    "grad": (
        lambda: torch.ones(3, 20, requires_grad=True),
        "not require grad where autograd records but got one that does",
    ),
    "zero": (lambda: torch._efficientzerotensor((3, 20)), NO_MEMORY),
    "functional": (lambda: torch._to_functional_tensor(torch.ones(3, 20)), NO_MEMORY),
    "freed": (_freed, NO_MEMORY),
}


# None for out asks for a fresh tensor.
BAD_ROLES = [
    (name, role) for name in BAD for role in ("x", "out") if (name, role) != ("none", "out")
]


@pytest.mark.parametrize(("bad", "role"), BAD_ROLES)
def test_bad_tensor_is_refused(bad: str, role: str) -> None:
    make, message = BAD[bad]
    planned = plan.gelu_linear(torch.ones(20, 20), rows=3)
    x = torch.ones(3, 20)
    call = (lambda: planned(make())) if role == "x" else (lambda: planned(x, make()))
    assert_refused(call, f"[plan.gelu_linear] {role} must {message}", x)


def test_rope_refuses_a_tensor_without_memory() -> None:
    planned, x = plan.rope((3, 2, 8), *tables()), torch.ones(3, 2, 8)
    zero = torch._efficientzerotensor((3, 2, 8))
    assert_refused(lambda: planned(zero), f"[plan.rope] x must {NO_MEMORY}")
    assert_refused(lambda: planned(x, zero), f"[plan.rope] out must {NO_MEMORY}", x)


def test_weights_and_tables_without_memory_are_zeros() -> None:
    zeros, x = torch._efficientzerotensor, torch.randn(3, 20)
    for w, b in ((zeros((4, 20)), torch.ones(4)), (torch.ones(4, 20), zeros((4,)))):
        expected = plan.gelu_linear(w.clone(), b.clone(), rows=3)(x)
        assert_same_bits(plan.gelu_linear(w, b, rows=3)(x), expected)
    t = torch.randn(1, 2, 3, 8)
    ids = zeros((3,), dtype=torch.int64)
    for cos, sin in ((zeros((3, 4)), torch.ones(3, 4)), (torch.ones(3, 4), zeros((3, 4)))):
        expected = fusedops.rope(t, cos.clone(), sin.clone(), ids.clone())
        assert_same_bits(plan.rope(t.shape, cos, sin, ids)(t), expected)
    functional = torch._to_functional_tensor(torch.ones(4, 20))
    message = "[plan.gelu_linear] weight must have memory but got a tensor without"
    assert_refused(lambda: plan.gelu_linear(functional, rows=3), message)


def test_a_parameter_is_a_tensor() -> None:
    w, b = layer()
    x, out = nn.Parameter(torch.randn(3, 20)), nn.Parameter(torch.empty(3, 75))
    with torch.no_grad():
        planned = plan.gelu_linear(w, b, rows=3)
        assert_same_bits(planned(x, out).detach(), planned(x.detach()))


@pytest.mark.parametrize("inside", [False, True])
def test_out_that_overlaps_x_is_refused(inside: bool) -> None:
    planned = plan.gelu_linear(torch.ones(20, 20), rows=3)
    shared = torch.ones(5, 20)
    message = (
        "[plan.gelu_linear] out must not share memory with x but got a view of the same memory"
    )
    out = shared[2:] if inside else shared[:3]
    assert_refused(lambda: planned(shared[:3], out), message, shared)
    planned(torch.ones(6, 20)[:3], torch.ones(6, 20)[3:])
    beside = torch.ones(6, 20)
    planned(beside[:3], beside[3:])


def test_rope_out_that_overlaps_x_in_part_is_refused() -> None:
    shared = torch.ones(4, 3, 8)
    planned = plan.rope((2, 3, 8), *tables())
    message = "[plan.rope] out must be x itself or separate memory but got a view that overlaps x"
    assert_refused(lambda: planned(shared[:2], shared[1:3]), message, shared)
    planned(shared[:2], shared[2:])


ALONE = (
    "[plan.gelu_linear] x must not be used in a graph, under a torch.func transform or "
    "forward-mode AD but got such a call"
)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.vmap(f)(x),
        lambda f, x: torch.func.functionalize(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
    ],
    ids=["vmap", "functionalize", "jvp"],
)
def test_a_transform_is_refused(transform: Callable[..., Any]) -> None:
    planned = plan.gelu_linear(torch.ones(20, 20), rows=3)
    x = torch.ones(2, 3, 20) if "vmap" in str(transform) else torch.ones(3, 20)
    with pytest.raises(RuntimeError, match=r"\[plan.gelu_linear\] x must "):
        transform(planned, x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(3, 20), torch.ones(3, 20))
        assert_refused(lambda: planned(dual), ALONE)


# What they would record is a fresh tensor that nothing has written.
@pytest.mark.parametrize("to_out", [False, True])
@pytest.mark.parametrize(
    "record",
    [
        torch.jit.trace,
        lambda f, x: make_fx(f)(x),
        lambda f, x: make_fx(f, pre_dispatch=True)(x),
        lambda f, x: make_fx(f, tracing_mode="fake")(x),
    ],
    ids=["trace", "make_fx", "pre_dispatch", "fake"],
)
def test_a_recorded_graph_is_refused(record: Callable[..., Any], to_out: bool) -> None:
    planned = plan.gelu_linear(torch.ones(20, 20), rows=3)
    x, out = torch.ones(3, 20), torch.zeros(3, 20)
    assert_refused(lambda: record(lambda x: planned(x, out if to_out else None), x), ALONE, x, out)
    assert_same_bits(planned(x), planned(x, out))


def test_arguments_by_name() -> None:
    x = torch.ones(3, 20)
    planned, turned = plan.gelu_linear(torch.ones(4, 20), rows=3), plan.rope((2, 3, 8), *tables())
    assert planned(x=x, out=None).shape == (3, 4)
    for call in (
        lambda: planned(x, None, 0),
        lambda: planned(x, offset=0),
        lambda: planned(x, other=x),
        lambda: planned(x, x=x),
        lambda: turned(torch.ones(2, 3, 8), offset=1.5),
        lambda: turned(torch.ones(2, 3, 8), offset="1"),
    ):
        with pytest.raises(TypeError):
            call()
    assert_refused(
        lambda: planned(),
        "[plan.gelu_linear] x must be a torch.Tensor and no subclass of it but got NoneType",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": -1}, "rows must be a size or a sequence of sizes but got -1"),
        ({"rows": 2.0}, "rows must be a size or a sequence of sizes but got 2.0"),
        ({"rows": None}, "rows must be a size or a sequence of sizes but got None"),
        (
            {"rows": 3, "threads": 1.5},
            f"threads must be in [1, {torch.get_num_threads()}] (torch's) but got 1.5",
        ),
        (
            {"rows": 3, "weight": fusedops.pack_linear(torch.ones(4, 3))},
            "weight must be a torch.Tensor but got PackedLinear",
        ),
        ({"rows": 3, "bias": [1.0]}, "bias must be a torch.Tensor but got list"),
        ({"rows": "3"}, "rows must be a size or a sequence of sizes but got '3'"),
        ({"rows": 3, "threads": 0}, f"threads must be in [1, {torch.get_num_threads()}] (torch's)"),
        (
            {"rows": 3, "threads": 999},
            f"threads must be in [1, {torch.get_num_threads()}] (torch's",
        ),
        (
            {"rows": 3, "approximate": "erf"},
            "approximate must be 'none', 'tanh' or 'quick' but got",
        ),
        ({"rows": 3, "dtype": torch.int8}, "dtype must be float32, float16, bfloat16 or float64 "),
        ({"rows": 3, "bias": torch.ones(3)}, "bias must be [N] = [4] but got shape [3]"),
        (
            {"rows": 3, "weight": torch.ones(4)},
            "weight must have 2 dimensions [N, K] but got shape",
        ),
        ({"rows": 3, "weight": torch.ones(4, 3, device="meta")}, "weight must be on the CPU but "),
    ],
)
def test_a_bad_gelu_linear_plan_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        plan.gelu_linear(**{"weight": torch.ones(4, 3), **options})
    assert str(caught.value).startswith(f"[plan.gelu_linear] {message}")


def test_a_bad_rope_plan_is_refused_as_by_rope() -> None:
    cos, sin = tables(rows=2)
    message = "[rope] the table must have at least offset + seq = 3 rows but got 2"
    assert_refused(lambda: plan.rope((1, 1, 3, 8), cos, sin), message)
    message = "[rope] layout must be 'bhsd' or 'bshd' but got 'x'"
    assert_refused(lambda: plan.rope((1, 1, 2, 8), cos, sin, layout="x"), message)


def test_graphs_leave_plans_out() -> None:
    torch._dynamo.reset()
    (w, b), x = layer(), torch.randn(3, 20)
    planned = plan.gelu_linear(w, b, rows=3)
    compiled = torch.compile(lambda x: planned(x) * 2, backend="aot_eager")
    assert_same_bits(compiled(x), planned(x) * 2)
    with pytest.raises(Exception, match=r"(?i)plan|unsupported"):
        torch.compile(lambda x: planned(x) * 2, backend="aot_eager", fullgraph=True)(x)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        message = "[plan.gelu_linear] x must be a torch.Tensor and no subclass of it but got "
        assert_refused(lambda: planned(fake), message + "FakeTensor")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        other = "a plan must not be called under a mode that makes other tensors but got FakeTensor"
        assert_refused(lambda: planned(x), f"[plan.gelu_linear] {other}")
