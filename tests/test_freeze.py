"""freeze and unfreeze: when the packing is used, and that no change which can be seen is missed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_refused, python
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import fusedops
from fusedops import freezing
from fusedops.nn import GELULinear
from fusedops.testing import DTYPES, assert_same_bits

N = K = 24  # square: a transposed weight fits as well


class Ops(TorchDispatchMode):
    """The names of our ops that were called in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusedops":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


PACKED, PLAIN, PACK = "gelu_linear_packed_nograd", "gelu_linear_nograd", "linear_pack"


def ops_of(call: Callable[[], Any]) -> list[str]:
    """Our ops that the call runs."""
    with Ops() as ops:
        call()
    return ops.names


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> GELULinear:
    """A frozen layer that requires no grad."""
    return fusedops.freeze(GELULinear(K, N, dtype=dtype, **options).requires_grad_(False))


def x_of(dtype: torch.dtype = torch.float32, rows: int = 3) -> Tensor:
    return torch.randn(rows, K).to(dtype)


def assert_current(module: GELULinear, x: Tensor) -> None:
    """The result is that of the weight as it is now, freshly packed."""
    packed = fusedops.pack_linear(module.weight, module.bias)
    with torch.no_grad():
        y = module(x)
    assert_same_bits(y, fusedops.gelu_linear(x, packed, approximate=module.approximate))


# --- use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packs_once(dtype: str, bias: bool, approximate: str, isa: str) -> None:
    module = layer(DTYPES[dtype], bias=bias, approximate=approximate)
    x = x_of(DTYPES[dtype])
    assert ops_of(lambda: module(x)) == [PACK, PACKED]
    assert (
        ops_of(lambda: [module(x), module(x[:1]), module(x.t().contiguous().t())]) == [PACKED] * 3
    )
    assert_current(module, x)


def test_freeze_and_unfreeze_take_a_model() -> None:
    model = nn.Sequential(GELULinear(K, N), nn.Linear(N, K), nn.Sequential(GELULinear(K, N)))
    assert fusedops.freeze(model) is model
    frozen = [m for m in model.modules() if "frozen=True" in repr(m).splitlines()[0]]
    assert len(frozen) == 2
    with torch.no_grad():
        assert ops_of(lambda: model(x_of())) == [PACK, PACKED] * 2
        assert fusedops.unfreeze(model) is model
        assert ops_of(lambda: model(x_of())) == [PLAIN] * 2
    assert "frozen" not in repr(model)
    assert fusedops.unfreeze(model) is model


@pytest.mark.parametrize("what", ["freeze", "unfreeze"])
@pytest.mark.parametrize(
    ("module", "name"), [(nn.Linear(2, 3), "Linear"), (nn.Sequential(), "Sequential"), (3, "int")]
)
def test_nothing_to_freeze_is_refused(what: str, module: Any, name: str) -> None:
    message = f"[{what}] module must be or contain a fusedops.nn.GELULinear but got {name}"
    assert_refused(lambda: getattr(fusedops, what)(module), message)


def test_a_plan_is_frozen_from_the_start() -> None:
    plan = fusedops.plan.gelu_linear(torch.ones(3, 2), rows=1)
    assert fusedops.freeze(plan) is plan
    message = "[unfreeze] a plan must be kept as it is (it has no weight to go back to) but got one"
    assert_refused(lambda: fusedops.unfreeze(plan), message)


def test_wrong_input_is_refused_as_by_a_plain_module() -> None:
    module, x = layer(), torch.randn(2, K + 1)
    message = f"[gelu_linear] input's last dimension must be weight's K = {K} but got shape [2, 25]"
    assert_refused(lambda: module(x), message, x)
    half = x_of(torch.float16)
    message = "[gelu_linear] weight must have input's dtype Half but got Float"
    assert_refused(lambda: module(half), message, half)


# --- every change that can be seen ----------------------------------------------------------------


def _step(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[Any], None]:
    def change(module: GELULinear) -> None:
        module.requires_grad_()
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        make(list(module.parameters())).step()
        module.requires_grad_(False)

    return change


