"""A linear layer with GELU applied to its accumulators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedops import _library, reference
from fusedops._library import is_plain, ops
from fusedops.ops import packed
from fusedops.ops.activated import ActivatedLayer
from fusedops.ops.gelu import require_approximate
from fusedops.ops.layer import autocast
from fusedops.ops.packed import PackedLinear

# The kernels as a call that nothing records, transforms or traces reaches them.
_plain = ops.gelu_linear_nograd.default
_out_plain = ops.gelu_linear_out_nograd.default


def gelu_linear(
    input: Tensor,
    weight: Tensor | PackedLinear,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    save: str = "preact",
    out: Tensor | None = None,
) -> Tensor:
    """``gelu(input @ weight.T + bias)`` in one pass over the result.

    Replaces ``F.gelu(F.linear(input, weight, bias), approximate=...)``.

    Args:
        input: [..., K], any strides; float32, float16, bfloat16 or float64.
        weight: [N, K], of input's dtype; or what :func:`fusedops.pack_linear` returns, which has
            its own bias and no gradient.
        bias: [N], of input's dtype, or None.
        approximate: "none", "tanh" or "quick", as for :func:`fusedops.gelu`.
        save: what training keeps for backward: "preact", the pre-activation [..., N] in input's
            dtype; or "none", nothing: backward computes it again.
        out: receives the result, [..., N]; not for use where autograd records.

    Returns:
        [..., N], contiguous (or ``out``). Differentiable twice. Under autocast the arguments are
        cast as ``torch.nn.functional.linear``'s are. A sum that is NaN gives NaN, an infinite one
        the limit, as in :func:`fusedops.gelu`: -0 for -inf, where torch gives NaN.

    Raises:
        RuntimeError: ``[gelu_linear] requirement but got value``, before anything is written.

    Accuracy:
        Accumulated in float32 (float64 for float64), bias and GELU applied before the one rounding:
        |error| <= eps / 2 |y| + 1.13 (K + 1) eps32 (|input| @ |weight|.T + |bias|) + gelu(y),
        eps32 = 2^-24 (2^-53 for float64); 1.13 is the largest slope of GELU, gelu(y) its own error:
        2.5 ulp32(y), 4 ulp(y) for float64, and 2^-15 |y| for float16 and bfloat16.
        bfloat16 on an ISA with the pair dot product (``avx512bf16``) adds
        2^-126 (sum |input| + sum |weight|) along K: the instruction takes subnormals as zero.
        The same whoever multiplies (:mod:`fusedops.backend`), but for ``aten_direct``, which is
        used by name only.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if save not in ("preact", "none"):
        raise RuntimeError(f"[gelu_linear] save must be 'preact' or 'none' but got {save!r}")
    try:
        if isinstance(weight, PackedLinear):
            return packed.gelu_linear(input, weight, bias, approximate, out)
        input, weight, bias = autocast(input, weight, bias)
        if out is not None:
            if is_plain(input, weight, bias, out) and _library.is_ordinary(out):
                _out_plain(input, weight, bias, approximate, out)
                _library.count_write((out,))
                return out
            _library.refuse_recorded("gelu_linear", "out", input, weight, bias, out)
            _library.refuse_negated("gelu_linear", "out", out)
            _library.write(ops.gelu_linear_out, (input, weight, bias, approximate, out), out)
            return out
        if is_plain(input, weight, bias):
            return _plain(input, weight, bias, approximate)
        return _layer.call(input, weight, bias, approximate, save)
    except (AttributeError, RuntimeError, TypeError):
        own = {} if isinstance(weight, PackedLinear) else {"weight": weight}
        _library.refuse_others("gelu_linear", input=input, **own, bias=bias, out=out)
        raise


def _out_formula(
    input: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, out: Tensor
) -> None:
    result = _layer.formula(input, weight, bias, approximate)
    for attribute in ("dtype", "shape"):  # copy_ would convert and broadcast
        got, expected = getattr(out, attribute), getattr(result, attribute)
        if got != expected:
            raise RuntimeError(
                f"[gelu_linear] out must have the result's {attribute} {expected} but got {got}"
            )
    out.copy_(result)


def _fake_written(*args: Any) -> None:
    _layer.fake(*args[:-1])


def _dz_formula(grad: Tensor, z: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    dz = ops.gelu_backward(grad, z, approximate)
    return dz, dz.sum_to_size(dz.shape[-1:])


def _fake_dz(grad: Tensor, z: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape[-1:])


_layer = ActivatedLayer(
    "gelu_linear",
    "gelu_linear",
    lambda z, approximate: reference.gelu(z, approximate=approximate),
    ops.gelu_backward,
    lambda approximate: require_approximate("gelu_linear", approximate),
)
for _name, _shape, _composed in (
    ("gelu_linear_out", _fake_written, _out_formula),
    ("gelu_linear_out_nograd", _fake_written, _out_formula),
    ("gelu_linear_dz", _fake_dz, _dz_formula),
    ("gelu_linear_dz_nograd", _fake_dz, _dz_formula),
):
    _library.register_fake(_name, _shape)
    _library.register_fallback(_name, _composed)
_library.register_write("gelu_linear_out")
# The formula is made of operations that differentiate.
_library.register_autograd("gelu_linear_dz", _dz_formula, ops.gelu_linear_dz_nograd, _dz_formula)
