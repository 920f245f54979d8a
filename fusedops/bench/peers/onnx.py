"""Peer ``onnxruntime``: a graph of ONNX operators on ONNX Runtime's CPU provider.

linear is Gemm, gelu is Gelu (opset 20), rope is RotaryEmbedding (opset 23). Weights and tables are
initializers, which the session packs. Inputs and outputs are bound to the tensors' own memory.
bfloat16 has no kernels there and float16's matmul is slower than float32's: Cast nodes widen both,
and weights are widened when the graph is built, so that only the result is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedops.bench.peers.peer import (
    Peer,
    Program,
    Thunk,
    contiguous,
    load,
    needs,
    refuse,
)
from fusedops.bench.record import Regime
from fusedops.testing import Call, OpSpec

__all__ = ["PEERS"]

_OPSET = 23
_IR_VERSION = 11  # of the release that brought opset 23
_DTYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


@dataclass(frozen=True)
class _Graph:
    """What a model is made of: nodes that lead from x0, x1, ... to y0, y1, ..., and constants."""

    nodes: list[Any]
    constants: dict[str, Tensor]
    input_shapes: list[list[int]]
    output_shapes: list[list[int]]


def _build(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    refuse(call.dtype not in _DTYPES, f"no kernels for {call.dtype}")
    inputs = contiguous(spec, call, regime)
    onnx, runtime = load("onnx"), load("onnxruntime")
    graph = _rope(onnx, inputs, call) if "rope" in spec.name else _layer(onnx, spec, call)
    session = _session(onnx, runtime, graph, call.dtype)
    binding = session.io_binding()
    element = onnx.TensorProto.DataType.Value(_DTYPES[call.dtype])
    for i, (x, shape) in enumerate(zip(inputs, graph.input_shapes, strict=True)):
        binding.bind_input(f"x{i}", "cpu", 0, element, shape, x.data_ptr())

    def bind(outputs: tuple[Tensor, ...]) -> None:
        for i, (y, shape) in enumerate(zip(outputs, graph.output_shapes, strict=True)):
            binding.bind_output(f"y{i}", "cpu", 0, element, shape, y.data_ptr())

    def run() -> None:
        session.run_with_iobinding(binding)

    return Program(bind, run, inputs).thunk(spec, call, regime)


def _session(onnx: Any, runtime: Any, graph: _Graph, dtype: torch.dtype) -> Any:
    element = onnx.TensorProto.DataType.Value(_DTYPES[dtype])
    info = onnx.helper.make_tensor_value_info
    inputs = [info(f"x{i}", element, shape) for i, shape in enumerate(graph.input_shapes)]
    outputs = [info(f"y{i}", element, shape) for i, shape in enumerate(graph.output_shapes)]
    constants = [
        onnx.numpy_helper.from_array(t.contiguous().resolve_neg().numpy(), name)
        for name, t in graph.constants.items()
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "peer", inputs, outputs, constants),
        opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    # Idle threads that spin after a run would take a CPU from the next peer; within it they may.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _layer(onnx: Any, spec: OpSpec, call: Call) -> _Graph:
    """gelu, or linear with or without gelu behind it, on rows."""
    approximate = call.kwargs.get("approximate")
    refuse(approximate == "quick", "ONNX has no quick GELU")
    x, width = call.tensors[0], call.tensors[0].shape[-1] if call.tensors[0].dim() else 1
    constants: dict[str, Tensor] = {}
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    columns = width
    if "linear" in spec.name:
        constants = {"w": call.tensors[1].float()}
        columns = call.tensors[1].shape[0]
        if call.args[2] is not None:
            constants["b"] = call.args[2].float()
        steps.append(("Gemm", [*constants], {"transB": 1}))
    if approximate is not None:
        steps.append(("Gelu", [], {"approximate": approximate}))
    rows = x.numel() // width
    nodes = _chain(onnx, 0, call.dtype != torch.float32, call.dtype, steps)
    return _Graph(nodes, constants, [[rows, width]], [[rows, columns]])


def _rope(onnx: Any, inputs: tuple[Tensor, ...], call: Call) -> _Graph:
    """One RotaryEmbedding per input; "bshd" is its form with three dimensions."""
    cos, sin, position_ids = call.args[len(inputs) :]
    assert cos is not None
    assert sin is not None
    heads_first = call.kwargs["layout"] == "bhsd"
    shapes = [[1, *x.shape] if x.dim() == 3 else [*x.shape] for x in inputs]
    batch, tokens, dim = shapes[0][0], shapes[0][2 if heads_first else 1], shapes[0][3]
    rotary = 2 * cos.shape[-1]
    refuse(rotary == 0, "nothing to rotate")
    # Cast nodes where its kernel would not do: bfloat16, and tables of another dtype than x.
    widen = call.dtype == torch.bfloat16 or cos.dtype != call.dtype
    if call.kwargs["conjugate"]:
        sin = -sin
    constants = {"cos": cos, "sin": sin}
    if cos.dim() == 3:
        constants = {name: t.expand(batch, -1, -1) for name, t in constants.items()}
    else:
        ids = torch.arange(tokens) if position_ids is None else position_ids.long()
        constants["ids"] = (ids + call.kwargs["offset"]).expand(batch, tokens)
    if widen:
        constants.update(cos=constants["cos"].float(), sin=constants["sin"].float())
    graph_shapes, nodes = [], []
    for i, shape in enumerate(shapes):
        attributes: dict[str, Any] = {"interleaved": int(call.kwargs["interleaved"])}
        if not heads_first:
            attributes["num_heads"] = shape[2]
            shape = [batch, tokens, shape[2] * dim]
        if rotary < dim:
            attributes.update(rotary_embedding_dim=rotary)
        graph_shapes.append(shape)
        steps = [("RotaryEmbedding", [*constants], attributes)]
        nodes += _chain(onnx, i, widen, call.dtype, steps)
    return _Graph(nodes, constants, graph_shapes, graph_shapes)


def _chain(
    onnx: Any,
    index: int,
    widen: bool,
    dtype: torch.dtype,
    steps: list[tuple[str, list[str], dict[str, Any]]],
) -> list[Any]:
    """Nodes that take x<index> through the steps to y<index>, in float32 if widen."""
    if widen:
        steps = [
            ("Cast", [], {"to": onnx.TensorProto.FLOAT}),
            *steps,
            ("Cast", [], {"to": onnx.TensorProto.DataType.Value(_DTYPES[dtype])}),
        ]
    names = [f"x{index}", *(f"t{index}.{i}" for i in range(1, len(steps))), f"y{index}"]
    return [
        onnx.helper.make_node(op, [names[i], *others], [names[i + 1]], **attributes)
        for i, (op, others, attributes) in enumerate(steps)
    ]


PEERS = (
    Peer(
        "onnxruntime",
        "ONNX Runtime, CPU provider, bound memory; half precision through Cast nodes",
        True,
        _build,
        needs("onnx", "onnxruntime"),
    ),
)
