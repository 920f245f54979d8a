"""Peer ``eager``: the formulas of fusedops.reference, as PyTorch runs them.

Into a given tensor it takes the shortest way that PyTorch offers: products into views of it for
rope, ``addmm(out=)`` and ``gelu_`` for the linear family. Where that would change the arithmetic
(rope in half precision, which eager computes in float32; GELU in float64) it copies the result.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fusedops.bench.peers.peer import (
    Peer,
    Thunk,
    always,
    copying,
    decode_loop,
    destinations,
    main_inputs,
)
from fusedops.bench.record import Regime
from fusedops.testing import Call, OpSpec

__all__ = ["PEERS"]


def _build(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    if regime.work == "loop":
        return decode_loop(call, regime, spec.reference)
    formula = functools.partial(spec.reference, *call.args, **call.kwargs)
    if regime.output != "fresh":
        wide = call.dtype in (torch.float32, torch.float64)
        if spec.name in ("rope", "rope_qk") and wide and call.args[-1] is None:
            return _rope(spec, call, regime)
        if regime.output == "given" and _is_linear_and_gelu_(spec, call):
            return _linear(spec, call, regime)
    return copying(spec, call, regime, formula)


def _rope(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    """Products into views of the target: half the temporaries in place, none when given."""
    xs, targets = main_inputs(spec, call), destinations(spec, call, regime)
    cos, sin = call.tensors[len(xs) : len(xs) + 2]
    turn = _in_place if regime.output == "in_place" else _into
    layout, interleaved = call.kwargs["layout"], call.kwargs["interleaved"]
    tokens = xs[0].shape[-2 if layout == "bhsd" else -3]
    offset, conjugate = call.kwargs["offset"], call.kwargs["conjugate"]

    def rows(table: Tensor) -> Tensor:
        if table.dim() == 2:
            table = table.narrow(0, offset, tokens)
        elif xs[0].dim() == 3:
            table = table[0]
        return table.to(xs[0].dtype).unsqueeze(-3 if layout == "bhsd" else -2)

    def run() -> Tensor | tuple[Tensor, ...]:
        c, s = rows(cos), rows(sin)
        for x, y in zip(xs, targets, strict=True):
            turn(x, y, c, s, interleaved, -1 if conjugate else 1)
        return targets if len(targets) > 1 else targets[0]

    return run


def _pairs(t: Tensor, rotary: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    head = t[..., :rotary]
    if interleaved:
        return head[..., 0::2], head[..., 1::2]
    first, second = head.chunk(2, dim=-1)
    return first, second


def _into(x: Tensor, y: Tensor, c: Tensor, s: Tensor, interleaved: bool, sign: int) -> None:
    rotary = 2 * c.shape[-1]
    if rotary < x.shape[-1]:
        y[..., rotary:].copy_(x[..., rotary:])
    if rotary:
        (x1, x2), (y1, y2) = _pairs(x, rotary, interleaved), _pairs(y, rotary, interleaved)
        torch.mul(x1, c, out=y1).addcmul_(x2, s, value=-sign)
        torch.mul(x2, c, out=y2).addcmul_(x1, s, value=sign)


def _in_place(x: Tensor, y: Tensor, c: Tensor, s: Tensor, interleaved: bool, sign: int) -> None:
    if c.shape[-1]:
        x1, x2 = _pairs(y, 2 * c.shape[-1], interleaved)
        turned = x1 * s
        x1.mul_(c).addcmul_(x2, s, value=-sign)
        x2.mul_(c).add_(turned, alpha=sign)


def _is_linear_and_gelu_(spec: OpSpec, call: Call) -> bool:
    """Whether addmm and then gelu_ is the formula."""
    if spec.name == "linear":
        return True
    plain = call.dtype != torch.float64 and call.kwargs.get("approximate") != "quick"
    return spec.name == "gelu_linear" and plain


def _linear(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    x, weight, bias = call.args
    assert x is not None
    assert weight is not None
    targets = destinations(spec, call, regime)
    count, transposed = math.prod(x.shape[:-1]), weight.t()
    rows = targets[0].view(count, weight.shape[0])
    approximate = call.kwargs.get("approximate")

    def run() -> Tensor:
        flat = x.reshape(count, x.shape[-1])
        if bias is None:
            torch.mm(flat, transposed, out=rows)
        else:
            torch.addmm(bias, flat, transposed, out=rows)
        if approximate is not None:
            torch.ops.aten.gelu_(rows, approximate=approximate)
        return targets[0]

    return run


PEERS = (
    Peer(
        "eager",
        f"PyTorch {torch.__version__}, operation by operation",
        True,
        _build,
        always,
        differentiable=True,
        loops=True,
    ),
)
