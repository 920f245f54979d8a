"""Peer ``jax``: jax.jit on XLA's CPU backend, the formulas written in jax.numpy.

Arrays and tensors share memory by DLPack. float16 and bfloat16 are accumulated and activated in
float32 and rounded once. XLA's CPU backend takes every CPU and has no setting for less: with fewer
threads JAX does not take part. float64 would need ``jax_enable_x64`` for the whole process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import dlpack

from fusedops.bench.peers.peer import (
    Peer,
    Thunk,
    contiguous,
    copying,
    load,
    needs,
    refuse,
    usable_cpus,
)
from fusedops.bench.record import Regime
from fusedops.testing import Call, OpSpec

__all__ = ["PEERS"]


def _build(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    refuse(call.dtype == torch.float64, "float64 needs jax_enable_x64 for the whole process")
    fits = torch.get_num_threads() == usable_cpus()
    refuse(not fits, "XLA takes all CPUs and has no setting for its threads")
    inputs = contiguous(spec, call, regime)
    jax, numpy = load("jax"), load("jax.numpy")
    formula = _rope(numpy, call) if "rope" in spec.name else _layer(jax, numpy, spec, call)
    compiled = jax.jit(formula)
    others = [None if t is None else _array(jax, t) for t in call.args[len(inputs) :]]
    arrays = [_array(jax, x) for x in inputs]
    # XLA reads memory that it finds aligned where it is, and copies what is not.
    aliased = all(
        a.unsafe_buffer_pointer() == x.data_ptr() for a, x in zip(arrays, inputs, strict=True)
    )

    def run() -> Any:
        xs = arrays if aliased else [_array(jax, x) for x in inputs]
        results = jax.block_until_ready(compiled(xs, others))
        outputs = tuple(dlpack.from_dlpack(y) for y in results)
        return outputs if len(outputs) > 1 else outputs[0]

    return copying(spec, call, regime, run)


def _array(jax: Any, t: Tensor) -> Any:
    if not t.is_floating_point():
        t = t.int()  # JAX has no int64 unless told
    return jax.dlpack.from_dlpack(t.contiguous().resolve_neg())


Formula = Callable[[list[Any], list[Any]], tuple[Any, ...]]


def _layer(jax: Any, np: Any, spec: OpSpec, call: Call) -> Formula:
    approximate = call.kwargs.get("approximate")

    def formula(xs: list[Any], others: list[Any]) -> tuple[Any, ...]:
        (x,) = xs
        y = x.astype(np.float32)
        if "linear" in spec.name:
            weight, bias = others
            y = np.matmul(
                x, weight.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=np.float32
            )
            y = y if bias is None else y + bias.astype(np.float32)
        if approximate == "quick":
            y = y * jax.nn.sigmoid(1.702 * y)
        elif approximate is not None:
            y = jax.nn.gelu(y, approximate=approximate == "tanh")
        return (y.astype(x.dtype),)

    return formula


def _rope(np: Any, call: Call) -> Formula:
    options = call.kwargs
    heads_first, interleaved = options["layout"] == "bhsd", options["interleaved"]

    def formula(xs: list[Any], others: list[Any]) -> tuple[Any, ...]:
        cos, sin, position_ids = others
        tokens, batched = xs[0].shape[-2 if heads_first else -3], xs[0].ndim == 4

        def rows(table: Any) -> Any:
            if table.ndim == 2:
                first = options["offset"]
                if position_ids is None:
                    table = table[first : first + tokens]
                else:
                    table = table[position_ids + first]
            if table.ndim == 3 and not batched:
                table = table[0]
            return np.expand_dims(table.astype(np.float32), -3 if heads_first else -2)

        c, s = rows(cos), rows(sin)
        s = -s if options["conjugate"] else s
        return tuple(_rotated(np, x, c, s, interleaved) for x in xs)

    return formula


def _rotated(np: Any, x: Any, c: Any, s: Any, interleaved: bool) -> Any:
    half = c.shape[-1]
    head = x[..., : 2 * half].astype(np.float32)
    if interleaved:
        x1, x2 = head[..., 0::2], head[..., 1::2]
    else:
        x1, x2 = head[..., :half], head[..., half:]
    y1, y2 = x1 * c - x2 * s, x2 * c + x1 * s
    if interleaved:
        y = np.stack((y1, y2), axis=-1).reshape(head.shape)
    else:
        y = np.concatenate((y1, y2), axis=-1)
    return np.concatenate((y.astype(x.dtype), x[..., 2 * half :]), axis=-1)


PEERS = (
    Peer(
        "jax", "jax.jit on XLA's CPU backend, memory shared by DLPack", True, _build, needs("jax")
    ),
)
