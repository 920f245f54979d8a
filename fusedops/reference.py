"""The ops as formulas: torch operations only, differentiable in every mode.

One formula per op serves three ends. Called with float64 tensors it is the oracle that every kernel
is judged by; with the user's dtype it is the eager baseline, written as a good PyTorch user would;
and it is what runs on a device that has no kernel. It trusts its caller on shapes: the ops check.

Source: rotary embedding, Su et al. 2021 (arXiv:2104.09864); GELU, Hendrycks and Gimpel 2016
(arXiv:1606.08415).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

__all__ = [
    "ACTIVATIONS",
    "activate",
    "gelu",
    "gelu_linear",
    "gelu_linear_quantized",
    "linear",
    "quantized_rows",
    "refuse_gradient",
    "require_activation",
    "rope",
    "rope_qk",
    "rounded_rows",
]


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    offset: int = 0,
    layout: str = "bhsd",
    interleaved: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate pairs of x: ``x * cos + rotate_half(x) * sin``; elements past rotary_dim pass through.

    x is [B, H, S, D] (``layout="bshd"``: [B, S, H, D]), or the same without B. cos and sin are half
    width: [P, r/2], read at row ``offset + position``, or one row per token, [B or 1, S, r/2].
    float16 and bfloat16 are computed in float32 and rounded once.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    heads = -3 if layout == "bhsd" else -2
    tokens = x.shape[-2 if layout == "bhsd" else -3]
    cos, sin = (
        _rows(table, position_ids, offset, tokens, x.dim() == 4).to(compute).unsqueeze(heads)
        for table in (cos, sin)
    )
    rotary = 2 * cos.shape[-1]
    head = x[..., :rotary].to(compute)
    if conjugate:
        sin = -sin
    rotated = head * _widen(cos, interleaved) + _rotate_half(head, interleaved) * _widen(
        sin, interleaved
    )
    rotated = rotated.to(x.dtype)
    return rotated if rotary == x.shape[-1] else torch.cat((rotated, x[..., rotary:]), dim=-1)


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    offset: int = 0,
    layout: str = "bhsd",
    interleaved: bool = False,
    conjugate: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rope`` of q and of k by the same tables; the two may differ in the number of heads."""
    rotated_q, rotated_k = (
        rope(
            x,
            cos,
            sin,
            position_ids,
            offset=offset,
            layout=layout,
            interleaved=interleaved,
            conjugate=conjugate,
        )
        for x in (q, k)
    )
    return rotated_q, rotated_k


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """``activate(input @ weight.T + bias)`` for input [..., K], weight [N, K], bias [N]."""
    z = functional.linear(input, weight, bias)
    return z if activation is None else activate(z, activation)


def activate(z: Tensor, activation: str) -> Tensor:
    """``relu``, ``relu2`` (its square), ``silu`` (z sigmoid(z)), ``gelu`` and its two variants.

    The last four have in float64 what ``gelu`` says.
    """
    require_activation(activation)
    return _ACTIVATIONS[activation](z)


def require_activation(activation: str) -> None:
    """The op's check of its option, for calls that never reach it."""
    if activation not in _ACTIVATIONS:
        *names, last = map(repr, ACTIVATIONS)
        known = f"{', '.join(names)} or {last}"
        raise RuntimeError(f"[linear] activation must be {known} but got '{activation}'")


