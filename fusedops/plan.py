"""Plans: one shape and one set of weights, with everything else about a call done ahead.

>>> plan = fusedops.plan.gelu_linear(weight, bias, rows=4)
>>> y = plan(x)          # x [4, K]; a fresh tensor at each call
>>> plan(x, out=y)       # or into memory of yours

For inference on the CPU. What is fixed is fixed for good: a plan keeps a copy of the weight and the
bias, or of the tables, as they were; what is written to them afterwards does not reach it.
A plan is no part of a graph, be it of ``torch.compile``, ``torch.export``, ``torch.jit.trace`` or
``make_fx``; there, :func:`fusedops.pack_linear` packs. Any number of threads may call one plan at a
time. It can be copied, which returns it, and not pickled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import fusedops
from fusedops import _C
from fusedops._library import (
    DTYPE_NAMES,
    SHORT_NAMES,
    count_write,
    is_before_dispatch,
    proxy_mode,
    transform_level,
)
from fusedops.ops.gelu import require_approximate
from fusedops.ops.packed import require_weight

__all__ = ["Plan", "gelu_linear", "rope"]

Plan = _C.Plan

# What the built-in function of a plan asks of torch at each call.
_TOOLS: dict[str, Any] = {
    "Tensor": Tensor,
    "Parameter": torch.nn.Parameter,
    "forward_ad": forward_ad,
    "is_grad_enabled": torch.is_grad_enabled,
    "is_inference_mode_enabled": torch.is_inference_mode_enabled,
    "transform_level": transform_level,
    "tracing_state": torch._C._get_tracing_state,  # of torch.jit.trace
    "mode_count": torch._C._len_torch_dispatch_stack,
    "proxy_mode": proxy_mode,
    "is_before_dispatch": is_before_dispatch,
    "empty_like": torch.empty_like,
    "count_write": count_write,
}


def gelu_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: int | Sequence[int],
    dtype: torch.dtype | None = None,
    approximate: str = "none",
    threads: int | None = None,
) -> Plan:
    """A plan of ``fusedops.gelu_linear(x, weight, bias, approximate=...)`` for one shape of x.

    Packs the weight for the ISA in use, which the plan goes on to use whatever ``fusedops.isa.use``
    chooses later; cuts the work; allocates the work memory. Takes as much memory as the weight,
    and its work memory beside it, each in whole huge pages (2 MiB) from 256 KiB on.

    Args:
        weight: [N, K], any strides; float32, float16, bfloat16 or float64, on the CPU.
        bias: [N], of weight's dtype, or None.
        rows: M, for x [M, K]; or the leading dimensions of x.
        dtype: of x and the result, and what weight and bias are converted to; the default is
            weight's.
        approximate: "none", "tanh" or "quick", as for :func:`fusedops.gelu`.
        threads: at most so many; the default is what ``torch.get_num_threads()`` says now.

    Returns:
        ``plan(x, out=None)``: x [*rows, K], contiguous, of the plan's dtype; the result [*rows, N]
        goes to a fresh tensor, or to ``out``, contiguous and no memory of x.

    Raises:
        RuntimeError: ``[plan.gelu_linear] requirement but got value``, before anything is written;
            in a call also where autograd or a graph would record it.
    """
    op = "plan.gelu_linear"
    require_weight(op, weight, bias, dtype)
    _need(op, weight.is_cpu, "weight must be on the CPU", weight.device)
    require_approximate(op, approximate)
    given: Any = (rows,) if isinstance(rows, int) else rows  # whatever the annotation asks
    lead: tuple[Any, ...] = tuple(given) if isinstance(given, Sequence) else (rows,)
    sizes = all(isinstance(n, int) and n >= 0 for n in lead)
    _need(op, sizes, "rows must be a size or a sequence of sizes", repr(rows))
    most = torch.get_num_threads()
    asked: Any = most if threads is None else threads
    fits = isinstance(asked, int) and 1 <= asked <= most
    _need(op, fits, f"threads must be in [1, {most}] (torch's)", asked)
    n, k = weight.shape
    with torch.no_grad():
        weight = _readable(op, "weight", weight, dtype)
        if bias is not None:
            bias = _readable(op, "bias", bias, weight.dtype)
        like = torch.empty((*lead, n), dtype=weight.dtype, device="cpu")
    return _C.linear_plan(
        _given(op, (*lead, k), like),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        math.prod(lead),
        n,
        k,
        SHORT_NAMES[weight.dtype],
        approximate,
        asked,
    )


def rope(
    shape: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    offset: int = 0,
    layout: str = "bhsd",
    interleaved: bool = False,
    conjugate: bool = False,
) -> Plan:
    """A plan of ``fusedops.rope(x, cos, sin, position_ids, ...)`` for one shape of x.

    Copies the tables and the positions, checks them once, and runs on the ISA in use at each call.

    Args:
        shape: of x, contiguous: [B, H, S, D] or [H, S, D], or as ``layout`` says.
        cos: as for :func:`fusedops.rope`, like sin, position_ids, layout, interleaved, conjugate.
        sin: like cos.
        position_ids: [S], [1, S] or [B, S], or None.
        dtype: of x and the result; the default is cos's.
        offset: added to every position, unless a call says another.
        layout: "bhsd" or "bshd".
        interleaved: how the pairs lie.
        conjugate: turn by the opposite angle.

    Returns:
        ``plan(x, out=None, offset=None)``: x contiguous, of the plan's shape and dtype; the result
        goes to a fresh tensor, or to ``out``: x itself, or contiguous memory that x does not touch.

    Raises:
        RuntimeError: ``[rope] requirement but got value`` here, ``[plan.rope] ...`` in a call,
            before anything is written; in a call also where autograd or a graph would record it.
    """
    with torch.no_grad():
        like = torch.empty(tuple(shape), dtype=cos.dtype if dtype is None else dtype, device="cpu")
        form: dict[str, Any] = {"layout": layout, "interleaved": interleaved}
        form["conjugate"] = conjugate
        fusedops.rope(like, cos, sin, position_ids, offset=offset, **form)  # all of its checks
        cos = _readable("plan.rope", "cos", cos)
        sin = _readable("plan.rope", "sin", sin)
        ids = position_ids
        if ids is not None:
            ids = _readable("plan.rope", "position_ids", ids, torch.int64)
    first, second = (-2, -3) if layout == "bshd" else (-3, -2)
    batch = like.shape[0] if like.dim() == 4 else 1
    return _C.rope_plan(
        _given("plan.rope", like.shape, like),
        cos.data_ptr(),
        sin.data_ptr(),
        0 if ids is None else ids.data_ptr(),
        (batch, like.shape[first], like.shape[second], like.shape[-1]),
        cos.shape[-1],
        cos.shape[-2],
        cos.dim() == 3 and cos.shape[0] > 1,
        ids is not None and ids.dim() == 2 and ids.shape[0] > 1,
        SHORT_NAMES[like.dtype],
        SHORT_NAMES[cos.dtype],
        offset,
        layout == "bshd",
        interleaved,
        conjugate,
    )


def _readable(op: str, name: str, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The elements of t, contiguous, in memory that the binary can read."""
    t = t.detach().to(dtype).contiguous().resolve_neg()
    if t.numel() > 0 and t.data_ptr() == 0:
        t = t.clone()  # a ZeroTensor has no memory, and its clone has
        _need(op, t.data_ptr() != 0, f"{name} must have memory", "a tensor without")
    return t


