"""The one rule for the outputs of a kernel, ours or a stranger's.

The oracle is the op's formula in float64 on the inputs as the kernel got them. An element is right
when its error is at most the larger of

* the bound of the OpSpec for an implementation that rounds where PyTorch's own steps round, and
* 1.1 times the error that PyTorch itself makes on that very element, in that dtype;

NaN and infinities must stand where the oracle has them or where PyTorch has them; NaN that a
reference outside the registry makes of infinities binds nobody. Shape, dtype, device and a plain
``torch.Tensor`` are part of the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fusedops import reference
from fusedops.testing import Call, OpSpec, ulp_error

__all__ = ["Judge", "Verdict", "judge", "plain"]

# What a stranger may err by, in units of PyTorch's own error on the same element.
OWN = 1.1


@dataclass(frozen=True)
class Verdict:
    """What the rule says. Figures are of the worst output; nan-free, inf where an element is lost.

    fault: what is wrong, in one line; None when all is right. error: the worst element's error in
    units of what it may err by. ulp: the worst element's error in ulps of the dtype. rms_ratio:
    the RMS error over PyTorch's own RMS error, both in units of the bound; None where it was not
    asked for, and where PyTorch's formula is the oracle itself.
    """

    fault: str | None
    error: float = 0.0
    ulp: float = 0.0
    rms_ratio: float | None = None


def judge(
    spec: OpSpec, call: Call, outputs: Tensor | Sequence[Any], *, rms: bool = False
) -> Verdict:
    """Whether outputs are what spec's op returns for call. For several candidates: ``Judge``."""
    return Judge(spec, call)(outputs, rms=rms)


def plain(spec: OpSpec) -> Callable[..., Any]:
    """The op as a PyTorch user writes it: the reference, but with PyTorch's GELU in float64 too."""
    return _PLAIN.get(spec.reference, spec.reference)


class Judge:
    """The rule for one call; oracle, bound and PyTorch's own result are computed once, on use."""

    def __init__(self, spec: OpSpec, call: Call) -> None:
        self.spec = spec
        self.call = call.map(lambda t: t.detach())

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """The outputs in float64."""
        with torch.no_grad():
            return self.spec.oracle(self.call)

    @cached_property
    def bounds(self) -> tuple[Tensor, ...]:
        """What every element may err by, PyTorch's own error left out."""
        with torch.no_grad():
            return self.spec.error_bound(self.call, True)

    @cached_property
    def own(self) -> tuple[Tensor, ...]:
        """PyTorch's own outputs, in the dtype."""
        with torch.no_grad():
            return self.spec.run(plain(self.spec), self.call)

    def dtype(self, index: int) -> torch.dtype:
        """Of an output: the main input's for an op of ours, whatever PyTorch makes it otherwise."""
        return self.call.dtype if self.spec.home else self.own[index].dtype

    def free(self, exact: Tensor) -> Tensor:
        """Where any value will do: what a stranger's reference makes NaN of inputs without NaN."""
        given = not self.spec.home and not any(
            t.isnan().any() for t in self.call.tensors if t.is_floating_point()
        )
        return exact.isnan() & given

    def __call__(self, outputs: Tensor | Sequence[Any], *, rms: bool = False) -> Verdict:
        """The verdict on a candidate's outputs; rms asks for the ratio to PyTorch's own error."""
        given = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        if len(given) != len(self.expected):
            return _lost(f"{len(given)} outputs, wanted {len(self.expected)}")
        for index, (y, exact) in enumerate(zip(given, self.expected, strict=True)):
            fault = _format_fault(y, exact, self.dtype(index), self.call.tensors[0].device)
            if fault is not None:
                return _lost(self._named(index, fault))
        verdicts = [self._output(i, y.detach(), rms) for i, y in enumerate(given)]
        ratios = [v.rms_ratio for v in verdicts if v.rms_ratio is not None]
        return Verdict(
            next((v.fault for v in verdicts if v.fault is not None), None),
            max(v.error for v in verdicts),
            max(v.ulp for v in verdicts),
            max(ratios, default=None),
        )

    def _output(self, index: int, y: Tensor, rms: bool) -> Verdict:
        exact, allowed = self.expected[index], self.bounds[index]
        value = y.to(torch.float64)
        good = within(value, exact, allowed, y.dtype) | self.free(exact)
        own = None
        if rms or not good.all():
            own = self.own[index].to(torch.float64)
            allowed = torch.maximum(allowed, OWN * finite(own - exact))
            good = within(value, exact, allowed, y.dtype) | self.free(exact)
            good |= (value == own) | (value.isnan() & own.isnan())
        error = finite(value - exact)
        ratio = torch.where(error > 0, error / allowed, 0.0)
        ratio = torch.where(good, ratio.clamp_max(1.0), torch.where(ratio > 1.0, ratio, math.inf))
        ulps = torch.where(exact.isfinite() & value.isfinite(), ulp_error(y, exact, y.dtype), 0.0)
        return Verdict(
            None if good.all() else self._named(index, element_fault(value, exact, good, ratio)),
            ratio.max().item() if ratio.numel() else 0.0,
            ulps.max().item() if ulps.numel() else 0.0,
            None if own is None or not rms else _rms_ratio(value, own, exact, self.bounds[index]),
        )

    def _named(self, index: int, fault: str) -> str:
        return fault if len(self.expected) == 1 else f"output {index}: {fault}"


