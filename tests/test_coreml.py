"""Core ML programs: what conversion makes is read here; only macOS could run it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusedops
from fusedops import coreml, reference
from fusedops.testing import SPECS

# torch.export's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # coremltools deprecates what it calls.
    pytest.mark.filterwarnings("ignore:Function _TORCH_OPS_REGISTRY:DeprecationWarning"),
]

MODES = {"none": "EXACT", "tanh": "TANH_APPROXIMATION", "quick": "SIGMOID_APPROXIMATION"}
each_approximate = pytest.mark.parametrize("approximate", MODES)


@pytest.fixture(scope="module")
def ct() -> Any:
    return pytest.importorskip(
        "coremltools", reason="coremltools is not installed: make test installs it"
    )


def operations(model: Any) -> list[Any]:
    """What a program computes, in order: its constants left out."""
    return [op for op in model._mil_program.functions["main"].operations if op.op_type != "const"]


def names(model: Any) -> list[str]:
    return [op.op_type for op in operations(model)]


def features(features: Any) -> dict[str, tuple[list[int], int]]:
    return {
        f.name: ([*f.type.multiArrayType.shape], f.type.multiArrayType.dataType) for f in features
    }


class Layer(nn.Module):
    """linear with an activation, and its own weight."""

    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.weight, self.activation = nn.Parameter(torch.randn(4, 16)), activation

    def forward(self, x: Tensor) -> Tensor:
        return fusedops.linear(x, self.weight, activation=self.activation)


class Two(nn.Module):
    """A node that is called tanh, as the option of the op behind it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 8)
        self.second = fusedops.nn.GELULinear(8, 4, approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


# --- the program of a layer -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("approximate", "bias", "dtype"),
    [
        ("none", True, torch.float32),
        ("none", False, torch.float32),
        ("tanh", True, torch.float32),
        ("quick", True, torch.float32),
        ("none", True, torch.float16),
        ("tanh", True, torch.bfloat16),
        ("quick", True, torch.float64),
    ],
)
def test_a_layer_is_linear_and_gelu(
    ct: Any, approximate: str, bias: bool, dtype: torch.dtype
) -> None:
    layer = fusedops.nn.GELULinear(16, 32, bias=bias, approximate=approximate, dtype=dtype)
    linear, gelu = operations(coreml.convert(layer, torch.randn(3, 16, dtype=dtype)))
    assert (linear.op_type, gelu.op_type) == ("linear", "gelu")
    assert gelu.mode.val == MODES[approximate]
    assert linear.weight.val.dtype == np.float16
    half = layer.weight.detach().to(torch.float32).to(torch.float16)
    assert np.array_equal(linear.weight.val, half.numpy())
    expected = layer.bias.detach().float().half() if bias else torch.zeros(32).half()
    assert np.array_equal(linear.bias.val, expected.numpy())
    assert linear.x.op is None, "the input goes straight into the layer"
    assert gelu.x.op is linear


def test_inputs_and_outputs_are_float16(ct: Any) -> None:
    model = coreml.convert(fusedops.nn.GELULinear(16, 32), torch.randn(2, 3, 16))
    description = model.get_spec().description
    half = ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16
    assert features(description.input) == {"input": ([2, 3, 16], half)}
    assert [*features(description.output).values()] == [([2, 3, 32], half)]
    assert model.get_spec().specificationVersion == 8, "macOS 14"
    assert model.compute_unit == ct.ComputeUnit.CPU_AND_NE


def test_a_package_is_saved(ct: Any, tmp_path: Path) -> None:
    path = tmp_path / "layer.mlpackage"
    coreml.convert(fusedops.nn.GELULinear(16, 32), torch.randn(3, 16), path=path)
    assert ct.utils.load_spec(str(path)).WhichOneof("Type") == "mlProgram"
    assert list(path.rglob("weight.bin"))


