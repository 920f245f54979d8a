"""Weights in the layout that the matmul kernels read: pack_linear, and the ops on its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedops import _C, _library
from fusedops._library import DTYPE_NAMES, SHORT_NAMES, is_plain, ops
from fusedops.ops.gelu import require_approximate

__all__ = ["PackedLinear", "pack_linear"]

# In place of weight, in the calls that take a weight. Their form is (input, packed, bias,
# out_features, ...), and their errors name the public function.
_linear_plain = ops.linear_packed_nograd.default
_gelu_linear_plain = ops.gelu_linear_packed_nograd.default
_gelu_linear_out_plain = ops.gelu_linear_packed_out_nograd.default


@dataclass(frozen=True, eq=False, slots=True)
class PackedLinear:
    """A weight [N, K] and its bias, packed; made by :func:`pack_linear` and never changed.

    Goes where a weight goes: ``fusedops.linear(x, packed)`` and ``fusedops.gelu_linear(x, packed,
    approximate=..., out=...)``, with bias None. ``packed(x)`` is ``fusedops.linear(x, packed)``.

    Results are within the op's bound, though not bit for bit those of the plain weight. It has no
    gradient: an input that requires grad, where autograd records, is an error, as is one under
    a ``torch.func`` transform or with a forward-mode tangent. Works in ``torch.compile``,
    ``torch.export`` and ``inference_mode``, can be copied, pickled and saved (``torch.load`` takes
    it where this class has been imported). As an attribute of a module it is in no
    ``state_dict``, and ``.to()`` leaves it alone. Under autocast the input is
    cast to the dtype that was packed.

    The layout is that of one ISA and one version of fusedops: with another, calls are an error and
    the weight must be packed again.

    Attributes:
        data: uint8 [bytes], a header and the panels.
        bias: [N], of the packed dtype, or None.
        in_features: K.
        out_features: N.
        dtype: that of inputs and results.
    """

    data: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    dtype: torch.dtype

    def __call__(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias``: [..., K] to [..., N]."""
        return linear(input, self, None)

    def __repr__(self) -> str:
        """Sizes, and not the bytes."""
        return (
            f"PackedLinear(in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self.dtype})"
        )


# Plain data, whose bytes every call checks: torch.load(weights_only=True) may make it.
torch.serialization.add_safe_globals([PackedLinear])


