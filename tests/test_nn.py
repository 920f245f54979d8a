"""GELULinear as a module: what nn.Linear followed by nn.GELU would be, in every use of a module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_refused
from torch import Tensor, nn

import fusedops
from fusedops.nn import GELULinear
from fusedops.testing import DTYPES, assert_same_bits, assert_within

each_variant = pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
each_save = pytest.mark.parametrize("save", ["preact", "none"])


# --- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("approximate", ["erf", "", None])
def test_unknown_variant_is_refused(approximate: Any) -> None:
    message = f"approximate must be 'none', 'tanh' or 'quick' but got {approximate!r}"
    assert_refused(lambda: GELULinear(3, 4, approximate=approximate), f"[GELULinear] {message}")


@pytest.mark.parametrize("save", ["all", "", None])
def test_unknown_save_is_refused(save: Any) -> None:
    message = f"[GELULinear] save must be 'preact' or 'none' but got {save!r}"
    assert_refused(lambda: GELULinear(3, 4, save=save), message)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_are_those_of_linear(dtype: str, bias: bool) -> None:
    torch.manual_seed(3)
    ours = GELULinear(5, 7, bias=bias, dtype=DTYPES[dtype])
    torch.manual_seed(3)
    theirs = nn.Linear(5, 7, bias=bias, dtype=DTYPES[dtype])
    assert isinstance(ours, nn.Linear)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    for name in expected:
        assert_same_bits(state[name], expected[name])
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_state_dicts_are_exchangeable() -> None:
    ours, theirs = GELULinear(5, 7), nn.Linear(5, 7)
    assert ours.load_state_dict(theirs.state_dict(), strict=True).missing_keys == []
    assert_same_bits(ours.weight.detach(), theirs.weight.detach())
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_bits(ours.bias.detach(), theirs.bias.detach())


def test_positional_arguments_are_those_of_linear_and_gelu() -> None:
    module = GELULinear(5, 7, False, "tanh")
    assert module.bias is None
    assert module.approximate == "tanh"
    assert module.save == "preact"
    assert repr(module) == (
        "GELULinear(in_features=5, out_features=7, bias=False, approximate='tanh')"
    )


def test_representation_says_what_is_not_the_default() -> None:
    assert "save='none'" in repr(GELULinear(5, 7, save="none"))
    assert "save" not in repr(GELULinear(5, 7))


def test_wrong_input_is_refused() -> None:
    module, x = GELULinear(5, 7), torch.randn(2, 6)
    message = "[gelu_linear] input's last dimension must be weight's K = 5 but got shape [2, 6]"
    assert_refused(lambda: module(x), message, x, module.weight)


# --- the uses of a module -------------------------------------------------------------------------


@each_variant
def test_result_is_that_of_the_function(approximate: str) -> None:
    module, x = GELULinear(5, 7, approximate=approximate), torch.randn(2, 3, 5)
    expected = fusedops.gelu_linear(x, module.weight, module.bias, approximate=approximate)
    assert_same_bits(module(x).detach(), expected.detach())


@pytest.mark.parametrize(("save", "kept"), [("preact", 1), ("none", 0)])
def test_module_saves_what_it_is_told(save: str, kept: int) -> None:
    module, x = GELULinear(5, 7, save=save), torch.randn(3, 5)
    shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape), lambda t: t):
        module(x)
    assert shapes.count(torch.Size((3, 7))) == kept


def _saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": _saved_and_loaded,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies(duplicate: Callable[[Any], Any]) -> None:
    module, x = GELULinear(5, 7, approximate="quick", save="none"), torch.randn(3, 5)
    twin = duplicate(module)
    assert type(twin) is GELULinear
    assert (twin.approximate, twin.save) == ("quick", "none")
    assert twin.weight.data_ptr() != module.weight.data_ptr()
    assert_same_bits(twin(x).detach(), module(x).detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_another_dtype(dtype: str) -> None:
    module, x = GELULinear(5, 7).to(DTYPES[dtype]), torch.randn(3, 5).to(DTYPES[dtype])
    y = module(x)
    assert y.dtype == DTYPES[dtype]
    assert_same_bits(
        y.detach(), fusedops.gelu_linear(x, module.weight.detach(), module.bias.detach())
    )


def test_meta_device_and_back() -> None:
    module = GELULinear(5, 7, device="meta")
    assert module.weight.is_meta
    y = module(torch.randn(2, 3, 5, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 3, 7)
    y.sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.shape == (7, 5)
    module.to_empty(device="cpu").load_state_dict(nn.Linear(5, 7).state_dict())
    assert module(torch.randn(3, 5)).isfinite().all()


@pytest.fixture
def other_defaults() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)
    torch.set_default_device(None)


def test_default_device_and_dtype(other_defaults: None) -> None:
    y = GELULinear(5, 7)(torch.randn(3, 5))
    assert (y.device.type, y.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign: bool) -> None:
    module, source, x = GELULinear(5, 7), nn.Linear(5, 7), torch.randn(3, 5)
    with torch.no_grad():
        module(x)
    module.load_state_dict(source.state_dict(), assign=assign)
    expected = fusedops.gelu_linear(x, source.weight, source.bias)
    assert_same_bits(module(x).detach(), expected.detach())


# Nothing of the weights is kept from one call to the next: a write through .data shows at once.
def test_weights_are_read_at_every_call() -> None:
    module, x = GELULinear(5, 7).requires_grad_(False), torch.randn(3, 5)
    module(x)
    module.weight.data.mul_(2)
    assert_same_bits(module(x), fusedops.gelu_linear(x, module.weight, module.bias))


def test_weights_may_be_tied_and_parametrised() -> None:
    module = nn.utils.parametrizations.weight_norm(GELULinear(5, 7))
    x = torch.randn(3, 5)
    expected = fusedops.gelu_linear(x, module.weight, module.bias)
    assert_same_bits(module(x).detach(), expected.detach())
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_functional_call() -> None:
    module, x = GELULinear(5, 7), torch.randn(3, 5)
    parameters = {name: p.detach() * 2 for name, p in module.named_parameters()}
    y = torch.func.functional_call(module, parameters, (x,))
    assert_same_bits(y, fusedops.gelu_linear(x, parameters["weight"], parameters["bias"]))


# --- training -------------------------------------------------------------------------------------


def network(first: nn.Module, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(first, nn.Linear(9, 3)).to(dtype)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


# Each of five steps adds lr times a gradient: a sum of 16 products whose magnitudes add up to less
# than 16, each within 8 eps of exact by the bounds of the ops; and rounds the weight once.
@each_variant
@each_save
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_training_is_that_of_linear_and_gelu(dtype: str, save: str, approximate: str) -> None:
    kind = DTYPES[dtype]
    activation: nn.Module = nn.GELU(approximate=approximate) if approximate != "quick" else _Quick()
    theirs = network(nn.Sequential(nn.Linear(6, 9), activation), kind)
    ours = network(GELULinear(6, 9, approximate=approximate, save=save), kind)
    x, target = torch.randn(16, 6, dtype=kind), torch.randn(16, 3, dtype=kind)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
    bound = 5 * 8 * 16 * torch.finfo(kind).eps * 0.05
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        limit = torch.full_like(p, bound, dtype=torch.float64)
        limit += 5 * torch.finfo(kind).eps * q.detach().double().abs()
        assert_within(p.detach(), q.detach().double(), limit)


class _Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@each_save
def test_training_moves_every_parameter_under_autocast(save: str) -> None:
    model = network(GELULinear(6, 9, save=save), torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(16, 6)).square().mean()
    loss.backward()
    optimizer.step()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all((p != q).any() for p, q in zip(model.parameters(), before, strict=True))


def test_compiled_module() -> None:
    torch._dynamo.reset()
    model, x = network(GELULinear(6, 9), torch.float32), torch.randn(4, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    grads = [torch.autograd.grad(m(x).sum(), [*model.parameters()]) for m in (compiled, model)]
    torch.testing.assert_close(*grads)


class _Block(nn.Module):
    """A transformer block with grouped heads, packed projections and both in-place and pure ops."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.qkv, self.out = nn.Linear(32, 64), nn.Linear(32, 32)
        self.up, self.down = GELULinear(32, 48, approximate="tanh"), nn.Linear(48, 32)
        turns = torch.outer(torch.arange(40.0), 0.5 ** torch.arange(4.0))
        self.cos, self.sin = nn.Buffer(turns.cos()), nn.Buffer(turns.sin())

    def forward(self, x: Tensor, offset: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 8)).transpose(1, 2).split((4, 2, 2), 1)
        turn = fusedops.rope_qk_ if self.in_place else fusedops.rope_qk
        q, k = turn(q.clone(), k.clone(), self.cos, self.sin, offset=offset)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(self.up(fusedops.gelu(x)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_blocks_under_the_default_compiler() -> None:
    torch._dynamo.reset()
    blocks = nn.ModuleList([_Block(in_place=True), _Block(in_place=False)])

    def run(x: Tensor, offset: int) -> Tensor:
        for block in blocks:
            x = block(x, offset)
        return x

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for tokens, offset in ((6, 0), (7, 3)):
        x = torch.randn(2, tokens, 32, requires_grad=True)
        leaves = [x, *blocks.parameters()]
        actual, expected = compiled(x, offset), run(x, offset)
        torch.testing.assert_close(actual, expected)
        grads, wanted = (torch.autograd.grad(y.square().sum(), leaves) for y in (actual, expected))
        torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-4)


def test_symbolic_trace() -> None:
    layer = GELULinear(8, 4)
    traced = torch.fx.symbolic_trace(layer)
    x = torch.randn(3, 8)
    assert [node.op for node in traced.graph.nodes].count("call_function") == 1
    assert_same_bits(traced(x), layer(x))


# Autograd's functions cannot be saved; the ops that are traced in their place can.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("learning", [False, True], ids=["traced-frozen", "traced-learning"])
@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: fusedops.rope(x[None], w[:3, :4], w[1:, 4:]),
        lambda x, w: fusedops.gelu(x) @ w.t(),
        fusedops.linear,
        lambda x, w: fusedops.linear(x, w, activation="silu"),
        fusedops.gelu_linear,
        lambda x, w: fusedops.gelu_linear(x, w, save="none"),
    ],
    ids=["rope", "gelu", "linear", "linear-silu", "gelu_linear-preact", "gelu_linear-none"],
)
def test_a_jit_trace_can_be_saved_and_differentiated(
    call: Callable[..., Tensor], learning: bool
) -> None:
    leaves = [torch.randn(n, 8, requires_grad=learning) for n in (3, 4)]
    file = io.BytesIO()
    # The check traces again without gradients, where another op is called.
    torch.jit.save(torch.jit.trace(call, tuple(leaves), check_trace=False), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    more = [t.detach().add(1).requires_grad_() for t in leaves]
    actual, expected = loaded(*more), call(*more)
    assert_same_bits(actual.detach(), expected.detach())
    grads = [torch.autograd.grad(y.square().sum(), more) for y in (actual, expected)]
    torch.testing.assert_close(*grads)