def test_conversion_leaves_the_model_alone(ct: Any) -> None:
    layer = fusedops.nn.GELULinear(16, 32, dtype=torch.bfloat16).train()
    before = layer.weight.detach().clone()
    coreml.convert(layer, torch.randn(3, 16, dtype=torch.bfloat16))
    assert layer.training
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (None, ["linear"]),
        ("relu", ["linear", "relu"]),
        ("relu2", ["linear", "relu", "mul"]),
        ("silu", ["linear", "silu"]),
        ("gelu", ["linear", "gelu"]),
        ("gelu_tanh", ["linear", "gelu"]),
        ("gelu_quick", ["linear", "gelu"]),
    ],
)
def test_activations_of_linear(ct: Any, activation: str | None, expected: list[str]) -> None:
    model = coreml.convert(Layer(activation), torch.randn(3, 16))
    assert names(model) == expected
    mode = {"gelu": "EXACT", "gelu_tanh": MODES["tanh"], "gelu_quick": MODES["quick"]}
    assert [op.mode.val for op in operations(model) if op.op_type == "gelu"] == [
        mode[a] for a in [activation] if a in mode
    ]
    if activation == "relu2":
        square = operations(model)[-1]
        assert square.x is square.y


def test_every_activation_has_a_case() -> None:
    cases = test_activations_of_linear.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {name for name, _ in cases} == {None, *reference.ACTIVATIONS}


def test_a_node_called_as_an_option_is_no_option(ct: Any) -> None:
    model = coreml.convert(Two(), torch.randn(3, 16))
    assert names(model) == ["linear", "tanh", "linear", "gelu"]
    assert operations(model)[-1].mode.val == MODES["tanh"]


