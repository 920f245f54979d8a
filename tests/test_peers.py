"""The peers of a benchmark: each computes the op, on what its tensors hold at the time."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers import python
from torch import Tensor

import fusedops
from fusedops.bench import peers
from fusedops.bench.peers import PEERS, Unsupported, compiled, openvino
from fusedops.bench.peers.peer import load, needs
from fusedops.bench.record import STEPS, Regime
from fusedops.bench.report import OURS
from fusedops.testing import DTYPES, SPECS
from fusedops.verification.judge import judge

FRESH, GIVEN, IN_PLACE, TRAIN = (
    Regime(),
    Regime(output="given"),
    Regime(output="in_place"),
    Regime(work="train"),
)
OUTPUTS = {"fresh": FRESH, "given": GIVEN, "in_place": IN_PLACE}
ROPE = ("d34", "neighbours-partial", "bshd-batched-ids", "conjugate-neighbours", "no-batch-3d")
SAMPLES = {
    "rope": (*ROPE, "table-f32", "decode"),
    "rope_qk": ("gqa", "partial", "decode-batched-ids", "table-f32"),
    "gelu_linear": ("33", "1d", "no-bias", "decode-odd", "33-tanh"),
    "linear": ("3d", "no-bias", "decode"),
    "gelu": ("n33", "tanh-33"),
}


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_peer(name: str, op: str, sample: str, dtype: str, output: str) -> None:
    """Two runs on different numbers are right, and their outputs are where the regime says."""
    spec, regime = SPECS[op], OUTPUTS[output]
    call = spec.sample(sample).build(DTYPES[dtype])
    inputs = call.tensors[: 2 if op == "rope_qk" else 1]
    run = PEERS[name].build(spec, call, regime)
    results, kept = [], []
    for seed in (0, 1):
        numbers = [torch.full_like(x, seed).normal_() for x in inputs]
        for x, value in zip(inputs, numbers, strict=True):
            x.copy_(value)
        results.append(tensors(run()))
        kept.append([y.clone() for y in results[-1]])
        for x, value in zip(inputs, numbers, strict=True):
            x.copy_(value)  # in place it is the result
        verdict = judge(spec, call, kept[-1])
        assert verdict.fault is None
    addresses = [[y.data_ptr() for y in result] for result in results]
    if output == "fresh":
        assert set(addresses[0]).isdisjoint(addresses[1])
        assert all(torch.equal(y, k) for y, k in zip(results[0], kept[0], strict=True))
    else:
        assert addresses[0] == addresses[1]
        assert (addresses[0] == [x.data_ptr() for x in inputs]) == (output == "in_place")


def grid(
    names: Iterable[str], ops: Iterable[str], outputs: Iterable[str], dtypes: Iterable[str]
) -> list[Any]:
    """All samples in float32, the first in other dtypes, which differ in the arithmetic alone."""
    return [
        pytest.param(name, op, sample, dtype, output, id=f"{name}-{op}-{sample}-{dtype}-{output}")
        for name in names
        for op in ops
        for dtype in dtypes
        for sample in SAMPLES[op][: None if dtype == "f32" else 1]
        for output in outputs
    ]


ROPES, LINEARS, HALF = ("rope", "rope_qk"), ("linear", "gelu_linear"), ("f32", "bf16", "f16")
FAST = (
    *grid(["fusedops"], ["rope"], OUTPUTS, DTYPES),
    *grid(["fusedops"], ["rope_qk"], ["fresh", "in_place"], DTYPES),
    *grid(["fusedops"], ["gelu_linear"], ["fresh", "given"], DTYPES),
    *grid(["fusedops"], ["linear", "gelu"], ["fresh"], DTYPES),
    *grid(["packed"], ["gelu_linear"], ["fresh", "given"], DTYPES),
    *grid(["packed"], ["linear"], ["fresh"], DTYPES),
    *grid(["plan"], ["gelu_linear"], ["fresh", "given"], DTYPES),
    *grid(["plan"], ["rope"], OUTPUTS, DTYPES),
    *grid(["eager"], [*ROPES, "gelu"], OUTPUTS, DTYPES),
    *grid(["eager"], LINEARS, ["fresh", "given"], DTYPES),
    *grid(["numpy"], ROPES, OUTPUTS, HALF),
    *grid(["numpy"], LINEARS, ["fresh", "given"], HALF),
    *grid(["onednn", "onednn-plain"], LINEARS, ["fresh", "given"], ["f32"]),
)


@pytest.mark.parametrize(("name", "op", "sample", "dtype", "output"), FAST)
def test_peer_is_right(name: str, op: str, sample: str, dtype: str, output: str) -> None:
    assert_peer(name, op, sample, dtype, output)


@pytest.mark.parametrize("view", ["transposed", "strided", "outer_swapped"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_eager_takes_any_strides(view: str, output: str) -> None:
    assert_peer("eager", "rope", f"x-{view}", "f32", output)
    assert_peer("eager", "rope", f"x-{view}-neighbours", "f32", output)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU"
)
@pytest.mark.parametrize(
    ("name", "op", "sample", "dtype", "output"),
    grid(["onednn"], LINEARS, ["fresh", "given"], ["bf16"]),
)
def test_onednn_in_bfloat16(name: str, op: str, sample: str, dtype: str, output: str) -> None:
    assert_peer(name, op, sample, dtype, output)


OPTIONAL = (
    *grid(["onnxruntime", "jax"], ROPES, OUTPUTS, HALF),
    *grid(["onnxruntime", "jax", "openvino"], LINEARS, ["fresh", "given"], HALF),
    *grid(["onnxruntime", "jax", "openvino"], ["gelu"], ["fresh"], HALF),
    *(case for case in grid(["openvino"], ROPES, OUTPUTS, HALF) if "-ids-" not in case.id),
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "op", "sample", "dtype", "output"), OPTIONAL)
def test_optional_peer_is_right(name: str, op: str, sample: str, dtype: str, output: str) -> None:
    absent = PEERS[name].missing()
    if absent is not None:
        pytest.skip(absent)
    assert_peer(name, op, sample, dtype, output)


# A compilation takes seconds: one sample of each way through a peer.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("name", "op", "sample", "output"),
    [
        ("compile", "rope", "neighbours-partial", "fresh"),
        ("compile", "rope_qk", "gqa", "given"),
        ("compile", "rope_qk", "gqa", "in_place"),
        ("compile", "gelu_linear", "33", "given"),
        ("compile-freezing", "gelu_linear", "33-tanh", "fresh"),
        ("compile-freezing", "linear", "no-bias", "given"),
        ("compile-autotune", "rope", "d34", "fresh"),
        ("compile-autotune", "gelu_linear", "33", "fresh"),
    ],
)
def test_compiled_peer_is_right(name: str, op: str, sample: str, dtype: str, output: str) -> None:
    assert_peer(name, op, sample, dtype, output)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compile", "compile-freezing"])
@torch._dynamo.config.patch(accumulated_recompile_limit=2)
def test_every_shape_is_compiled(name: str) -> None:
    """Of a sweep too, whose shapes are more than torch allows all functions of a process."""
    stats = torch._dynamo.utils.counters["stats"]
    for sample in ("15", "16", "17", "31", "65", "decode", "rows-4", "rows-9", "tall", "n1"):
        before = stats["unique_graphs"]
        call = SPECS["gelu_linear"].sample(sample).build(torch.float32)
        run = PEERS[name].build(SPECS["gelu_linear"], call, FRESH)
        run()
        assert stats["unique_graphs"] == before + 1
        run()
        assert stats["unique_graphs"] == before + 1


@pytest.mark.slow
def test_freezing_packs_the_weights() -> None:
    counters = torch._dynamo.utils.counters["inductor"]
    call = SPECS["gelu_linear"].sample("65").build(torch.float32)
    for name, packed in (("compile", 0), ("compile-freezing", 1)):
        before = counters["mkldnn_linear_weight_pack_matcher_count"]
        PEERS[name].build(SPECS["gelu_linear"], call, FRESH)()
        assert counters["mkldnn_linear_weight_pack_matcher_count"] == before + packed


@pytest.mark.parametrize("name", ["fusedops", "eager"])
@pytest.mark.parametrize("op", ["rope", "gelu_linear"])
def test_training_gives_a_gradient(name: str, op: str) -> None:
    call = SPECS[op].samples[3].build(torch.float32).map(lambda t: t.clone().requires_grad_())
    y = PEERS[name].build(SPECS[op], call, TRAIN)()
    assert y.requires_grad


FORWARD_ONLY = "forward only"
COPY = "shares the memory of contiguous tensors only"
REFUSALS = [
    ("fusedops", "rope_qk", "gqa", "f32", GIVEN, "fusedops.rope_qk has no out="),
    ("fusedops", "gelu", "n33", "f32", IN_PLACE, "fusedops has no gelu_"),
    ("eager", "linear", "16", "f32", IN_PLACE, "the result of a linear layer is not its input's"),
    ("eager", "rope", "d34", "f32", Regime(work="train", output="given"), "training writes no"),
    ("compile-freezing", "rope", "d34", "f32", FRESH, "rope has no weights to freeze"),
    ("compile-freezing", "linear", "33", "f32", TRAIN, "frozen weights take no gradient"),
    ("onednn", "rope", "d34", "f32", FRESH, "oneDNN has no rope"),
    ("onednn", "gelu_linear", "33-quick", "f32", FRESH, "oneDNN has no quick GELU"),
    ("onednn", "linear", "33", "f64", FRESH, "oneDNN multiplies no float64 on this CPU"),
    ("onednn", "linear", "33", "f32", TRAIN, FORWARD_ONLY),
    ("onednn", "linear", "x-strided", "f32", FRESH, COPY),
    ("onednn", "linear", "empty-k", "f32", FRESH, "empty tensors"),
    ("numpy", "gelu", "n33", "f32", FRESH, "the ladder has no NumPy rung of gelu"),
    ("numpy", "rope", "d34", "f32", TRAIN, FORWARD_ONLY),
    ("onnxruntime", "rope", "d34", "f64", FRESH, "no kernels for torch.float64"),
    ("onnxruntime", "rope", "d34", "f32", TRAIN, FORWARD_ONLY),
    ("openvino", "rope", "x-sliced", "f32", FRESH, COPY),
    ("openvino", "rope", "d34", "f64", FRESH, "no kernels for torch.float64"),
    ("jax", "rope", "d34", "f64", FRESH, "float64 needs jax_enable_x64"),
    ("jax", "linear", "33", "f32", TRAIN, FORWARD_ONLY),
    ("fusedops", "gelu", "n33", "f32", Regime(work="loop"), "a decode loop needs a shape with"),
    ("eager", "rope", "d34", "f32", Regime("loop", "in_place"), "a decode loop allocates"),
]


@pytest.mark.parametrize(("name", "op", "sample", "dtype", "regime", "reason"), REFUSALS)
def test_what_a_peer_cannot_do(
    name: str, op: str, sample: str, dtype: str, regime: Regime, reason: str
) -> None:
    call = SPECS[op].sample(sample).build(DTYPES[dtype])
    with pytest.raises(Unsupported, match=f"^{reason}"):
        PEERS[name].build(SPECS[op], call, regime)


@pytest.mark.parametrize(("name", "op"), [("numpy", "gelu_linear"), ("jax", "rope")])
def test_a_peer_that_takes_all_cpus_refuses_fewer_threads(
    name: str, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = torch.get_num_threads() + 1
    monkeypatch.setattr(f"fusedops.bench.peers.{name}.usable_cpus", lambda: more)
    call = SPECS[op].samples[3].build(torch.float32)
    with pytest.raises(Unsupported, match="takes all CPUs"):
        PEERS[name].build(SPECS[op], call, FRESH)


def test_openvino_refuses_a_lower_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    program = types.SimpleNamespace(get_property=lambda name: "bf16")
    core = types.SimpleNamespace(compile_model=lambda *args: program)
    monkeypatch.setattr(openvino, "_core", lambda: core)
    assert openvino.compiled(None, "bf16") is program
    with pytest.raises(Unsupported, match="computes in bf16 where f32 was asked for"):
        openvino.compiled(None, "f32")


def test_openvino_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    framework = types.ModuleType("openvino")
    monkeypatch.setitem(sys.modules, "openvino", framework)
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    assert openvino.module() is framework
    with pytest.raises(ImportError, match="openvino_telemetry"):
        importlib.import_module("openvino_telemetry")
    monkeypatch.delitem(sys.modules, "openvino_telemetry")


def test_a_given_tensor_is_written_and_nothing_else() -> None:
    spec = SPECS["gelu_linear"]
    call = spec.sample("33").build(torch.float32)
    run = PEERS["eager"].build(spec, call, GIVEN)
    y = run()
    assert not y.isnan().any()
    y.fill_(torch.nan)
    assert run() is y
    assert not y.isnan().any()


def test_peers_are_in_the_order_of_tables() -> None:
    assert list(PEERS) == [
        *("fusedops", "packed", "plan"),
        *("eager", "compile", "compile-freezing", "compile-autotune"),
        *("onednn", "onednn-plain", "onnxruntime", "openvino", "jax", "numpy"),
    ]
    assert tuple(PEERS)[: len(OURS)] == OURS
    assert [peer.name for peer in peers.get(["numpy", "eager"])] == ["eager", "numpy"]
    assert all(peer.name == name and peer.description for name, peer in PEERS.items())


def test_an_unknown_peer_lists_the_known_ones() -> None:
    with pytest.raises(RuntimeError, match=r"peers must be among fusedops, .* but got onnx, tvm$"):
        peers.get(["tvm", "eager", "onnx"])


LOOP = Regime(work="loop")


@pytest.mark.slow  # of torch.compile
@pytest.mark.parametrize("name", ["fusedops", "eager", "compile"])
def test_a_decode_loop_ends_at_the_offset_of_the_call(name: str) -> None:
    torch._dynamo.reset()
    spec = SPECS["rope_qk"]
    call = spec.sample("llama-3-8b/decode").build(torch.float32)
    with torch.no_grad():
        run = PEERS[name].build(spec, call, LOOP)
        for _ in range(2):
            assert judge(spec, call, run()).fault is None


def test_a_loop_that_compiles_again_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = torch._dynamo.utils.counters["stats"]

    def fake(function: Any, *_: Any, **__: Any) -> Any:
        def step(*args: Any, **options: Any) -> Any:
            stats["unique_graphs"] += next(graphs)
            return args[0]

        return step

    monkeypatch.setattr(compiled, "_compile", fake)
    call = SPECS["rope_qk"].sample("llama-3-8b/decode").build(torch.float32)
    graphs = iter([1, 1, *[0] * (STEPS - 2), *[0] * STEPS, 1, *[0] * (STEPS - 1)])
    run = compiled.compiled_loop(call, LOOP, fusedops.rope_qk)
    run()
    run()
    with pytest.raises(RuntimeError, match="compiled 1 times in a loop where 0 were allowed"):
        run()


def test_what_is_missing_is_said() -> None:
    assert needs("torch")() is None
    assert needs("torch", "no_such_framework")() == "no_such_framework not installed: make peers"
    with pytest.raises(Unsupported, match="no_such_framework does not load: No module named"):
        load("no_such_framework")


def test_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert PEERS["compile"].missing() == "torch.compile needs a C++ compiler and found none"


@pytest.mark.slow
def test_importing_the_peers_imports_no_framework() -> None:
    result = python("""
        import sys
        import fusedops.bench.peers
        names = {"jax", "jaxlib", "onnx", "onnxruntime", "openvino", "torch._inductor.compile_fx"}
        print(sorted(names & set(sys.modules)))
    """)
    assert result.stdout == "[]\n", result.stderr