def _silu(z: Tensor) -> Tensor:
    if z.dtype != torch.float64:
        return functional.silu(z)
    z = torch.where(z < -800.0, -800.0, z)  # -inf * 0 would be NaN; the result is 0 from -752 on
    return z * _sigmoid(z)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Elementwise GELU.

    ``none``: x Phi(x); ``tanh``: x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), which is
    0.5 x (1 + tanh u); ``quick``: x sigmoid(1.702 x). In float64 every variant is accurate in the
    tail and has its limit, -0, at -inf. float16 and bfloat16 are rounded once.
    """
    if approximate not in ("none", "tanh", "quick"):
        raise RuntimeError(
            f"[gelu] approximate must be 'none', 'tanh' or 'quick' but got {approximate!r}"
        )
    if x.dtype == torch.float64:
        return _gelu_float64(x, approximate)
    if approximate == "quick":
        wide = x.to(torch.float32)
        return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)
    return functional.gelu(x, approximate=approximate)


def gelu_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    """``gelu(linear(input, weight, bias))``; below float64 the linear result is rounded as well."""
    return gelu(linear(input, weight, bias), approximate=approximate)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu2": lambda z: torch.relu(z).square(),
    "silu": _silu,
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, approximate="tanh"),
    "gelu_quick": functools.partial(gelu, approximate="quick"),
}
ACTIVATIONS = tuple(_ACTIVATIONS)


def gelu_linear_quantized(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    activation_dtype: torch.dtype | None = None,
) -> Tensor:
    """``gelu(scale * (input @ weight.T) + bias)``, by the weight that weight and scale stand for.

    With ``activation_dtype=torch.int8``, of input's rows as int8 holds them: the same numbers in
    every dtype. Computed in float32 or wider and rounded once.
    """
    compute = torch.promote_types(input.dtype, torch.float32)
    x = input.to(compute)
    if activation_dtype is not None:
        refuse_gradient(input)
        x = rounded_rows(_Rounding.apply(input)).to(compute)  # type: ignore[no-untyped-call]
    weight = weight.to(compute)
    if scale is not None:
        weight = weight * scale.unsqueeze(-1)
    z = linear(x, weight, None if bias is None else bias.to(compute))
    return gelu(z, approximate=approximate).to(input.dtype)


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each row and the integers of its elements: x is about scale * q, |q| <= 127.

    In float32 whatever the dtype of x. A row that is not finite has the scale NaN and zeros.
    """
    x = x.to(torch.float32)
    largest = functional.pad(x.abs(), (0, 1)).amax(-1, keepdim=True)  # K may be 0
    scale = (largest / 127.0).clamp_min(2.0**-126)
    scale = torch.where(largest.isfinite(), scale, math.nan)
    q = torch.where(scale.isnan(), 0.0, (x * (1.0 / scale)).round())
    return scale, q


def rounded_rows(x: Tensor) -> Tensor:
    """X as int8 and one scale per row hold it, the product in float64."""
    scale, q = quantized_rows(x)
    return scale.to(torch.float64) * q


def refuse_gradient(x: Tensor) -> None:
    """Fail where a derivative would pass through the rounding of x, which has none."""
    recorded = torch.is_grad_enabled() and x.requires_grad
    dual = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    if recorded or dual.tangent is not None:
        _Rounding.backward()


class _Rounding(torch.autograd.Function):
    """Nothing is changed; for derivatives under transforms that ``refuse_gradient`` cannot see."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RuntimeError(
            "[gelu_linear_quantized] input must not be differentiated for "
            "activation_dtype=torch.int8 (rounding has no gradient) but got one that is"
        )


def _gelu_float64(x: Tensor, approximate: str) -> Tensor:
    # -inf * 0 would be NaN, so x stops where the result is 0 in float64 anyway: from -438 on for
    # quick, from -38.6 for none, from -22 for tanh. where, not clamp: it keeps the gradient of NaN.
    least = -500.0 if approximate == "quick" else -40.0
    x = torch.where(x < least, least, x)
    if approximate == "quick":
        return x * _sigmoid(1.702 * x)
    if approximate == "tanh":
        return x * _sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))
    # F.gelu adds 1 + erf, which cancels for negative x: at -5 its float32 result is 17% off.
    return 0.5 * x * torch.erfc(x * -math.sqrt(0.5))


def _sigmoid(v: Tensor) -> Tensor:
    # torch.sigmoid is 1 / (1 + exp(-v)): 0 from -709.8 on, where the result is still 5e-309.
    e = torch.exp(torch.where(v > 40.0, 40.0, v))  # at 40 the quotient is 1 already
    return e / (1.0 + e)


def _rows(
    table: Tensor, position_ids: Tensor | None, offset: int, tokens: int, batched: bool
) -> Tensor:
    """The table rows of the tokens, [S, r/2] or [B or 1, S, r/2] (without B for an x without B)."""
    if table.dim() == 2 and position_ids is None:
        if offset < 0:  # narrow would count from the end
            raise RuntimeError(f"[rope] offset must be at least 0 but got {offset}")
        return table.narrow(0, offset, tokens)
    # embedding, not indexing: it refuses negative rows instead of counting from the end.
    rows = table if position_ids is None else functional.embedding(position_ids + offset, table)
    return rows if batched or rows.dim() == 2 else rows.squeeze(0)


def _widen(half: Tensor, interleaved: bool) -> Tensor:
    return half.repeat_interleave(2, dim=-1) if interleaved else torch.cat((half, half), dim=-1)


def _rotate_half(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