def test_a_weight_that_is_an_input_and_four_dimensions(ct: Any) -> None:
    class Free(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return fusedops.gelu_linear(x, weight, bias)

    args = torch.randn(2, 3, 4, 16), torch.randn(8, 16), torch.randn(8)
    model = coreml.convert(Free(), *args)
    assert names(model) == ["matmul", "add", "gelu"]
    matmul = operations(model)[0]
    assert (matmul.transpose_x.val, matmul.transpose_y.val) == (False, True)
    assert operations(model)[-1].outputs[0].shape == (2, 3, 4, 8)


@pytest.mark.source
def test_the_example_of_the_page_runs(
    ct: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).resolve().parent.parent / "docs/coreml.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "layer.mlpackage").is_dir()


# --- programs that were made by hand --------------------------------------------------------------


@pytest.fixture
def traced(ct: Any) -> Iterator[Any]:
    coreml.register()

    def convert(model: nn.Module, x: Tensor) -> Any:
        return ct.convert(
            torch.jit.trace(model, x, check_trace=False),
            inputs=[ct.TensorType(name="x", shape=x.shape, dtype=np.float16)],
            minimum_deployment_target=ct.target.macOS14,
        )

    return convert


# With gradients the layer is an op of two outputs, without one its twin.
@pytest.mark.parametrize(
    ("way", "grad", "approximate"),
    [
        ("export", True, "tanh"),
        ("export", False, "quick"),
        ("trace", True, "none"),
        ("trace", False, "tanh"),
    ],
)
def test_programs_made_by_hand_convert(
    ct: Any, traced: Any, way: str, grad: bool, approximate: str
) -> None:
    layer, x = fusedops.nn.GELULinear(16, 32, approximate=approximate).eval(), torch.randn(3, 16)
    with torch.set_grad_enabled(grad):
        if way == "trace":
            model = traced(layer, x)
        else:
            program = torch.export.export(layer, (x,)).run_decompositions({})
            model = ct.convert(program, minimum_deployment_target=ct.target.macOS14)
    found = [op for op in operations(model) if op.op_type != "cast"]
    assert [op.op_type for op in found] == ["linear", "gelu"]
    assert found[1].mode.val == MODES[approximate]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_a_traced_activation_converts(traced: Any, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        model = traced(Layer("silu"), torch.randn(3, 16))
    assert [n for n in names(model) if n != "cast"] == ["linear", "silu"]


@each_approximate
def test_gelu_alone(ct: Any, approximate: str) -> None:
    class Gelu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fusedops.gelu(x, approximate=approximate)

    (gelu,) = operations(coreml.convert(Gelu(), torch.randn(3, 4)))
    assert gelu.mode.val == MODES[approximate]


# --- rope -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"offset": 3},
        {"interleaved": True},
        {"conjugate": True, "layout": "bshd"},
        {"position_ids": torch.tensor([2, 0, 1, 4, 3])},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_rope_is_taken_apart(ct: Any, options: dict[str, Any]) -> None:
    cos, sin = torch.randn(9, 4), torch.randn(9, 4)
    x = torch.randn(1, 5, 5, 10)  # partial: 8 of 10
    tables = {"cos": cos, "sin": sin, "position_ids": options.pop("position_ids", None)}
    fixed = coreml._Fixed(fusedops.rope, tables, options)
    program = coreml._exported(fixed, (torch.zeros(x.shape),))
    assert "fusedops" not in str(program.graph)
    with torch.no_grad():
        assert torch.equal(program.module()(x), fixed(x))
    program = coreml.rope(x.shape, cos, sin, tables["position_ids"], **options).model
    assert not {*names(program)} & {"gather", "linear"}, "tables are constants"
    (output,) = program.get_spec().description.output
    assert [*output.type.multiArrayType.shape] == [*x.shape]


def test_rope_qk_of_a_model(ct: Any) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            return fusedops.rope_qk(q, k, cos, sin)

    args = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(3, 4), torch.randn(3, 4)
    program = coreml._exported(Attention(), args)
    with torch.no_grad():
        for got, expected in zip(program.module()(*args), fusedops.rope_qk(*args), strict=True):
            assert torch.equal(got, expected)
    outputs = coreml.convert(Attention(), *args).get_spec().description.output
    shapes = [[*one.type.multiArrayType.shape] for one in outputs]
    assert shapes == [[1, 4, 3, 8], [1, 2, 3, 8]]


# --- what is refused ------------------------------------------------------------------------------


def packed() -> nn.Module:
    weight = fusedops.pack_linear(torch.randn(8, 16))

    class Packed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fusedops.gelu_linear(x, weight)

    return Packed()


def huge() -> nn.Module:
    layer = fusedops.nn.GELULinear(16, 8)
    nn.init.constant_(layer.weight, 1e5)
    return layer


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (packed, r"a packed weight must be converted unpacked .* but got .*gelu_linear_packed"),
        (
            lambda: fusedops.nn.GELULinear(16, 8, weight_dtype=torch.int8),
            r"a quantized layer must be converted from its floating-point weight .* but got",
        ),
        (huge, r"weight must lie in float16's range but got 100000$"),
    ],
    ids=["packed", "quantized", "range"],
)
def test_layers_without_a_program(ct: Any, model: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"\[coreml\] {message}"):
        coreml.convert(model(), torch.randn(3, 16))


@pytest.mark.parametrize("wrong", [99, -1])
def test_a_position_outside_the_table(ct: Any, wrong: int) -> None:
    ids = torch.tensor([0, wrong, 1])
    with pytest.raises(RuntimeError, match=r"^\[rope\] position_ids \+ offset must be in \[0, 8\)"):
        coreml.rope((1, 2, 3, 8), torch.randn(8, 4), torch.randn(8, 4), ids)


