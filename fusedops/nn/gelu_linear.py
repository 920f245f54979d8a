"""GELULinear: nn.Linear followed by nn.GELU, as one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedops._library import ops
from fusedops.ops import gelu_linear

if TYPE_CHECKING:
    from fusedops.freezing import Packing

_is_compiling = torch.compiler.is_compiling
_packed = ops.gelu_linear_packed_nograd.default
torch.fx.wrap("gelu_linear")  # one node of a symbolic trace: a proxy has no device to look at


class GELULinear(torch.nn.Linear):
    """``gelu(input @ weight.T + bias)``; parameters, initialisation and state_dict of nn.Linear.

    Args:
        in_features: K, the size of the input's last dimension.
        out_features: N, the size of the output's last dimension.
        bias: whether there is one.
        approximate: "none", "tanh" or "quick", as for :func:`fusedops.gelu`.
        save: "preact" or "none": what training keeps, as for :func:`fusedops.gelu_linear`.
        device: where the parameters are made.
        dtype: theirs, and the one inputs must have.

    Raises:
        RuntimeError: an unknown ``approximate`` or ``save``; in forward as
            :func:`fusedops.gelu_linear`.

    The weight is read as it is at every call, and nothing of it is kept; :func:`fusedops.freeze`
    keeps it packed.
    """

    _packing: Packing | None = None  # of a frozen module

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        approximate: str = "none",
        *,
        save: str = "preact",
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
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.approximate = approximate
        self.save = save

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
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
        frozen = "" if self._packing is None else ", frozen=True"
        return f"{super().extra_repr()}, approximate={self.approximate!r}{save}{frozen}"

    # A packing goes with the weight: at once, for its memory; and an inference tensor that is
    # loaded tells nobody.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GELULinear:
        if self._packing is not None:
            self._packing.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._packing is not None:
            self._packing.forget()
        super()._load_from_state_dict(*args, **kwargs)
