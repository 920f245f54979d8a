"""GELU-linear on bfloat16 and int8 weights, and how weights become that."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusedops import _library, reference
from fusedops._library import DTYPE_NAMES, is_plain, is_transformed, ops
from fusedops.ops.gelu import require_approximate
from fusedops.ops.layer import autocast
from fusedops.ops.packed import PackedLinear

_OP = "gelu_linear_quantized"
_INPUTS = (torch.float32, torch.float16, torch.bfloat16)
_WEIGHTS = (torch.bfloat16, torch.int8)
_LONGEST = 1 << 17  # K whose sums of products of bytes fit 32 bits


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weight of a linear layer in a narrower dtype, and its scale.

    Args:
        weight: [N, K], floating point.
        dtype: ``torch.bfloat16``: each weight rounded to nearest even; the scale is None.
            ``torch.int8``: symmetric per output channel, computed in float32:
            ``scale = max(max|w| / 127, 2**-126)`` and ``q = round(w * (1 / scale))``, to nearest
            even, in [-127, 127].

    Returns:
        ``(qweight, scale)``, [N, K] in dtype and [N] in float32 (or None), detached.

    Raises:
        RuntimeError: ``[quantize_weight] requirement but got value``.

    Accuracy:
        int8: ``|w - scale q| <= 0.50002 scale``. A channel that holds NaN or an infinity gets the
        scale NaN and zeros: its results are NaN. bfloat16: half an ulp of bfloat16.
    """

    def need(met: bool, requirement: str, got: Any) -> None:
        if not met:
            raise RuntimeError(f"[quantize_weight] {requirement} but got {got}")

    need(dtype in _WEIGHTS, "dtype must be torch.bfloat16 or torch.int8", dtype)
    need(weight.is_floating_point(), "weight must be floating point", weight.dtype)
    shape = [*weight.shape]
    need(weight.dim() == 2, "weight must have 2 dimensions [N, K]", f"shape {shape}")
    weight = weight.detach()
    if dtype == torch.bfloat16:
        return weight.to(torch.bfloat16), None
    scale, q = reference.quantized_rows(weight.to(torch.float32))
    return q.to(torch.int8), scale.squeeze(-1)


def gelu_linear_quantized(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    activation_dtype: torch.dtype | None = None,
) -> Tensor:
    """``gelu(scale * (input @ weight.T) + bias)`` on a weight in bfloat16 or int8.

    Replaces ``F.gelu(F.linear(input, weight.to(input.dtype) * scale[:, None], bias))`` without the
    copy of the weight. The same bits on every ISA, for every number of rows and threads.

    Args:
        input: [..., K], any strides; float32, float16 or bfloat16.
        weight: [N, K], bfloat16 or int8, as :func:`fusedops.quantize_weight` makes it.
        scale: [N], float32, for an int8 weight; None for a bfloat16 one.
        bias: [N], float32, or None.
        approximate: "none", "tanh" or "quick", as for :func:`fusedops.gelu`.
        activation_dtype: None: input is multiplied as it is, in float32. ``torch.int8``, with an
            int8 weight and K <= 131072: each row of input is rounded to int8 first,
            ``s = max(max|x| / 127, 2**-126)``, ``q = round(x * (1 / s))``, every operation in
            float32 to nearest even, and the products are added up as integers, exactly.

    Returns:
        [..., N], contiguous, of input's dtype. Differentiable twice where activation_dtype is None
        (a weight in int8 has no gradient, its scale has one). With ``torch.int8`` a gradient of
        input is an error: rounding has none. Under autocast input is cast, nothing else.

    Raises:
        RuntimeError: ``[gelu_linear_quantized] requirement but got value``, before anything is
            computed.

    Accuracy:
        Against the formula on the weight as it is stored, with u = 2^-24 and m half an ulp of a
        16-bit result (0 for float32):
        |error| <= m + 1.13 (K / 16 + 7) u (|input| @ |scale * weight|.T + |bias|) + 4 ulp32(y);
        for ``activation_dtype=torch.int8``, input as it is rounded,
        |error| <= m + 1.13 * 4 u (|z| + |bias|) + 4 ulp32(y), z the argument of GELU.
        What rounding the weight and the input itself changes before GELU is at most
        sum |input| * 0.50002 scale, and sum |scale * weight| * 0.50002 s.
        ``input @ weight.T`` is a sum in float32: it overflows where that does. A row that holds NaN
        or an infinity is NaN throughout with ``torch.int8``.

    Source: Dettmers et al. 2022, arXiv:2208.07339 (absolute-maximum rounding by row and channel).
    """
    if isinstance(weight, PackedLinear):
        raise RuntimeError(f"[{_OP}] weight must be a tensor but got PackedLinear")
    (input,) = autocast(input)
    if activation_dtype not in (None, torch.int8):
        raise RuntimeError(
            f"[{_OP}] activation_dtype must be None or torch.int8 but got {activation_dtype}"
        )
    rounded = activation_dtype == torch.int8
    args = (input, weight, scale, bias, approximate, rounded)
    if is_plain(input, weight, scale, bias):
        return ops.gelu_linear_quantized_nograd(*args)
    if is_transformed():
        return _formula(*args)
    return ops.gelu_linear_quantized(*args)


