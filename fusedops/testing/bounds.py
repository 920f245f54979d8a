"""How far an element of a result may be from the true one.

Every bound is ``k * eps * scale_i`` with k and scale_i derived in the docstring of its function.
Notation there: eps = finfo.eps of the type that is computed in (float32, or float64 for float64),
u = eps / 2 the largest relative error of one rounding.

On MPS the bounds are wider, by what Apple promises and no more (Metal Shading Language
Specification, "Numerical compliance"): the compiler may fuse a product and a sum, which saves a
rounding and widens nothing; subnormal numbers may be taken for zero, as inputs and as results of
any step, so that each step errs by the smallest normal number; exp errs by up to 4 ulp. They are
derived, and met by the emulator of the shaders (tests/metal) under a perturbation of exp by 4 ulp;
on a GPU they have not been tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fusedops import reference
from fusedops.testing.errors import ulp, wide_dtype
from fusedops.testing.samples import Call

__all__ = [
    "Bound",
    "gelu_bound",
    "gelu_linear_bound",
    "linear_bound",
    "quantized_bound",
    "rope_bound",
]

# The bound of every element of every output of a call, in float64. stepwise: of an implementation
# that stores what eager would store between its steps in the dtype of the call (ladder rungs).
Bound = Callable[[Call, bool], tuple[Tensor, ...]]


def _rounded(value: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """The error after rounding a float32 value to a narrower dtype: half an ulp of that more."""
    if dtype.itemsize >= 4:
        return error  # the rounding of the last operation, which every bound has counted
    return error + 0.5 * ulp(value.abs() + error, dtype)


def rope_bound(call: Call, stepwise: bool = False) -> tuple[Tensor, ...]:
    """``eps * scale``, scale = |x1 c| + |x2 s|, then half an ulp for float16 and bfloat16.

    y1 = x1 c - x2 s: each product errs by u of itself, together u * scale; their difference rounds
    by u |y| <= u * scale (1 + u). The sum is eps * scale (1 + u); 1.01 covers the second order.
    Products that underflow err by half of the smallest number each. Elements past rotary_dim are
    copied: their bound is 0. In float64 the oracle errs as much itself: twice the bound. On MPS two
    inputs, two values of the tables, two products and their sum may be flushed: what is lost is
    2 (|x| + |table|) + 3 times the smallest normal number, |x| the largest of all. Stepwise changes
    nothing: eager rope holds its steps in float32 too.
    """
    oracle = call.exact()
    *xs, cos, sin, position_ids = oracle.args
    assert cos is not None
    assert sin is not None
    info = torch.finfo(wide_dtype(call.dtype))
    k = 2.02 if call.dtype == torch.float64 else 1.01
    bounds = []
    for x in xs:
        assert x is not None
        first = reference.rope(x.abs(), cos.abs(), 0.0 * sin, position_ids, **call.kwargs)
        second = reference.rope(x.abs(), 0.0 * cos, sin.abs(), position_ids, **call.kwargs)
        error = k * info.eps * (first + second.abs()) + info.smallest_normal * info.eps
        if call.on_mps:
            largest = x.abs().nan_to_num().amax() if x.numel() else 0.0
            error = error + info.smallest_normal * (5.0 + 2.0 * largest)
        exact = reference.rope(x, cos, sin, position_ids, **call.kwargs)
        bound = _rounded(exact, error, call.dtype)
        bound[..., 2 * cos.shape[-1] :] = 0.0
        bounds.append(bound)
    return tuple(bounds)


def _linear_error(call: Call, stepwise: bool) -> tuple[Tensor, Tensor]:
    """The exact result and the error of a sum of products accumulated in float32 (float64).

    scale = sum |x||w| + |b|. n = K + 2 roundings (K sums, the bias, products where there is no
    FMA) err by at most n u * scale in any order (Higham 2002, section 3.1). Roundings that do not
    conspire add up like sqrt(n) (Higham and Mary 2019): 4 sqrt(n) u * scale is seven standard
    deviations of n errors uniform in [-u, u] of a full scale. k is the smaller of n and 4 sqrt(n),
    in units of u. Below that, a product that underflows errs by half of the smallest number, and
    for bfloat16 the dot-product instruction takes subnormal inputs, sums and results as zero; that
    of arm64 rounds its sums to odd, an error of up to 2 u each: twice the bound. In float64 the
    oracle errs as much itself: twice the bound. Stepwise, the result is rounded before
    and after the bias, as torch does it for some strides. On MPS it is rounded before the bias,
    where torch multiplies, and anything subnormal may be flushed.
    """
    x, weight, bias = call.exact().args
    assert x is not None
    assert weight is not None
    scale = reference.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    info, depth = torch.finfo(wide_dtype(call.dtype)), x.shape[-1]
    k = min(depth + 2.0, 4.0 * math.sqrt(depth + 2.0))
    if call.dtype in (torch.float64, torch.bfloat16):
        k *= 2.0
    error = k * (info.eps / 2.0) * scale + (depth + 1) * info.smallest_normal * info.eps
    if call.dtype == torch.bfloat16 or call.on_mps:
        flushed = x.abs().sum(-1, keepdim=True) + weight.abs().sum(-1) + depth + 2
        error = error + info.smallest_normal * flushed
    exact = reference.linear(x, weight, bias)
    if stepwise or call.on_mps:
        error = _rounded(reference.linear(x, weight), error, call.dtype)
    if stepwise:
        error = _rounded(exact, error, call.dtype)
    return exact, torch.where(exact.isfinite(), error, 0.0)


def linear_bound(call: Call, stepwise: bool = False) -> tuple[Tensor, ...]:
    """The error of the sum (``_linear_error``), then half an ulp for float16 and bfloat16.

    With an activation: the error of the sum times its slope there, and its own error. relu is
    exact, with slope 1; relu2 squares, so that an error d of z moves it by (2 |z| + d) d, and
    rounds once. The others are no steeper than 1.13 (as in ``gelu_linear_bound``; silu 1.10) and
    err as ``_gelu_error`` says.
    """
    exact, error = _linear_error(call, stepwise)
    activation = call.kwargs.get("activation")
    if activation is None:
        return (_rounded(exact, error, call.dtype),)
    y = reference.activate(exact, activation)
    if activation == "relu2":
        square = (2.0 * exact.relu() + error) * error
        error = torch.where(y.isfinite(), square, 0.0)
        error = error + ulp(y + error, wide_dtype(call.dtype))
    elif activation != "relu":
        variant = _VARIANTS.get(activation, activation)
        error = 1.13 * error
        error = error + _gelu_error(
            exact, y.abs() + error, variant, call.dtype, stepwise, call.on_mps
        )
    return (_rounded(y, error, call.dtype),)


# gelu's names of linear's activations.
_VARIANTS = {"gelu": "none", "gelu_tanh": "tanh", "gelu_quick": "quick"}


def _gelu_error(
    x: Tensor,
    y: Tensor,
    approximate: str,
    dtype: torch.dtype,
    stepwise: bool = False,
    on_mps: bool = False,
) -> Tensor:
    """The error of y = gelu(x) in the type that dtype is computed in: 4 ulp, plus conditioning.

    ``none``: 4 ulp of the true result, the smallest number included (what ours holds in float32 is
    half of that, see docs/accuracy.md; this bound is everybody's). The others evaluate
    x sigmoid(v): a relative error d in v moves the result by |v| sigmoid(-v) d. v = 1.702 x has a
    rounded constant and a rounded product, d = eps, silu's v = x none but the same bound;
    v = 2u(x) has two constants and three operations, each at most u: d = 2.5 eps. float16 and
    bfloat16 results may be computed to 2^-15 of their size (1/16 and 1/128 of their ulp at most):
    a rounding follows. ``none`` in float64 evaluates erfc(-x / sqrt 2), where
    d = eps moves the result by x^2 d, and what x multiplies may be subnormal, off by the smallest
    number; all of it twice, as in rope.

    Stepwise, the formula may be PyTorch's: 0.5 x (1 + erf(x / sqrt 2)), or tanh for erf. For
    negative x the sum cancels, so what counts is its absolute error, 4 eps: 1.5e-7 = 1.3 eps of
    the erf itself (Abramowitz and Stegun 7.1.26, which torch's vectors use), as much again for its
    roundings, and the rounding of the sum. Times 0.5 x, that is 2 |x| eps. quick is
    x / (1 + exp(-v)), where exp overflows while the quotient is subnormal: |x| times the smallest
    normal number; so is silu.

    On MPS exp adds 4 eps and the product with it one; what is flushed, the exponential or the
    result, is |x| and 1 times the smallest normal number, at most.
    """
    compute = wide_dtype(dtype)
    eps = torch.finfo(compute).eps
    if approximate in ("quick", "silu"):
        v = x * (1.702 if approximate == "quick" else 1.0)
        conditioning = v.abs() * torch.sigmoid(-v)
    elif approximate == "tanh":
        v = 2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
        conditioning = 2.5 * v.abs() * torch.sigmoid(-v)
    else:
        conditioning = x * x if dtype == torch.float64 else torch.zeros_like(x)
    error = 4.0 * ulp(y, compute) + torch.where(y == 0, 0.0, conditioning * eps * y.abs())
    if dtype.itemsize == 2:
        error = error + torch.where(y.isfinite(), 2.0**-15 * y.abs(), 0.0)
    if on_mps:
        flushed = torch.finfo(compute).smallest_normal * (1.0 + x.abs().clamp_max(800.0))
        error = error + torch.where(y.isfinite(), 5.0 * eps * y.abs() + flushed, 0.0)
    if stepwise:
        overflows = approximate in ("quick", "silu")
        absolute = torch.finfo(compute).smallest_normal if overflows else 2.0 * eps
        error = error + torch.where(x.isfinite(), absolute * x.abs(), 0.0)
    if dtype == torch.float64:
        smallest = torch.finfo(dtype).smallest_normal * eps
        error = 2.0 * (error + smallest * x.abs().clamp_max(800.0))  # from -752 on all are 0
    return error


def gelu_bound(call: Call, stepwise: bool = False) -> tuple[Tensor, ...]:
    """What ``_gelu_error`` says, then half an ulp for float16 and bfloat16."""
    x = call.exact().tensors[0]
    y = reference.gelu(x, **call.kwargs)
    error = _gelu_error(x, y, call.kwargs["approximate"], call.dtype, stepwise, call.on_mps)
    return (_rounded(y, error, call.dtype),)


def gelu_linear_bound(call: Call, stepwise: bool = False) -> tuple[Tensor, ...]:
    """1.13 times the error of the sum, the error of gelu, half an ulp for float16 and bfloat16.

    No variant of gelu is steeper than 1.13 (1.129 at x = 1.41 for none, 1.130 for tanh, 1.100 for
    quick).
    """
    exact, error = _linear_error(call, stepwise)
    y = reference.gelu(exact, **call.kwargs)
    error = 1.13 * error
    approximate, magnitude = call.kwargs["approximate"], y.abs() + error
    error = error + _gelu_error(exact, magnitude, approximate, call.dtype, stepwise, call.on_mps)
    return (_rounded(y, error, call.dtype),)


def quantized_bound(call: Call, stepwise: bool = False) -> tuple[Tensor, ...]:
    """1.13 times the error of the sum, the error of gelu, half an ulp for float16 and bfloat16.

    Against the formula on the weight as it is stored, computed in float32. A product enters one of
    16 sums of K / 16 products, whose roundings and the 4 that add them up err by at most
    (K / 16 + 4) u sum |x||scale w|; times the scale and plus the bias, another 2 u of that and
    |bias|. With int8 activations the sum is exact: its rounding to float32, the product with the
    weight's scale and the sum with the bias err by 3 u (|z| + 2 |bias|); 4 covers the second order.
    Below that, products err by half of the smallest number each, times |scale|.

    Stepwise, the sum is PyTorch's, of rounded products of weight and scale (and of the row's scale
    and its integers): K + 4 roundings in any order, or 4 sqrt(K + 4) as for ``linear``.
    """
    x, weight, scale, bias = call.exact().args
    assert x is not None
    assert weight is not None
    weight = weight.to(torch.float64)
    rounded = call.kwargs["activation_dtype"] is not None
    x = reference.rounded_rows(x) if rounded else x
    factor = weight.new_ones(weight.shape[0]) if scale is None else scale
    offset = torch.zeros(()) if bias is None else bias
    sums = reference.linear(x, weight)
    exact = sums * factor + offset
    terms = reference.linear(x.abs(), weight.abs()) * factor.abs()
    info, depth = torch.finfo(torch.float32), x.shape[-1]
    u = info.eps / 2.0
    if stepwise:
        error = min(depth + 4.0, 4.0 * math.sqrt(depth + 4.0)) * u * (terms + offset.abs())
    elif rounded:
        error = 4.0 * u * ((sums * factor).abs() + 2.0 * offset.abs())
    else:
        error = (depth / 16.0 + 7.0) * u * (terms + offset.abs())
    error = error + (depth + 2) * info.smallest_normal * info.eps * (1.0 + factor.abs())
    error = torch.where(exact.isfinite(), error, 0.0)
    y = reference.gelu(exact, approximate=call.kwargs["approximate"])
    error = 1.13 * error
    wide = torch.float32 if call.dtype.itemsize < 4 else call.dtype
    approximate, magnitude = call.kwargs["approximate"], y.abs() + error
    error = error + _gelu_error(exact, magnitude, approximate, wide, stepwise)
    return (_rounded(y, error, call.dtype),)