class _WritesData(torch.optim.Optimizer):
    """As many old optimizers do: no version counter moves."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=0.1)


def _load(assign: bool) -> Callable[[GELULinear], None]:
    def change(module: GELULinear) -> None:
        module.load_state_dict(nn.Linear(K, N).state_dict(), assign=assign)
        module.requires_grad_(False)

    return change


def _copy(module: GELULinear) -> None:
    with torch.no_grad():
        module.weight.copy_(torch.randn(N, K))


def _inference_copy(module: GELULinear) -> None:
    with torch.inference_mode():
        module.weight.mul_(2)


def _swap(module: GELULinear) -> None:
    module.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)


def _swap_tensors(module: GELULinear) -> None:
    other = nn.Parameter(torch.randn(N, K), requires_grad=False)
    torch.utils.swap_tensors(module.weight, other)


def _set_data(module: GELULinear) -> None:
    module.weight.data = torch.randn(N, K)


# Away and back: address, version and dtype are the old ones unless the old memory is kept.
def _round_trip(module: GELULinear) -> None:
    module.weight.data = module.weight.data.half()
    gc.collect()
    module.weight.data = module.weight.data.float()


def _transpose(module: GELULinear) -> None:
    module.weight.data = module.weight.data.t()


def _reinterpret(module: GELULinear) -> None:
    module.weight.data = module.weight.data.view(torch.int32).view(torch.float32).flip(0)


def _vector(module: GELULinear) -> None:
    with torch.no_grad():
        nn.utils.vector_to_parameters(torch.randn(N * K + N), module.parameters())


CHANGES: dict[str, Callable[[GELULinear], Any]] = {
    "copy_": _copy,
    "inference-mode": _inference_copy,
    "init": lambda m: nn.init.normal_(m.weight),
    "reset": lambda m: m.reset_parameters(),
    "sgd": _step(lambda p: torch.optim.SGD(p, lr=0.1)),
    "sgd-fused": _step(lambda p: torch.optim.SGD(p, lr=0.1, fused=True)),
    "adamw": _step(lambda p: torch.optim.AdamW(p, lr=0.1)),
    "adamw-foreach": _step(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "adamw-fused": _step(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "optimizer-data": _step(_WritesData),
    "load": _load(assign=False),
    "load-assign": _load(assign=True),
    "swap": _swap,
    "swap-tensors": _swap_tensors,
    "data": _set_data,
    "data-round-trip": _round_trip,
    "data-transposed": _transpose,
    "data-flipped": _reinterpret,
    "vector": _vector,
    "double-and-back": lambda m: m.bfloat16().float(),
    "half-and-back": lambda m: m.half().to(torch.float32),
    "share-memory": lambda m: m.share_memory(),
    "to-empty": lambda m: m.to_empty(device="cpu").reset_parameters(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[GELULinear], Any]) -> None:
    module, x = layer(), x_of()
    module(x)
    change(module)
    assert ops_of(lambda: module(x)) == [PACK, PACKED]
    assert ops_of(lambda: module(x)) == [PACKED]
    assert_current(module, x)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f64"])
def test_another_dtype_is_seen(dtype: str) -> None:
    module = layer()
    module(x_of())
    module.to(DTYPES[dtype])
    x = x_of(DTYPES[dtype])
    assert ops_of(lambda: module(x)) == [PACK, PACKED]
    assert_current(module, x)


def test_another_dtype_of_the_same_memory_is_seen() -> None:
    module = layer(torch.float16)
    module(x_of(torch.float16))
    module.weight.data = module.weight.data.view(torch.bfloat16)
    module.bias.data = module.bias.data.bfloat16()
    assert_current(module, x_of(torch.bfloat16))


# A weight that came to lie where the packed one was would look like it.
def test_no_other_tensor_can_lie_where_the_packed_weight_lies() -> None:
    module, array = layer(), np.ones((N, K), np.float32)
    module.weight = nn.Parameter(torch.from_numpy(array), requires_grad=False)
    module(x_of())
    memory = weakref.ref(array)
    del array
    module.weight.data = torch.ones(N, K)
    assert memory() is not None
    module(x_of())
    assert memory() is None


def test_another_shape_of_the_same_memory_is_seen() -> None:
    module, x = layer(bias=False), x_of()
    module(x)
    module.weight.data = module.weight.data[: N // 2]
    assert module(x).shape == (3, N // 2)
    assert_current(module, x)


def test_the_bias_is_read_at_every_call() -> None:
    module, x = layer(), x_of()
    module(x)
    module.bias.data.mul_(3)  # what no version counter says
    assert ops_of(lambda: module(x)) == [PACKED]
    assert_current(module, x)
    module.bias = None
    assert_current(module, x)


@pytest.mark.parametrize("other", fusedops.isa.supported())
def test_another_isa_is_seen(other: str, isa: str) -> None:
    module, x = layer(), x_of()
    module(x)
    with fusedops.isa.use(other):
        assert_current(module, x)
    assert_current(module, x)


def test_autocast_is_seen() -> None:
    module, x = layer(), x_of()
    module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops_of(lambda: module(x)) == [PACK, PACKED]
        assert ops_of(lambda: module(x)) == [PACKED]
        y = module(x)
    packed = fusedops.pack_linear(module.weight, module.bias, dtype=torch.bfloat16)
    assert_same_bits(y, fusedops.gelu_linear(x.bfloat16(), packed))
    assert_current(module, x)


def test_functional_call_with_parameters_and_tensors() -> None:
    module, x = layer(), x_of()
    before = module(x)
    lent = {name: nn.Parameter(p * 2, requires_grad=False) for name, p in module.named_parameters()}
    expected = fusedops.gelu_linear(x, fusedops.pack_linear(lent["weight"], lent["bias"]))
    assert_same_bits(torch.func.functional_call(module, lent, (x,)), expected)
    assert_same_bits(module(x), before)
    plain = {name: p.detach() for name, p in lent.items()}
    call = lambda: torch.func.functional_call(module, plain, (x,))  # noqa: E731
    assert ops_of(call) == [PLAIN]
    assert_same_bits(call(), fusedops.gelu_linear(x, plain["weight"], plain["bias"]))
    assert_same_bits(module(x), before)


# What the docstring says cannot be seen, and the way out.
@pytest.mark.parametrize("write", [lambda w: w.data.mul_(2), lambda w: w.detach().numpy().fill(1)])
def test_an_invisible_write_needs_another_freeze(write: Callable[[Tensor], Any]) -> None:
    module, x = layer(), x_of()
    before = module(x)
    write(module.weight)
    assert_same_bits(module(x), before)
    fusedops.freeze(module)
    assert_current(module, x)


# --- where the plain weight serves ----------------------------------------------------------------


def test_a_gradient_takes_the_plain_weight() -> None:
    module, twin, x = layer(save="none"), GELULinear(K, N, save="none"), x_of()
    twin.load_state_dict(module.state_dict())
    module(x)
    module.train().requires_grad_()
    x.requires_grad_()
    grads = [torch.autograd.grad(m(x).sum(), [x, *m.parameters()]) for m in (module, twin)]
    for ours, theirs in zip(*grads, strict=True):
        assert_same_bits(ours, theirs)
    module.requires_grad_(False)
    assert module(x).requires_grad
    assert ops_of(lambda: module(x.detach())) == [PACKED]


def test_training_a_frozen_module_is_training_it() -> None:
    frozen, plain = layer().requires_grad_(), GELULinear(K, N)
    plain.load_state_dict(frozen.state_dict())
    x = x_of(rows=8)
    for module in (frozen, plain):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, fused=True)
        for _ in range(3):
            with torch.no_grad():
                module(x)
            module(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(frozen.parameters(), plain.parameters(), strict=True):
        assert_same_bits(ours.detach(), theirs.detach())
    assert_current(frozen, x)


def test_dual_numbers_and_transforms() -> None:
    module, x = layer(), x_of()
    module(x)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = module(forward_ad.make_dual(x, tangent))
        assert forward_ad.unpack_dual(dual).tangent is not None
    per_row = torch.vmap(module)(x)
    torch.testing.assert_close(per_row, module(x))
    gradient = torch.func.grad(lambda x: module(x).sum())(x)
    assert gradient.shape == x.shape


def _orthogonal(module: GELULinear) -> Any:
    return parametrizations.orthogonal(module)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize(
    "parametrise",
    [
        lambda m: parametrize.register_parametrization(m, "weight", _Doubled()),
        lambda m: parametrize.register_parametrization(m, "bias", _Doubled()),
        _orthogonal,
        lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
    ],
    ids=["weight", "bias", "orthogonal", "pruned"],
)
def test_a_parametrised_module_takes_the_plain_weight(
    parametrise: Callable[[GELULinear], Any],
) -> None:
    module, x = layer(), x_of()
    module(x)
    parametrise(module)
    with torch.no_grad():
        assert PACKED not in ops_of(lambda: module(x))
        assert_same_bits(module(x), fusedops.gelu_linear(x, module.weight, module.bias))


def test_a_parametrisation_can_be_removed() -> None:
    module, x = layer(), x_of()
    parametrize.register_parametrization(module, "weight", _Doubled())
    parametrize.remove_parametrizations(module, "weight")
    assert_current(module, x)


def test_compiled_and_exported_modules_follow_the_weight() -> None:
    torch._dynamo.reset()
    module, x = layer(), x_of()
    module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    traced = torch.jit.trace(module, (x,), check_trace=False)
    exported = torch.export.export(module, (x,), strict=False)
    assert "packed" not in str(exported.graph)
    for _ in range(2):
        expected = fusedops.gelu_linear(x, module.weight, module.bias)
        for run in (compiled, traced):
            assert_same_bits(run(x), expected)
        module.weight.data.mul_(2)


# The packed bytes would be a constant of the graph.
@pytest.mark.parametrize("options", [{}, {"pre_dispatch": True}], ids=["make_fx", "pre_dispatch"])
def test_a_graph_of_make_fx_follows_the_weight(options: dict[str, Any]) -> None:
    module, x = layer(), x_of()
    module(x)
    graph = make_fx(module, **options)(x)
    _copy(module)
    assert_same_bits(graph(x), fusedops.gelu_linear(x, module.weight, module.bias))
    assert ops_of(lambda: module(x)) == [PACK, PACKED]


def test_symbolic_trace() -> None:
    module, x = layer(), x_of()
    module(x)
    traced = torch.fx.symbolic_trace(module)
    assert [node.op for node in traced.graph.nodes].count("call_function") == 1
    assert_same_bits(traced(x), fusedops.gelu_linear(x, module.weight, module.bias))


def test_meta_and_fake_tensors() -> None:
    module = fusedops.freeze(GELULinear(K, N, device="meta"))
    assert module(torch.randn(3, K, device="meta")).is_meta
    with torch._subclasses.FakeTensorMode():
        fake = fusedops.freeze(GELULinear(K, N).requires_grad_(False))
        assert fake(torch.randn(3, K)).shape == (3, N)


# --- inference mode -------------------------------------------------------------------------------


def test_a_module_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module = layer()
        x = x_of()
        assert module.weight.is_inference()
        assert ops_of(lambda: module(x)) == [PACK, PACKED]
        assert ops_of(lambda: module(x)) == [PACKED]
        module.load_state_dict(nn.Linear(K, N).state_dict())
        assert_current(module, x)
        _swap(module)
        assert_current(module, x)
    assert_current(module, x_of())


def test_calls_in_and_out_of_inference_mode_share_a_packing() -> None:
    module, x = layer(), x_of()
    with torch.inference_mode():
        assert ops_of(lambda: module(x)) == [PACK, PACKED]
    assert ops_of(lambda: module(x)) == [PACKED]
    assert_current(module, x)


# --- copies and memory ----------------------------------------------------------------------------


def _saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
def test_a_copy_is_frozen_on_its_own(duplicate: Callable[[Any], Any]) -> None:
    module, x = layer(), x_of()
    module(x)
    twin = duplicate(module)
    assert ops_of(lambda: twin(x)) == [PACK, PACKED]
    _copy(twin)
    assert_current(twin, x)
    assert ops_of(lambda: module(x)) == [PACKED]
    assert_current(module, x)


def test_a_shallow_copy_shares_what_it_can() -> None:
    module, x = layer(), x_of()
    module(x)
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    _swap(twin)
    for _ in range(2):
        assert_current(twin, x)
        assert_current(module, x)


def test_pickles_hold_no_packing() -> None:
    module = layer()
    size = len(pickle.dumps(module))
    module(x_of())
    assert len(pickle.dumps(module)) == size


def test_state_dict_is_that_of_linear() -> None:
    module = layer()
    module(x_of())
    expected = nn.Linear(K, N)
    assert list(module.state_dict()) == list(expected.state_dict())
    assert list(module.state_dict(keep_vars=True)) == list(expected.state_dict())
    assert [n for n, _ in module.named_buffers()] == []
    expected.load_state_dict(module.state_dict(), strict=True)


@pytest.mark.parametrize(
    "free", [fusedops.unfreeze, nn.Module.half, nn.Module.float], ids=["unfreeze", "half", "float"]
)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_unfreeze_and_conversions_free_the_memory(
    dtype: str, free: Callable[[nn.Module], Any]
) -> None:
    module = layer(DTYPES[dtype])
    module(x_of(DTYPES[dtype]))
    packed = weakref.ref(module._packing._kept[3])  # type: ignore[union-attr]
    assert packed() is not None
    free(module)
    assert packed() is None


# An optimizer of another model leaves the packing alone, and a dead module is forgotten.
def test_an_optimizer_touches_its_own_weights_only() -> None:
    module, other, x = layer(), layer(), x_of()
    module(x), other(x)
    CHANGES["sgd-fused"](other)
    assert ops_of(lambda: module(x)) == [PACKED]
    gone = weakref.ref(other._packing)  # type: ignore[arg-type]
    del other
    gc.collect()
    assert gone() is None


def test_threads_share_a_frozen_module() -> None:
    module, x = layer(), x_of()
    expected = module(x)
    wrong: list[Tensor] = []
    start = threading.Barrier(3)

    def work() -> None:
        start.wait()
        for _ in range(200):
            y = module(x)
            if not torch.equal(y, expected):
                wrong.append(y)

    def disturb() -> None:
        start.wait()
        for _ in range(50):
            module._packing.forget()  # type: ignore[union-attr]

    threads = [threading.Thread(target=f) for f in (work, work, disturb)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Another thread's step while the weight is being packed: what is packed is the old weight, or half.
@pytest.mark.parametrize("change", ["sgd-fused", "optimizer-data"])
def test_a_step_while_packing_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer(), x_of()
    pack = freezing.ops.linear_pack

    def stepped(weight: Tensor) -> Any:
        packed = pack(weight)
        CHANGES[change](module)
        return packed

    with monkeypatch.context() as patched:
        patched.setattr(freezing, "ops", SimpleNamespace(linear_pack=stepped))
        module(x)
    assert_current(module, x)
    assert ops_of(lambda: module(x)) == [PACKED]


def test_a_state_loaded_while_packing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        module, x = layer(), x_of()
        pack, state = freezing.ops.linear_pack, nn.Linear(K, N).state_dict()

        def loaded(weight: Tensor) -> Any:
            packed = pack(weight)
            module.load_state_dict(state)
            return packed

        with monkeypatch.context() as patched:
            patched.setattr(freezing, "ops", SimpleNamespace(linear_pack=loaded))
            module(x)
        assert_current(module, x)


def test_modules_are_frozen_while_an_optimizer_steps() -> None:
    kept = [fusedops.freeze(GELULinear(2, 2)) for _ in range(2000)]
    optimizer = torch.optim.SGD(kept[0].parameters(), lr=0.1)
    failed: list[BaseException] = []
    done = threading.Event()

    def step() -> None:
        while not done.is_set():
            try:
                freezing._after_step(optimizer, (), {})
            except RuntimeError as error:
                failed.append(error)

    thread = threading.Thread(target=step)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    for module in kept[:500]:
        fusedops.freeze(module)
    done.set()
    thread.join()
    sys.setswitchinterval(interval)
    assert failed == []


def test_a_process_that_never_freezes_has_no_hook() -> None:
    run = python("import fusedops, fusedops.nn, sys; sys.exit('fusedops.freezing' in sys.modules)")
    assert run.returncode == 0, run.stderr


@pytest.fixture(autouse=True)
def _grad() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