def _require(
    input: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, rounded: bool
) -> None:
    """The op's checks of dtypes and sizes, for calls that never reach it."""

    def need(met: bool, requirement: str, got: Any) -> None:
        if not met:
            raise RuntimeError(f"[{_OP}] {requirement} but got {got}")

    def name(t: Tensor) -> Any:
        return DTYPE_NAMES.get(t.dtype, t.dtype)

    def shape(t: Tensor) -> str:
        return f"shape {[*t.shape]}"

    need(input.dtype in _INPUTS, "input must be float32, float16 or bfloat16", name(input))
    stored = weight.dtype in _WEIGHTS
    need(stored, "weight must be bfloat16 or int8", name(weight))
    need(input.dim() > 0, "input must have at least 1 dimension", shape(input))
    need(weight.dim() == 2, "weight must have 2 dimensions [N, K]", shape(weight))
    n, k = weight.shape
    need(input.shape[-1] == k, f"input's last dimension must be weight's K = {k}", shape(input))
    if weight.dtype == torch.int8:
        need(scale is not None, "scale must be given for an int8 weight", None)
    else:
        need(scale is None, "scale must be None for a bfloat16 weight", "a tensor")
    for what, t in (("scale", scale), ("bias", bias)):
        if t is not None:
            need(t.dtype == torch.float32, f"{what} must be float32", name(t))
            need(t.dim() == 1 and t.shape[0] == n, f"{what} must be [N] = [{n}]", shape(t))
    if rounded:
        plain = "activation_dtype must be None for a bfloat16 weight"
        need(weight.dtype == torch.int8, plain, torch.int8)
        need(k <= _LONGEST, f"K must be at most {_LONGEST} for activation_dtype=torch.int8", k)


def _formula(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    approximate: str,
    rounded: bool,
) -> Tensor:
    _require(input, weight, scale, bias, rounded)
    activation_dtype = torch.int8 if rounded else None
    return reference.gelu_linear_quantized(
        input, weight, scale, bias, approximate=approximate, activation_dtype=activation_dtype
    )


class _Layer(torch.autograd.Function):
    """Through the weight as float32, and the pre-activation computed again."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        approximate: str,
        rounded: bool,
    ) -> Tensor:
        return ops.gelu_linear_quantized_nograd(input, weight, scale, bias, approximate, rounded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.approximate, ctx.rounded = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, scale, bias = ctx.saved_tensors
        x = (reference.rounded_rows(input) if ctx.rounded else input).to(torch.float32)
        wide = weight.to(torch.float32)
        w = wide if scale is None else wide * scale.unsqueeze(-1)
        z = ops.linear(x, w, bias)
        grad = ops.gelu_backward(grad.to(torch.float32), z, ctx.approximate)
        count = math.prod(grad.shape[:-1])  # not -1, which means nothing where N or K is 0
        rows = grad.reshape(count, weight.shape[0])
        to_input = to_weight = to_scale = to_bias = None
        needs_input, needs_weight, needs_scale, needs_bias, *_ = ctx.needs_input_grad
        if needs_input:
            to_input = grad.matmul(w).to(input.dtype)
        if needs_weight or needs_scale:
            to_w = rows.t().mm(x.reshape(count, weight.shape[1]))
            to_weight = to_w.to(weight.dtype) if needs_weight else None
            to_scale = (to_w * wide).sum(-1) if needs_scale else None
        if needs_bias:
            to_bias = rows.sum(0)
        return to_input, to_weight, to_scale, to_bias, None, None


def _fake(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    approximate: str,
    rounded: bool,
) -> Tensor:
    _require(input, weight, scale, bias, rounded)
    require_approximate(_OP, approximate)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _apply(*args: Any) -> Tensor:
    if args[-1]:
        reference.refuse_gradient(args[0])
    return _Layer.apply(*args)  # type: ignore[no-untyped-call]


for _name in (_OP, f"{_OP}_nograd"):
    _library.register_fake(_name, _fake)
    _library.register_fallback(_name, _formula)
_library.register_autograd(_OP, _apply, ops.gelu_linear_quantized_nograd, _formula)
