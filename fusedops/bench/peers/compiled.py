"""Peers ``compile``, ``compile-freezing`` and ``compile-autotune``: torch.compile of eager.

Freezing is inductor's own inference mode: weights are constants of a module, packed when it is
compiled, and no gradient is recorded. A compiled function that met more shapes than torch allows
would run eager and say nothing: fullgraph makes that an error, and each build compiles anew.
torch keeps what it froze, about twice the weights, until the process ends.
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor

from fusedops.bench.peers.peer import (
    Peer,
    Thunk,
    copying,
    decode_loop,
    destinations,
    refuse,
)
from fusedops.bench.record import Regime
from fusedops.testing import Call, OpSpec

__all__ = ["PEERS", "compiled_loop"]

LOOP_GRAPHS = 2  # of a decode loop: for the first offset, and for any
_AUTOTUNE = {"max_autotune": True, "coordinate_descent_tuning": True}  # mode="max-autotune" on CPU


def _missing() -> str | None:
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if any(name and shutil.which(name) for name in compilers):
        return None
    return "torch.compile needs a C++ compiler and found none"


def _compile(
    function: Callable[..., Any], options: Mapping[str, Any], dynamic: bool | None = False
) -> Callable[..., Any]:
    # A sweep compiles hundreds of shapes, each anew: torch counts them as one function's.
    torch._dynamo.config.accumulated_recompile_limit = 1 << 20
    known = inspect.signature(torch.compile).parameters
    # Both are new in torch 2.13: out of reach of the limit, and guards of this function alone.
    extra: dict[str, Any] = {"recompile_limit": 1000, "isolate_recompiles": True}
    extra = {name: value for name, value in extra.items() if name in known}
    # The number of threads is written into the code, and inductor's cache on disk is told of it.
    options = {"cpp.threads": torch.get_num_threads(), **options}
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options=options, **extra)


def _quiet(compiled: Callable[[], Any], **config: Any) -> Thunk:
    """The thunk; its first run, which compiles, under inductor's config and without its notices."""
    ready = False

    def run() -> Any:
        nonlocal ready
        if ready:
            return compiled()
        from torch._inductor import config as inductor

        # Autotuning writes its choices to stderr.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), inductor.patch(config):
            # torch's own use of what it deprecates
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is", DeprecationWarning)
            warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
            result = compiled()
        ready = True
        return result

    return run


def _whole_op(spec: OpSpec, call: Call, regime: Regime, options: Mapping[str, Any]) -> Thunk:
    """The formula compiled with every tensor as an argument."""
    formula = functools.partial(spec.reference, **call.kwargs)
    if regime.output == "fresh":
        compiled = _compile(lambda *args: formula(*args), options)
        return _quiet(functools.partial(compiled, *call.args))
    targets = destinations(spec, call, regime)

    def write(targets: tuple[Tensor, ...], *args: Tensor | None) -> None:
        result = formula(*args)
        outputs = (result,) if isinstance(result, Tensor) else result
        for target, output in zip(targets, outputs, strict=True):
            target.copy_(output)

    compiled = _compile(write, options)

    def run() -> Tensor | tuple[Tensor, ...]:
        compiled(targets, *call.args)
        return targets if len(targets) > 1 else targets[0]

    return _quiet(run)


def compiled_loop(call: Call, regime: Regime, function: Callable[..., Any]) -> Thunk:
    """The loop by the compiled function: two graphs, for one offset and for any, and no more."""
    loop = _quiet(decode_loop(call, regime, _compile(function, {}, dynamic=None)))
    stats = torch._dynamo.utils.counters["stats"]
    allowed = LOOP_GRAPHS

    def run() -> Any:
        nonlocal allowed
        before = stats["unique_graphs"]
        result = loop()
        graphs = stats["unique_graphs"] - before
        if graphs > allowed:
            raise RuntimeError(f"it compiled {graphs} times in a loop where {allowed} were allowed")
        allowed = 0
        return result

    return run


class _Layer(torch.nn.Module):
    """The op with its weights as constants."""

    def __init__(self, spec: OpSpec, call: Call) -> None:
        super().__init__()
        _, *weights = call.args
        self.count = len(weights)
        for i, t in enumerate(weights):
            self.register_buffer(f"weight{i}", t)
        self.formula = functools.partial(spec.reference, **call.kwargs)

    def forward(self, x: Tensor) -> Any:
        return self.formula(x, *(getattr(self, f"weight{i}") for i in range(self.count)))


def _frozen(spec: OpSpec, call: Call, regime: Regime, options: Mapping[str, Any]) -> Thunk:
    refuse("linear" not in spec.name, f"{spec.name} has no weights to freeze")
    refuse(regime.work == "train", "frozen weights take no gradient")
    layer = _compile(_Layer(spec, call).eval(), {"freezing": True, **options})
    x = call.tensors[0]

    def run() -> Any:
        with torch.no_grad():
            return layer(x)

    # Dynamo reads the setting, which must be in force when it traces: an option comes too late.
    return copying(spec, call, regime, _quiet(run, freezing=True))


def _default(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    if regime.work == "loop":
        return compiled_loop(call, regime, spec.reference)
    return _whole_op(spec, call, regime, {})


def _freezing(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    return _frozen(spec, call, regime, {})


def _autotune(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    if "linear" in spec.name and regime.work == "forward":
        return _frozen(spec, call, regime, _AUTOTUNE)
    return _whole_op(spec, call, regime, _AUTOTUNE)


PEERS = (
    Peer(
        "compile",
        "torch.compile of eager",
        True,
        _default,
        _missing,
        differentiable=True,
        loops=True,
    ),
    Peer(
        "compile-freezing",
        "torch.compile, weights frozen and packed; a given tensor is a copy",
        True,
        _freezing,
        _missing,
    ),
    Peer(
        "compile-autotune",
        "torch.compile max-autotune, weights frozen where nothing is trained",
        True,
        _autotune,
        _missing,
        differentiable=True,
    ),
)
