"""GELULinear: nn.Linear followed by nn.GELU, as one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedops._library import ops
from fusedops.ops import gelu_linear, gelu_linear_quantized
from fusedops.ops.quantized import quantize_weight

if TYPE_CHECKING:
    from fusedops.freezing import Packing

_is_compiling = torch.compiler.is_compiling
_packed = ops.gelu_linear_packed_nograd.default
torch.fx.wrap("gelu_linear")  # one node of a symbolic trace: a proxy has no device to look at
torch.fx.wrap("gelu_linear_quantized")


class GELULinear(torch.nn.Linear):
    """``gelu(input @ weight.T + bias)``; parameters, initialisation and state_dict of nn.Linear.

    With ``weight_dtype``, for inference: the weight is a buffer in that dtype, quantised once by
    :func:`fusedops.quantize_weight`, for int8 beside a float32 buffer ``scale``; the bias is
    float32 and does not require grad. state_dict holds these. A floating-point state_dict, of
    nn.Linear say, is quantised as it is loaded; int8 weights load into an int8 module only, and
    with their scale. ``.to(dtype)`` leaves them as they are: the input
    may be float32, float16 or bfloat16, and so is the result. Gradients of input are as in
    :func:`fusedops.gelu_linear_quantized`.

    Args:
        in_features: K, the size of the input's last dimension.
        out_features: N, the size of the output's last dimension.
        bias: whether there is one.
        approximate: "none", "tanh" or "quick", as for :func:`fusedops.gelu`.
        save: "preact" or "none": what training keeps, as for :func:`fusedops.gelu_linear`.
        weight_dtype: None, ``torch.bfloat16`` or ``torch.int8``.
        activation_dtype: None or ``torch.int8``, which needs an int8 weight: rows of input are
            rounded at each call, as for :func:`fusedops.gelu_linear_quantized`.
        device: where the parameters are made.
        dtype: theirs, and the one inputs must have; with ``weight_dtype``, only what the weights
            are drawn in before they are quantised.

    Raises:
        RuntimeError: an unknown ``approximate``, ``save`` or dtype; in forward as
            :func:`fusedops.gelu_linear` or :func:`fusedops.gelu_linear_quantized`.

    The weight is read as it is at every call, and nothing of it is kept; :func:`fusedops.freeze`
    keeps it packed.
    """

    _packing: Packing | None = None  # of a frozen module
    weight_dtype: torch.dtype | None = None
    activation_dtype: torch.dtype | None = None
    scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        approximate: str = "none",
        *,
        save: str = "preact",
        weight_dtype: torch.dtype | None = None,
        activation_dtype: torch.dtype | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if approximate not in ("none", "tanh", "quick"):
            raise RuntimeError(
                "[GELULinear] approximate must be 'none', 'tanh' or 'quick' but got "
                f"{approximate!r}"
            )
        if save not in ("preact", "none"):
            raise RuntimeError(f"[GELULinear] save must be 'preact' or 'none' but got {save!r}")
        if weight_dtype not in (None, torch.bfloat16, torch.int8):
            raise RuntimeError(
                "[GELULinear] weight_dtype must be None, torch.bfloat16 or torch.int8 but got "
                f"{weight_dtype}"
            )
        if activation_dtype not in (None, torch.int8):
            raise RuntimeError(
                "[GELULinear] activation_dtype must be None or torch.int8 but got "
                f"{activation_dtype}"
            )
        if activation_dtype is not None and weight_dtype != torch.int8:
            raise RuntimeError(
                "[GELULinear] weight_dtype must be torch.int8 for activation_dtype=torch.int8 but "
                f"got {weight_dtype}"
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.approximate = approximate
        self.save = save
        if weight_dtype is not None:
            weight, scale = quantize_weight(self.weight, weight_dtype)
            del self.weight
            self.register_buffer("weight", weight)
            self.register_buffer("scale", scale)
            if bias:
                self.bias = torch.nn.Parameter(self.bias.detach().float(), requires_grad=False)
            self.weight_dtype, self.activation_dtype = weight_dtype, activation_dtype

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        approximate: str | None = None,
        *,
        save: str = "preact",
        weight_dtype: torch.dtype | None = None,
        activation_dtype: torch.dtype | None = None,
    ) -> GELULinear:
        """A module of its own with the weights of an nn.Linear, followed by GELU.

        approximate is by default what a GELULinear has, else "none".

        Raises:
            RuntimeError: linear is a GELULinear with a ``weight_dtype``: its weight was rounded.
        """
        if isinstance(linear, GELULinear) and linear.weight_dtype is not None:
            raise RuntimeError(
                "[GELULinear] linear must hold a floating-point weight of its own but got one with "
                f"weight_dtype {linear.weight_dtype}"
            )
        if approximate is None:
            approximate = linear.approximate if isinstance(linear, GELULinear) else "none"
        weight = linear.weight.detach()
        bias: Tensor | None = linear.bias
        module = cls(
            linear.in_features,
            linear.out_features,
            bias is not None,
            approximate,
            save=save,
            weight_dtype=weight_dtype,
            activation_dtype=activation_dtype,
            device="meta",
            dtype=weight.dtype,
        )
        state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias.detach()}
        module.to_empty(device=weight.device).load_state_dict(state)
        return module.train(linear.training)

    def reset_parameters(self) -> None:
        """New random weights, as nn.Linear draws them; quantised where the module is."""
        if self.weight_dtype is None:
            return super().reset_parameters()
        drawn = torch.nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=torch.float32,
        )
        self.load_state_dict(drawn.state_dict())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GELULinear:
        if self._packing is not None:  # with its weight, at once: for its memory
            self._packing.forget()
        if self.weight_dtype is None:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

        def keep_dtype(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._require_own_kind(state_dict, prefix)
        weight = state_dict.get(f"{prefix}weight")
        if self.weight_dtype is not None and weight is not None:
            if weight.is_floating_point() and weight.dim() == 2:
                stored, scale = quantize_weight(weight, self.weight_dtype)
                state_dict[f"{prefix}weight"] = stored
                if scale is not None:
                    state_dict[f"{prefix}scale"] = scale
            bias = state_dict.get(f"{prefix}bias")
            if bias is not None and bias.dtype != torch.float32:
                state_dict[f"{prefix}bias"] = bias.float()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self._packing is not None:  # an inference tensor that is loaded tells nobody
            self._packing.forget()

    def _require_own_kind(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Integers are no weight without their scale, nor a scale without its integers.

        nn.Module would copy the one and keep the other, or convert integers (strict=False).
        """

        def need(met: bool, requirement: str, got: Any) -> None:
            if not met:
                raise RuntimeError(f"[GELULinear] {prefix}{requirement} but got {got}")

        weight, scale = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}scale")
        int8 = self.weight_dtype == torch.int8
        if weight is not None:
            kinds = "floating point or torch.int8" if int8 else "floating point"
            own = weight.is_floating_point() or (int8 and weight.dtype == torch.int8)
            need(own, f"weight must be {kinds}", weight.dtype)
        if weight is not None and weight.dtype == torch.int8:
            need(scale is not None, "scale must come with a weight in torch.int8", None)
        elif scale is not None:
            got = "no weight" if weight is None else weight.dtype
            need(False, "scale must come with a weight in torch.int8", got)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if self.weight_dtype is not None:
            return gelu_linear_quantized(
                input,
                self.weight,
                self.scale,
                self.bias,
                approximate=self.approximate,
                activation_dtype=self.activation_dtype,
            )
        if self._packing is not None and not _is_compiling():
            arguments = self._packing.arguments(self, input)
            if arguments is not None:
                result: Tensor = _packed(*arguments, self.approximate)
                return result
        return gelu_linear(
            input, self.weight, self.bias, approximate=self.approximate, save=self.save
        )

    def extra_repr(self) -> str:
        """Like nn.Linear's, with what is added."""
        save = "" if self.save == "preact" else f", save={self.save!r}"
        for name in ("weight_dtype", "activation_dtype"):
            if (dtype := getattr(self, name)) is not None:
                save += f", {name}={dtype}"
        if self._packing is not None:
            save += ", frozen=True"
        return f"{super().extra_repr()}, approximate={self.approximate!r}{save}"
