"""Peer ``openvino``: a graph compiled by OpenVINO's CPU plugin.

Left alone, the plugin computes float32 in bfloat16 where the CPU has it, and what it calls float16
is bfloat16 as well. The precision is therefore always asked for and read back: float32 for float32
and float16 inputs and for rope, bfloat16 for bfloat16 layers. Weights and tables are constants.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, cast

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

_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_GELU = {"none": "ERF", "tanh": "TANH"}


def _build(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    refuse(call.dtype not in _TYPES, f"no kernels for {call.dtype}")
    inputs = contiguous(spec, call, regime)
    ov = module()
    ops = load("openvino.opset15")
    element = getattr(ov.Type, _TYPES[call.dtype])
    parameters = [ops.parameter([*x.shape], element) for x in inputs]
    constants: list[Tensor] = []  # a graph shares their memory and does not keep it

    def constant(t: Tensor) -> Any:
        constants.append(t.contiguous().resolve_neg())
        return ops.constant(_shared(ov, constants[-1]))

    if "rope" in spec.name:
        results = _rope(ops, constant, parameters, call)
    else:
        results = [_layer(ops, constant, parameters[0], spec, call)]
    lower = call.dtype == torch.bfloat16 and "linear" in spec.name
    program = compiled(ov.Model(results, parameters), ov.Type.bf16 if lower else ov.Type.f32)
    request = program.create_infer_request()
    for i, x in enumerate(inputs):
        request.set_input_tensor(i, _shared(ov, x))

    def bind(outputs: tuple[Tensor, ...]) -> None:
        for i, y in enumerate(outputs):
            request.set_output_tensor(i, _shared(ov, y))

    return Program(bind, request.infer, (*inputs, *constants)).thunk(spec, call, regime)


def module() -> Any:
    """OpenVINO, imported without its telemetry."""
    # Its import would send usage data from a forked process; without the sender it has a stub.
    cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)
    return load("openvino")


@functools.cache
def _core() -> Any:
    return module().Core()


def compiled(model: Any, precision: Any) -> Any:
    """The model compiled for the CPU; Unsupported if it would not compute in that precision."""
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    program = _core().compile_model(model, "CPU", settings)
    used = program.get_property("INFERENCE_PRECISION_HINT")
    refuse(used != precision, f"computes in {used} where {precision} was asked for")
    return program


def _shared(ov: Any, t: Tensor) -> Any:
    """An OpenVINO tensor on the memory of t."""
    if t.dtype == torch.bfloat16:
        return ov.Tensor(t.view(torch.int16).numpy(), ov.Shape([*t.shape]), ov.Type.bf16)
    return ov.Tensor(t.numpy(), shared_memory=True)


def _layer(ops: Any, constant: Callable[[Tensor], Any], x: Any, spec: OpSpec, call: Call) -> Any:
    """gelu, or linear with or without gelu behind it."""
    approximate = call.kwargs.get("approximate")
    refuse(approximate == "quick", "OpenVINO has no quick GELU")
    y = x
    if "linear" in spec.name:
        y = ops.matmul(x, constant(call.tensors[1]), False, True)
        if call.args[2] is not None:
            y = ops.add(y, constant(call.args[2]))
    return y if approximate is None else ops.gelu(y, _GELU[approximate])


def _rope(ops: Any, constant: Callable[[Tensor], Any], xs: list[Any], call: Call) -> list[Any]:
    """``x * cos + rotate_half(x) * sin`` in float32, which the plugin fuses into one node."""
    cos, sin, position_ids = call.args[len(xs) :]
    assert cos is not None
    assert sin is not None
    refuse(position_ids is not None, "positions would be constants of the graph")
    refuse(cos.shape[-1] == 0, "nothing to rotate")
    interleaved, heads_first = call.kwargs["interleaved"], call.kwargs["layout"] == "bhsd"
    rank = len(xs[0].shape)
    if cos.dim() == 2:
        tokens = xs[0].shape[rank - 2 if heads_first else rank - 3]
        cos, sin = (t.narrow(0, call.kwargs["offset"], tokens) for t in (cos, sin))
    elif rank == 3:
        cos, sin = cos[0], sin[0]
    if call.kwargs["conjugate"]:
        sin = -sin
    tables = []
    for t in (cos.float(), sin.float()):
        wide = t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)
        tables.append(constant(wide.unsqueeze(-3 if heads_first else -2)))
    return [_rotated(ops, x, tables, 2 * cos.shape[-1], interleaved) for x in xs]


def _rotated(ops: Any, x: Any, tables: list[Any], rotary: int, interleaved: bool) -> Any:
    shape, element = [*x.shape], x.get_element_type()
    last, rest = len(shape) - 1, shape[-1] - rotary
    wide = ops.convert(x, "f32")
    head, tail = ops.variadic_split(wide, last, [rotary, rest]).outputs() if rest else (wide, None)
    if interleaved:
        pairs = ops.reshape(head, [*shape[:-1], rotary // 2, 2], False)
        first, second = ops.split(pairs, last + 1, 2).outputs()
        turned = ops.concat([ops.negative(second), first], last + 1)
        turned = ops.reshape(turned, [*shape[:-1], rotary], False)
    else:
        first, second = ops.split(head, last, 2).outputs()
        turned = ops.concat([ops.negative(second), first], last)
    y = ops.add(ops.multiply(head, tables[0]), ops.multiply(turned, tables[1]))
    if tail is not None:
        y = ops.concat([y, tail], last)
    return ops.convert(y, element)


PEERS = (
    Peer(
        "openvino",
        "OpenVINO, CPU plugin, in the precision of the inputs or above",
        True,
        _build,
        needs("openvino"),
    ),
)
