"""The rule for the gradients that a training case returns, cheap enough for large shapes.

The gradient of a rotation is a rotation: the op's own bound judges it. Other gradients are sums of
products of rounded numbers; they are held to float64 with PyTorch's own error as the yardstick.
Errors are taken in units of an element's scale, the sum of the products' magnitudes: all elements
together may have twice PyTorch's RMS, each 1.1 times PyTorch's error there or 16 times that RMS.
PyTorch's error is taken as one rounding of the result at least, and as 0.3 u of the scale, which
is what adding up one by one costs: PyTorch sums by halves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusedops import reference
from fusedops.testing import Call, OpSpec, ulp, wide_dtype
from fusedops.verification.judge import OWN, Judge, Verdict, finite, plain
from fusedops.verification.perturb import vjp

__all__ = ["GradientJudge"]

RMS, ELEMENT = 2.0, 16.0  # times the RMS of PyTorch's own error, in units of the scale


class GradientJudge:
    """Judges gradients of the tensors that a call learns; the truth is computed once, on use."""

    def __init__(self, spec: OpSpec, call: Call, cotangents: Sequence[Tensor]) -> None:
        self.spec, self.call, self.cotangents = spec, call, tuple(cotangents)

    def __call__(self, gradients: Sequence[Any]) -> Verdict:
        """The verdict on what a candidate returned as gradients."""
        if self.spec.home == "rope":
            return self._rotation(gradients)
        wanted = self.exact
        if len(gradients) != len(wanted):
            return _lost(f"{len(gradients)} gradients, wanted {len(wanted)}")
        errors = []
        truth = zip(gradients, wanted, self.own, self.scale, strict=True)
        for index, (g, exact, own, scale) in enumerate(truth):
            if type(g) is not Tensor or g.dtype != own.dtype or g.shape != own.shape:
                what = f"{g.dtype} {[*g.shape]}" if isinstance(g, Tensor) else type(g).__name__
                wants = f"{own.dtype} {[*own.shape]}"
                return _lost(f"gradient {index}: got {what}, wanted {wants}")
            errors.append(_error(g.to(torch.float64), exact, own, scale))
        worst = max(errors)
        fault = None
        if worst > 1.0:
            index = errors.index(worst)
            fault = f"gradient {index}: the error is {worst:.3g} times what is allowed"
        return Verdict(fault, worst)

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """The gradients in float64."""
        wide = self.call.map(lambda t: t.to(torch.float64))
        return vjp(self.spec.reference, wide, [c.to(torch.float64) for c in self.cotangents])

    @cached_property
    def own(self) -> tuple[Tensor, ...]:
        """PyTorch's own gradients."""
        return vjp(plain(self.spec), self.call, self.cotangents)

    @cached_property
    def scale(self) -> tuple[Tensor, ...]:
        """The gradients of a linear layer, or of the identity, on magnitudes."""
        wide = self.call.map(lambda t: t.to(torch.float64).abs())
        dy = self.cotangents[0].to(torch.float64).abs()
        if self.spec.home == "gelu":
            return (dy,)
        return vjp(reference.linear, Call(wide.args, {}), (dy,))

    @cached_property
    def _rotation(self) -> Judge:
        rest = self.call.args[len(self.cotangents) :]
        kwargs = {**self.call.kwargs, "conjugate": not self.call.kwargs["conjugate"]}
        return Judge(self.spec, Call((*self.cotangents, *rest), kwargs))


def _error(value: Tensor, exact: Tensor, own: Tensor, scale: Tensor) -> float:
    """The error in units of what is allowed; infinity where a number is not finite."""
    if value.numel() == 0:
        return 0.0
    if not value.isfinite().all():
        return math.inf
    error, theirs = (value - exact).abs(), finite(own.to(torch.float64) - exact)
    unit = ulp(exact, own.dtype)
    if own.dtype == torch.float64:  # in which the oracle errs as much itself
        unit = 8.0 * unit
    counts, u = scale > 0, torch.finfo(wide_dtype(own.dtype)).eps / 2
    rms, allowed = (
        (t[counts] / scale[counts]).square().mean().sqrt().nan_to_num()
        for t in (error, torch.maximum(theirs, 0.3 * torch.maximum(unit, u * scale)))
    )
    each = torch.maximum(OWN * theirs, unit + ELEMENT * allowed * scale)
    together = (rms / (RMS * allowed)).item() if allowed > 0 else 0.0
    return max(together, (error / each).max().item())


def _lost(fault: str) -> Verdict:
    return Verdict(fault, math.inf, math.inf)