def _given(op: str, shape: Sequence[int], like: Tensor) -> dict[str, Any]:
    """What the built-in function knows of its plan. like: never written, never handed out."""
    own = {"op": op, "shape": torch.Size(shape), "dtype": like.dtype, "like": like}
    return {**own, "refuse": _refuse, **_TOOLS}


def _refuse(op: str, name: str, t: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Say what is wrong with a tensor that does not fit."""

    def need(met: bool, requirement: str, got: Any) -> None:
        _need(op, met, f"{name} must {requirement}", got)

    # First: of a tensor that is being traced nothing more can be asked.
    traced = any(_TOOLS[tool]() is not None for tool in ("tracing_state", "proxy_mode"))
    alone = not (traced or _TOOLS["is_before_dispatch"]())
    alone = alone and transform_level() is None and forward_ad._current_level < 0
    apart = "not be used in a graph, under a torch.func transform or forward-mode AD"
    need(alone, apart, "such a call")
    plain = type(t) in (Tensor, torch.nn.Parameter)
    need(plain, "be a torch.Tensor and no subclass of it", type(t).__name__)
    own = f"have the plan's dtype {DTYPE_NAMES[dtype]}"
    need(t.dtype == dtype, own, DTYPE_NAMES.get(t.dtype, t.dtype))
    need(t.is_cpu, "be on the CPU", t.device)
    need(t.shape == shape, f"have the plan's shape {[*shape]}", [*t.shape])
    strided = t.layout == torch.strided
    need(strided and t.is_contiguous(), "be contiguous", t.stride() if strided else t.layout)
    need(not t.is_neg(), "not be a lazily negated view (call resolve_neg)", "one")
    recorded = t.requires_grad and torch.is_grad_enabled()
    need(not recorded, "not require grad where autograd records", "one that does")


def _need(op: str, met: bool, requirement: str, got: Any) -> None:
    if not met:
        raise RuntimeError(f"[{op}] {requirement} but got {got}")