def within(value: Tensor, exact: Tensor, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Where value is right: inside allowed, the same infinity or NaN, or an overflow that may be.

    An infinity of the right sign is right where exact + allowed leaves dtype's range.
    """
    overflows = exact.isfinite() & (exact.abs() + allowed > torch.finfo(dtype).max)
    good = exact.isfinite() & ((value - exact).abs() <= allowed)
    good |= (value == exact) | (value.isnan() & exact.isnan())
    return good | (overflows & value.isinf() & (value.signbit() == exact.signbit()))


def finite(error: Tensor) -> Tensor:
    """|error|, 0 where that is not a finite number."""
    return torch.where(error.isfinite(), error.abs(), 0.0)


def element_fault(value: Tensor, exact: Tensor, good: Tensor, ratio: Tensor) -> str:
    """One line on the worst of the elements that are not good."""
    worst = int(torch.where(good, -1.0, ratio).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), value.shape))
    got, wanted, times = (t.flatten()[worst].item() for t in (value, exact, ratio))
    much = "" if math.isinf(times) else f", {times:.3g} times what is allowed"
    return (
        f"{int((~good).sum())} of {good.numel()} elements are wrong; "
        f"at {list(where)} got {got:.9g}, wanted {wanted:.9g}{much}"
    )


def _lost(fault: str) -> Verdict:
    return Verdict(fault, math.inf, math.inf)


def _format_fault(y: Any, exact: Tensor, dtype: torch.dtype, device: torch.device) -> str | None:
    if type(y) is not Tensor:
        return f"a {type(y).__module__}.{type(y).__qualname__}, wanted a plain torch.Tensor"
    if y.device != device:
        return f"device {y.device}, wanted {device}"
    if y.dtype != dtype:
        return f"dtype {y.dtype}, wanted {dtype}"
    if y.shape != exact.shape:
        return f"shape {[*y.shape]}, wanted {[*exact.shape]}"
    return None


def _rms_ratio(value: Tensor, own: Tensor, exact: Tensor, bound: Tensor) -> float | None:
    counts = exact.isfinite() & value.isfinite() & own.isfinite() & (bound > 0)
    theirs, ours = (
        ((y - exact)[counts] / bound[counts]).square().mean().sqrt().item() for y in (own, value)
    )
    return ours / theirs if theirs > 0 else None


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "quick":
        return reference.gelu(x, approximate=approximate)
    return functional.gelu(x, approximate=approximate)


def _gelu_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    return _gelu(functional.linear(input, weight, bias), approximate=approximate)


_PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    reference.gelu: _gelu,
    reference.gelu_linear: _gelu_linear,
}
