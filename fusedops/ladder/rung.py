"""What a rung is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rung"]


@dataclass(frozen=True)
class Rung:
    """One implementation of one op; unavailable says in one line why this machine cannot run it.

    stepwise: it stores the result of each eager step in the dtype of its input, so that for float16
    and bfloat16 it is held to the stepwise bound of its OpSpec. prepare: of a rung that does part
    of the work ahead: takes the arguments, returns what is left to be called. device: where it
    computes; tensors that are there are not moved. dtypes: those it computes in, None for all.
    """

    name: str
    op: str
    description: str
    function: Callable[..., Tensor] = field(repr=False)
    unavailable: str | None = None
    stepwise: bool = False
    prepare: Callable[..., Callable[[], Tensor]] | None = field(default=None, repr=False)
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run it; RuntimeError with the reason where that is impossible."""
        if self.unavailable is not None:
            raise RuntimeError(
                f"[ladder] {self.op}/{self.name} must be available but got: {self.unavailable}"
            )
        return self.function(*args, **kwargs)