class Masked(nn.Module):
    """A layer behind a mask with infinities, which float16 has."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.layer = fusedops.nn.GELULinear(16, 16)
        nn.init.constant_(self.layer.weight, weight)
        self.register_buffer("mask", torch.full((3, 16), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layer(x) + self.mask, -1)


def test_infinities_of_a_mask_are_kept(ct: Any) -> None:
    program = coreml.convert(Masked(1.0), torch.randn(3, 16))
    (add,) = (op for op in operations(program) if op.op_type == "add")
    assert np.isneginf(add.y.val).any()
    with pytest.raises(
        RuntimeError, match=r"layer\.weight must lie in float16's range but got 1e\+06"
    ):
        coreml.convert(Masked(1e6), torch.randn(3, 16))


def test_rope_by_hand_says_what_to_do(ct: Any) -> None:
    coreml.register()
    tables = torch.randn(3, 4), torch.randn(3, 4)
    fixed = coreml._Fixed(fusedops.rope, dict(zip(("cos", "sin"), tables, strict=True)), {})
    program = torch.export.export(fixed, (torch.randn(1, 2, 3, 8),)).run_decompositions({})
    with pytest.raises(RuntimeError, match=r"rope must be converted by fusedops\.coreml\.convert"):
        ct.convert(program, minimum_deployment_target=ct.target.macOS14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_units": "GPU"}, r"compute_units must be one of .*CPU_AND_NE.* but got 'GPU'"),
        ({"path": "layer.mlmodel"}, r"path must end in \.mlpackage but got 'layer\.mlmodel'"),
    ],
    ids=["units", "path"],
)
def test_bad_options(ct: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^\[coreml\] {message}$"):
        coreml.convert(fusedops.nn.GELULinear(16, 8), torch.randn(3, 16), **options)


def test_a_model_without_an_example(ct: Any) -> None:
    with pytest.raises(RuntimeError, match="an example of every input must be given but got none"):
        coreml.convert(fusedops.nn.GELULinear(16, 8))


def test_a_weight_of_one_dimension() -> None:
    with pytest.raises(RuntimeError, match=r"weight must have 2 dimensions but got shape \[3\]"):
        coreml.gelu_linear(torch.randn(3), rows=2)


def test_without_coremltools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(RuntimeError, match=r"^\[coreml\] coremltools must be installed \(pip inst"):
        coreml.convert(fusedops.nn.GELULinear(16, 8), torch.randn(3, 16))


# Each schema has a translation, or an error that says what to do instead.
def test_every_op_is_translated_or_refused() -> None:
    translated = {
        *("gelu_linear", "gelu_linear_preact", "linear", "gelu"),
        *("linear_activation", "linear_activation_preact"),
    }
    refused = {name for names in coreml._REFUSED.values() for name in names}
    schemas = {schema for spec in SPECS.values() for schema in spec.schemas}
    # A name that ends in an underscore is its twin's to coremltools.
    assert translated | refused == {schema for schema in schemas if not schema.endswith("_")}
    assert not translated & refused


# --- running it -----------------------------------------------------------------------------------


def test_a_program_runs_on_macos_only(ct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = coreml.gelu_linear(torch.randn(8, 16), torch.randn(8), rows=3)
    monkeypatch.setattr(coreml.platform, "system", lambda: "Linux")
    with pytest.raises(RuntimeError, match="Core ML programs run on macOS only"):
        program(torch.randn(3, 16))


# What macOS would be given and gives: names, float16, and the way back to x's dtype.
def test_a_program_passes_float16_and_returns_the_dtype(
    ct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = coreml.gelu_linear(torch.randn(8, 16), torch.randn(8), rows=3, approximate="tanh")
    given = {}

    def predict(inputs: dict[str, Any]) -> dict[str, Any]:
        given.update(inputs)
        return {"gelu": np.ones((3, 8), np.float16)}

    monkeypatch.setattr(coreml, "missing", lambda: None)
    monkeypatch.setattr(program.model, "predict", predict)
    x = torch.randn(16, 3, dtype=torch.bfloat16).t()
    y = program(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.ones(3, 8, dtype=torch.bfloat16))
    ((name, array),) = given.items()
    assert name == "x"
    assert array.dtype == np.float16
    assert np.array_equal(array, x.half().numpy())


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_what_is_missing_has_a_name(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(coreml.platform, "system", lambda: system)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    reason = coreml.missing()
    assert reason is not None
    assert ("macOS" if system == "Linux" else "fusedops[coreml]") in reason
