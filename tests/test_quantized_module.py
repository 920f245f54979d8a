"""GELULinear with low-precision weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_refused
from quantized_layers import KINDS, each_dtype, each_kind, run
from torch import nn

from fusedops import quantize_weight
from fusedops.nn import GELULinear
from fusedops.testing import (
    DTYPES,
    assert_same_bits,
)

ops = torch.ops.fusedops


# --- the module -----------------------------------------------------------------------------------

STATE = {
    "bf16": {"weight": torch.bfloat16, "bias": torch.float32},
    "int8": {"weight": torch.int8, "scale": torch.float32, "bias": torch.float32},
    "w8a8": {"weight": torch.int8, "scale": torch.float32, "bias": torch.float32},
}


def module_of(kind: str, *, bias: bool = True, **more: Any) -> tuple[GELULinear, nn.Linear]:
    """A module and the linear layer that it was made from."""
    linear = nn.Linear(6, 9, bias)
    return GELULinear.from_linear(linear, **KINDS[kind], **more), linear  # type: ignore[arg-type]


@each_kind
@pytest.mark.parametrize("bias", [False, True])
def test_module_computes_what_the_function_does(kind: str, bias: bool) -> None:
    module, linear = module_of(kind, bias=bias, approximate="tanh")
    q, scale = quantize_weight(linear.weight, module.weight_dtype or torch.float32)
    x = torch.randn(2, 3, 6)
    expected = run(kind, [x, q, scale, linear.bias], approximate="tanh")
    assert_same_bits(module(x), expected.detach())
    assert not module(x).requires_grad


@each_kind
def test_state_dict_holds_what_is_stored(kind: str) -> None:
    module, linear = module_of(kind)
    assert {name: t.dtype for name, t in module.state_dict().items()} == STATE[kind]
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    twin = GELULinear(6, 9, **KINDS[kind])  # type: ignore[arg-type]
    assert twin.load_state_dict(module.state_dict()).missing_keys == []
    x = torch.randn(3, 6)
    assert_same_bits(twin(x), module(x))
    assert linear.weight.dtype == torch.float32


@each_kind
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_floating_point_state_dict_is_quantised(kind: str, assign: bool, dtype: str) -> None:
    model = nn.Sequential(nn.Identity(), GELULinear(6, 9, **KINDS[kind]))  # type: ignore[arg-type]
    linear = nn.Linear(6, 9).to(DTYPES[dtype])
    state = {f"1.{name}": t for name, t in linear.state_dict().items()}
    before = dict(state)
    model.load_state_dict(state, assign=assign)
    assert all(state[name] is t for name, t in before.items())
    stored = {name: t.dtype for name, t in model[1].state_dict().items()}
    assert stored == STATE[kind]
    expected = GELULinear.from_linear(linear.float(), **KINDS[kind])  # type: ignore[arg-type]
    x = torch.randn(3, 6)
    assert_same_bits(model(x), expected(x))


INT8 = {"weight": torch.ones(9, 6, dtype=torch.int8), "scale": torch.ones(9)}
WEIGHT, SCALE = "weight must be ", "scale must come with a weight in torch.int8 but got "
# the module's kind, the state, the message
BAD_STATES: dict[str, tuple[str | None, dict[str, torch.Tensor], str]] = {
    "int8 into f32": (None, INT8, WEIGHT + "floating point but got torch.int8"),
    "int8 into bf16": ("bf16", INT8, WEIGHT + "floating point but got torch.int8"),
    "long": (
        "int8",
        {**INT8, "weight": torch.ones(9, 6, dtype=torch.int64)},
        WEIGHT + "floating point or torch.int8 but got torch.int64",
    ),
    "no scale": ("int8", {"weight": INT8["weight"]}, SCALE + "None"),
    "no weight": ("int8", {"scale": INT8["scale"]}, SCALE + "no weight"),
    "a scale too many": ("w8a8", {**INT8, "weight": torch.ones(9, 6)}, SCALE + "torch.float32"),
    "a scale for f32": (None, {**INT8, "weight": torch.ones(9, 6)}, SCALE + "torch.float32"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("bad", BAD_STATES)
def test_a_state_of_another_kind_is_refused(bad: str, strict: bool) -> None:
    kind, state, message = BAD_STATES[bad]
    module = module_of(kind)[0] if kind else GELULinear(6, 9)
    model = nn.Sequential(module)
    before = [t.clone() for t in module.state_dict().values()]
    state = {f"0.{name}": t for name, t in {"bias": torch.zeros(9), **state}.items()}
    assert_refused(lambda: model.load_state_dict(state, strict=strict), f"[GELULinear] 0.{message}")
    for ours, was in zip(module.state_dict().values(), before, strict=True):
        assert torch.equal(ours, was)


# A bfloat16 weight says nothing of where it comes from: it is a floating-point weight.
@pytest.mark.parametrize("kind", [None, "int8", "w8a8"])
def test_a_bfloat16_state_is_a_floating_point_state(kind: str | None) -> None:
    module = module_of(kind)[0] if kind else GELULinear(6, 9)
    bf16, linear = module_of("bf16")
    module.load_state_dict(bf16.state_dict())
    rounded = nn.Linear(6, 9)
    rounded.load_state_dict({"weight": linear.weight.bfloat16().float(), "bias": linear.bias})
    expected = GELULinear.from_linear(rounded, **(KINDS[kind] if kind else {}))  # type: ignore[arg-type]
    x = torch.randn(3, 6)
    assert_same_bits(module(x).detach(), expected(x).detach())


def test_sizes_are_checked_and_floats_converted() -> None:
    int8, bf16, plain = (module_of("int8")[0], module_of("bf16")[0], GELULinear(6, 9))
    with pytest.raises(RuntimeError, match="size mismatch"):
        int8.load_state_dict(nn.Linear(7, 9).state_dict())
    bf16.load_state_dict(GELULinear.from_linear(nn.Linear(6, 9)).state_dict())
    plain.load_state_dict(bf16.state_dict())


def _saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@each_kind
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved_and_loaded]
)
def test_copies(kind: str, duplicate: Callable[[Any], Any]) -> None:
    module, _ = module_of(kind)
    twin, x = duplicate(module), torch.randn(3, 6)
    assert repr(twin) == repr(module)
    assert_same_bits(twin(x), module(x))


@each_kind
@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_conversions_leave_the_weights_alone(kind: str, convert: str) -> None:
    module, _ = module_of(kind)
    x = torch.randn(3, 6)
    expected = module(x)
    getattr(module, convert)()
    assert {name: t.dtype for name, t in module.state_dict().items()} == STATE[kind]
    assert_same_bits(module(x), expected)


@each_kind
@each_dtype
def test_module_takes_inputs_of_any_dtype(kind: str, dtype: str) -> None:
    module, _ = module_of(kind)
    assert module(torch.randn(3, 6).to(DTYPES[dtype])).dtype == DTYPES[dtype]


@each_kind
def test_meta_device_and_back(kind: str) -> None:
    module = GELULinear(6, 9, device="meta", **KINDS[kind])  # type: ignore[arg-type]
    assert module(torch.randn(3, 6, device="meta")).shape == (3, 9)
    module.to_empty(device="cpu").reset_parameters()
    assert {name: t.dtype for name, t in module.state_dict().items()} == STATE[kind]
    assert module(torch.randn(3, 6)).isfinite().all()


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_gradients_pass_through_a_module(kind: str) -> None:
    module, _ = module_of(kind)
    module.bias.requires_grad_()
    x = torch.randn(3, 6, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert module.bias.grad is not None


def test_from_linear_keeps_what_it_is_given() -> None:
    source = GELULinear(6, 9, approximate="quick").eval()
    module = GELULinear.from_linear(source, save="none", weight_dtype=torch.int8)
    assert (module.approximate, module.save, module.training) == ("quick", "none", False)
    assert repr(module) == (
        "GELULinear(in_features=6, out_features=9, bias=True, approximate='quick', save='none', "
        "weight_dtype=torch.int8)"
    )
    plain = GELULinear.from_linear(nn.Linear(6, 9), "tanh")
    assert plain.weight_dtype is None
    assert isinstance(plain.weight, nn.Parameter)
    assert plain.weight.requires_grad


@each_kind
@pytest.mark.parametrize("weight_dtype", [None, torch.int8])
def test_from_linear_refuses_a_quantised_module(
    kind: str, weight_dtype: torch.dtype | None
) -> None:
    source, _ = module_of(kind)
    message = (
        "[GELULinear] linear must hold a floating-point weight of its own but got one with "
        f"weight_dtype {source.weight_dtype}"
    )
    assert_refused(lambda: GELULinear.from_linear(source, weight_dtype=weight_dtype), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weight_dtype": torch.float16},
            "weight_dtype must be None, torch.bfloat16 or torch.int8 but got torch.float16",
        ),
        (
            {"weight_dtype": torch.int8, "activation_dtype": torch.uint8},
            "activation_dtype must be None or torch.int8 but got torch.uint8",
        ),
        (
            {"activation_dtype": torch.int8},
            "weight_dtype must be torch.int8 for activation_dtype=torch.int8 but got None",
        ),
        (
            {"weight_dtype": torch.bfloat16, "activation_dtype": torch.int8},
            "weight_dtype must be torch.int8 for activation_dtype=torch.int8 but got "
            "torch.bfloat16",
        ),
    ],
)
def test_bad_module_options(options: dict[str, torch.dtype], message: str) -> None:
    assert_refused(lambda: GELULinear(3, 4, **options), f"[GELULinear] {message}")  # type: ignore[arg-type]


@each_kind
def test_symbolic_trace(kind: str) -> None:
    module, _ = module_of(kind)
    traced, x = torch.fx.symbolic_trace(module), torch.randn(3, 6)
    assert_same_bits(traced(x), module(x))