def pack_linear(
    weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> PackedLinear:
    """``weight`` and ``bias`` once more, in the layout that the kernels read fastest.

    A copy: what is written to ``weight`` and ``bias`` afterwards does not reach it. It takes as
    much memory as the weight, rounded up to whole panels of columns.

    Args:
        weight: [N, K], any strides; float32, float16, bfloat16 or float64, on the CPU.
        bias: [N], of weight's dtype, or None.
        dtype: of the packed weight, and so of inputs and results; the default is weight's.

    Returns:
        A :class:`PackedLinear`, to be used in place of a weight.

    Raises:
        RuntimeError: ``[pack_linear] requirement but got value``.
    """
    require_weight("pack_linear", weight, bias, dtype)
    there = "weight must be on the CPU"
    _need("pack_linear", weight.is_cpu or weight.is_meta, there, weight.device)
    dtype = weight.dtype if dtype is None else dtype
    with torch.no_grad():
        data = ops.linear_pack(weight.detach().to(dtype))
        if bias is not None:
            bias = bias.detach().to(dtype, copy=True).contiguous()
    return PackedLinear(data, bias, weight.shape[1], weight.shape[0], dtype)


def _need(op: str, met: bool, requirement: str, got: Any) -> None:
    if not met:
        raise RuntimeError(f"[{op}] {requirement} but got {got}")


def require_weight(op: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> None:
    """Fail unless these can be packed; the device apart."""

    def need(met: bool, requirement: str, got: Any) -> None:
        _need(op, met, requirement, got)

    names = "float32, float16, bfloat16 or float64"
    given: dict[str, Any] = {"weight": weight, "bias": bias}  # whatever the annotations ask
    for what, t in given.items():
        if not (isinstance(t, Tensor) or (t is None and what == "bias")):
            need(False, f"{what} must be a torch.Tensor", type(t).__name__)
    need(weight.dtype in DTYPE_NAMES, f"weight must be {names}", weight.dtype)
    need(dtype is None or dtype in DTYPE_NAMES, f"dtype must be {names}", dtype)
    need(weight.layout == torch.strided, "weight must be strided", weight.layout)
    shape = f"shape {[*weight.shape]}"
    need(weight.dim() == 2, "weight must have 2 dimensions [N, K]", shape)
    _require_storage(op, "weight", weight)
    if bias is None:
        return
    _require_storage(op, "bias", bias)
    own = f"bias must have weight's dtype {DTYPE_NAMES[weight.dtype]}"
    need(bias.dtype == weight.dtype, own, DTYPE_NAMES.get(bias.dtype, bias.dtype))
    need(bias.device == weight.device, f"bias must be on weight's {weight.device}", bias.device)
    fits = bias.dim() == 1 and bias.shape[0] == weight.shape[0]
    need(fits, f"bias must be [N] = [{weight.shape[0]}]", f"shape {[*bias.shape]}")


def _require_storage(op: str, name: str, t: Tensor) -> None:
    """That no element has been freed (resize_ of the storage): a conversion would not look."""
    if torch.compiler.is_compiling() or t.numel() == 0:
        return
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    needed = (t.storage_offset() + last + 1) * t.element_size()
    got = t.untyped_storage().nbytes()
    _need(op, got >= needed, f"{name} must have a storage of at least {needed} bytes", got)


def linear(input: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """:func:`fusedops.linear` on a packed weight."""
    input = _prepare("linear", input, packed, bias)
    args = input, packed.data, packed.bias, packed.out_features
    if is_plain(input):
        return _linear_plain(*args)
    _require_traced("linear", input, packed)
    return ops.linear_packed(*args)


def gelu_linear(
    input: Tensor, packed: PackedLinear, bias: Tensor | None, approximate: str, out: Tensor | None
) -> Tensor:
    """:func:`fusedops.gelu_linear` on a packed weight."""
    input = _prepare("gelu_linear", input, packed, bias)
    args = input, packed.data, packed.bias, packed.out_features, approximate
    if out is not None:
        if is_plain(input, out) and _library.is_ordinary(out):
            _gelu_linear_out_plain(*args, out)
            _library.count_write((out,))
            return out
        _library.refuse_recorded("gelu_linear", "out", input, out)
        _library.refuse_negated("gelu_linear", "out", out)
        if torch.compiler.is_compiling():
            _require_traced("gelu_linear", input, packed)
        _library.write(ops.gelu_linear_packed_out, (*args, out), out)
        return out
    if is_plain(input):
        return _gelu_linear_plain(*args)
    _require_traced("gelu_linear", input, packed)
    return ops.gelu_linear_packed(*args)


def _prepare(op: str, input: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """The input, in the packed dtype where autocast is on."""
    none = "bias must be None with a packed weight, which has its own,"
    _need(op, bias is None, none, "a tensor")
    device = input.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return input.to(packed.dtype) if casts and input.is_floating_point() else input


def _require_traced(op: str, input: Tensor, packed: PackedLinear) -> None:
    """That no gradient is wanted, and what only the kernel can read off packed bytes."""
    _library.refuse_recorded(op, "a packed weight, which has no gradient,", input)
    # The compiler does not format its symbolic sizes: no text before it is wanted.
    if input.dtype not in DTYPE_NAMES:
        _need(op, False, "input must be float32, float16, bfloat16 or float64", input.dtype)
    if packed.dtype != input.dtype:
        own = f"weight must have input's dtype {DTYPE_NAMES[input.dtype]}"
        _need(op, False, own, DTYPE_NAMES[packed.dtype])
    _need(op, input.dim() > 0, "input must have at least 1 dimension", "shape []")
    if input.shape[-1] != packed.in_features:
        last = f"input's last dimension must be weight's K = {packed.in_features}"
        _need(op, False, last, f"shape {[*input.shape]}")


def _fake_pack(weight: Tensor) -> Tensor:
    _need(
        "linear_pack",
        weight.dim() == 2,
        "weight must have 2 dimensions [N, K]",
        f"shape {[*weight.shape]}",
    )
    floating = "weight must be float32, float16, bfloat16 or float64"
    _need("linear_pack", weight.dtype in DTYPE_NAMES, floating, weight.dtype)
    n, k = (int(size) for size in weight.shape)
    size = _C.packed_bytes(n, k, SHORT_NAMES[weight.dtype])
    return weight.new_empty((size,), dtype=torch.uint8)


def _fake(
    input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *rest: Any
) -> Tensor:
    return input.new_empty((*input.shape[:-1], out_features))


def _fake_gelu(
    input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, approximate: str
) -> Tensor:
    require_approximate("gelu_linear", approximate)
    return _fake(input, packed, bias, out_features)


def _fake_written(*args: Any) -> None:
    """The result is an argument."""


for _name, _shape in (
    ("linear_pack", _fake_pack),
    ("linear_packed", _fake),
    ("linear_packed_nograd", _fake),
    ("linear_packed_out", _fake_written),
    ("gelu_linear_packed", _fake_gelu),
    ("gelu_linear_packed_nograd", _fake_gelu),
    ("gelu_linear_packed_out", _fake_written),
    ("gelu_linear_packed_out_nograd", _fake_written),
):
    _library.register_fake(_name, _shape)
    _library.register_cpu_only(_name)
for _name in ("linear_packed", "gelu_linear_packed"):
    _library.register_underived(_name)
    _library.register_write(f"{_name}_out")
