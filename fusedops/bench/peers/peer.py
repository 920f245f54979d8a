"""What a peer is, and what the families of peers share."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fusedops.bench.record import STEPS, Regime
from fusedops.testing import Call, OpSpec

__all__ = [
    "Peer",
    "Program",
    "Thunk",
    "Unsupported",
    "always",
    "contiguous",
    "copying",
    "decode_loop",
    "destinations",
    "load",
    "main_inputs",
    "needs",
    "output_shapes",
    "refuse",
    "run_and_copy",
    "usable_cpus",
    "warm_outputs",
]

# Runs the op once on what the tensors of its call hold now; returns the op's tensor or tuple.
Thunk: TypeAlias = Callable[[], Any]


class Unsupported(Exception):
    """The peer cannot do this op, dtype, option or regime; its text says why in one short line."""


@dataclass(frozen=True)
class Peer:
    """One way to compute the ops, to be verified and timed against the others.

    build(spec, call, regime) prepares everything that a user would prepare once, and returns what
    is timed; it raises Unsupported. The main inputs (x; q and k) are read anew by every run. All
    other tensors of the call, weights and tables, are constants that build may pack. Fresh outputs
    are new memory in every run. Given outputs are warm tensors, NaN until the first run. In place,
    the main inputs are overwritten and returned. For train the outputs carry a gradient.

    stepwise: it may round to the call's dtype between eager's steps. missing(): why it cannot run
    on this machine, in one line, or None. differentiable: it can do train. loops: it can do loop;
    what is returned then is the last step's.
    """

    name: str
    description: str
    stepwise: bool
    build: Callable[[OpSpec, Call, Regime], Thunk]
    missing: Callable[[], str | None]
    differentiable: bool = False
    loops: bool = False


def always() -> str | None:
    """Nothing is missing."""
    return None


def needs(*modules: str) -> Callable[[], str | None]:
    """What ``missing`` is for a peer that imports these modules."""

    def missing() -> str | None:
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed: make peers" if absent else None

    return missing


def load(module: str) -> Any:
    """The module, imported now; Unsupported with its own words if it does not load."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unsupported(f"{module} does not load: {str(error).splitlines()[0]}") from error


def refuse(condition: object, reason: str) -> None:
    """Unsupported with that reason if the condition holds."""
    if condition:
        raise Unsupported(reason)


def main_inputs(spec: OpSpec, call: Call) -> tuple[Tensor, ...]:
    """The tensors that change between runs: q and k of rope_qk, else the first."""
    return call.tensors[: 2 if spec.name == "rope_qk" else 1]


def output_shapes(spec: OpSpec, call: Call) -> tuple[torch.Size, ...]:
    """Of the outputs: those of the main inputs, or [..., N] of a linear layer."""
    shapes = tuple(x.shape for x in main_inputs(spec, call))
    if "linear" not in spec.name:
        return shapes
    return (torch.Size((*shapes[0][:-1], call.tensors[1].shape[0])),)


def warm_outputs(spec: OpSpec, call: Call) -> tuple[Tensor, ...]:
    """One contiguous tensor per output, its pages touched, all NaN."""
    return tuple(torch.full(s, torch.nan, dtype=call.dtype) for s in output_shapes(spec, call))


def copying(spec: OpSpec, call: Call, regime: Regime, compute: Thunk) -> Thunk:
    """Compute, and where the regime names the output's memory, a copy of its result to there."""
    if regime.output == "fresh":
        return compute
    return run_and_copy(compute, destinations(spec, call, regime))


def destinations(spec: OpSpec, call: Call, regime: Regime) -> tuple[Tensor, ...]:
    """The tensors that a regime other than fresh wants the outputs in."""
    refuse(regime.work == "train", "training writes no given tensor")
    if regime.output == "given":
        return warm_outputs(spec, call)
    refuse("linear" in spec.name, "the result of a linear layer is not its input's shape")
    return main_inputs(spec, call)


def decode_loop(call: Call, regime: Regime, step: Callable[..., Any]) -> Thunk:
    """STEPS steps at one offset after the other, up to that of the call."""
    refuse(regime.output != "fresh", "a decode loop allocates its outputs")
    last = call.kwargs.get("offset", 0)
    refuse(last < STEPS, "a decode loop needs a shape with an offset, such as llama-3-8b/decode")
    options = {name: value for name, value in call.kwargs.items() if name != "offset"}
    offsets = range(last - STEPS + 1, last + 1)

    def run() -> Any:
        for offset in offsets:
            result = step(*call.args, offset=offset, **options)
        return result

    return run


def run_and_copy(compute: Thunk, targets: Sequence[Tensor]) -> Thunk:
    """Compute, then its outputs copied into the targets, which are returned."""
    if len(targets) == 1:
        return lambda: targets[0].copy_(compute())

    def run() -> tuple[Tensor, ...]:
        return tuple(t.copy_(y) for t, y in zip(targets, compute(), strict=True))

    return run


@dataclass(frozen=True)
class Program:
    """What a framework compiled that reads and writes tensors where they lie.

    run() writes the tensors that bind named last. alive: what it reads, kept for as long as it.
    """

    bind: Callable[[tuple[Tensor, ...]], None]
    run: Callable[[], None]
    alive: tuple[Tensor, ...]

    def thunk(self, spec: OpSpec, call: Call, regime: Regime) -> Thunk:
        """The program as a regime wants it; in place it cannot write where it reads."""
        shapes = output_shapes(spec, call)

        def fresh() -> Any:
            outputs = tuple(torch.empty(shape, dtype=call.dtype) for shape in shapes)
            self.bind(outputs)
            self.run()
            return outputs if len(outputs) > 1 else outputs[0]

        if regime.output == "fresh":
            return fresh
        targets = destinations(spec, call, regime)
        if regime.output == "in_place":
            return run_and_copy(fresh, targets)
        self.bind(targets)

        def given() -> Any:
            self.run()
            return targets if len(targets) > 1 else targets[0]

        return given


def contiguous(spec: OpSpec, call: Call, regime: Regime) -> tuple[Tensor, ...]:
    """The main inputs, for a framework that shares their memory and knows no strides."""
    refuse(regime.work == "train", "forward only")
    refuse(spec.home == "quantized", "takes no quantized weight as it is stored")
    inputs = main_inputs(spec, call)
    plain = all(x.is_contiguous() and not x.is_neg() for x in inputs)
    refuse(not plain, "shares the memory of contiguous tensors only")
    refuse(any(x.numel() == 0 for x in call.tensors), "empty tensors are not worth a graph")
    return inputs


def usable_cpus() -> int:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
