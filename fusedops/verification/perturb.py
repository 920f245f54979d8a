"""How far apart right answers may be when nobody has derived a bound: gradients, any reference.

The reference is run in float64 several times, each time with random relative errors put where
arithmetic in the dtype would round: u of the computing type on what goes into an operation, u of
its result's dtype on what comes out. The RMS spread of these runs is the scale of an element: an
error of that size is what the formula does to roundings (Monte Carlo arithmetic, Parker 1997).
PyTorch's GELU and its like are taken apart first, as torch.compile does, so that their inner
cancellation counts. With R the RMS of PyTorch's own error in units of the scale,

* an element may err by the larger of 1.1 times PyTorch's own error there and
  12 max(R, 1) scale + 1 ulp: an error over a scale that 16 runs estimated follows Student's t with
  16 degrees of freedom, which passes 12 once in 5e8;
* all n elements together by an RMS of 1.1 max(R, 1) (1 + 6 / sqrt(n)), which leaves room for what
  chance does to a few elements.

In float64 the oracle itself errs as PyTorch does: R is not known there, and taken as 4.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

from fusedops.testing import Call, ulp, wide_dtype
from fusedops.verification.judge import OWN, finite

__all__ = ["Spread", "spread", "vjp"]

RUNS = 16
TIMES = 12.0

Evaluate = Callable[[Call], tuple[Tensor, ...]]

_aten = torch.ops.aten
# One operation to PyTorch, several roundings in fact.
_TAKEN_APART = get_decompositions(
    [
        _aten.gelu,
        _aten.gelu_backward,
        _aten.silu,
        _aten.silu_backward,
        _aten._softmax,
        _aten._softmax_backward_data,
        _aten._log_softmax,
        _aten.native_layer_norm,
        _aten.mish,
        _aten.softplus,
    ]
)
# Copies and signs: nothing is rounded.
_EXACT = {
    *("clone", "copy_", "_to_copy", "neg", "abs", "cat", "stack", "where", "index", "embedding"),
    *("gather", "zeros_like", "ones_like", "fill", "full", "empty", "index_select", "flip"),
    *("slice_backward", "select_backward", "lift_fresh", "roll", "contiguous"),
}
# One rounding, of the result. Whatever else there is may add up many, as a matmul does: errors on
# its inputs stand for these.
_ELEMENTWISE = {
    *("add", "sub", "rsub", "mul", "div", "exp", "erf", "erfc", "tanh", "sigmoid", "pow", "sqrt"),
    *("rsqrt", "reciprocal", "log", "sin", "cos", "addcmul", "addcdiv", "maximum", "minimum"),
    *("sigmoid_backward", "tanh_backward", "clamp", "relu", "threshold_backward", "log1p", "expm1"),
}


@dataclass(frozen=True)
class Spread:
    """Of every output: the float64 result, PyTorch's own, and the scale of an element's error."""

    exact: tuple[Tensor, ...]
    own: tuple[Tensor, ...]
    scale: tuple[Tensor, ...]

    def units(self, index: int) -> Tensor:
        """The scale and an ulp of the dtype, which nothing is held to more tightly."""
        return self.scale[index] + ulp(self.exact[index], self.own[index].dtype)

    def ratio(self, index: int, value: Tensor) -> float:
        """The RMS error of value in units; elements that are not finite do not count."""
        error = finite(value.to(torch.float64) - self.exact[index]) / self.units(index)
        return error.square().nanmean().sqrt().item() if error.numel() else 0.0

    def room(self, index: int) -> float:
        """max(R, 1); in float64, where the oracle errs as much and R is unknown, 4."""
        least = 4.0 if self.own[index].dtype == torch.float64 else 1.0
        return max(self.ratio(index, self.own[index]), least)

    def bound(self, index: int) -> Tensor:
        """What an element may err by, PyTorch's own error left out."""
        bound = TIMES * self.room(index) * self.scale[index]
        return bound + ulp(self.exact[index], self.own[index].dtype)

    def allowed(self, index: int) -> Tensor:
        """What an element may err by."""
        own = finite(self.own[index].to(torch.float64) - self.exact[index])
        return torch.maximum(OWN * own, self.bound(index))

    def allowed_ratio(self, index: int) -> float:
        """What all elements together may err by."""
        count = max(self.exact[index].numel(), 1)
        return OWN * self.room(index) * (1.0 + 6.0 / math.sqrt(count))


def vjp(
    function: Callable[..., Any], call: Call, cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of all floating arguments; zeros where the function does not depend on one."""
    leaves = call.map(lambda t: t.detach().requires_grad_())
    wanted = [t for t in leaves.tensors if t.requires_grad]
    with torch.enable_grad():
        result = function(*leaves.args, **leaves.kwargs)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    return torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True)


def spread(evaluate: Evaluate, oracle: Evaluate, call: Call, seed: int = 0) -> Spread:
    """Of evaluate, PyTorch's own way to the result, around oracle, the exact one in float64."""
    recorder = _Recorder()
    with recorder:
        own = evaluate(call)
    wide = call.map(lambda t: t.detach().to(torch.float64))
    exact, base = oracle(wide), evaluate(wide)
    u = torch.finfo(wide_dtype(call.dtype)).eps / 2
    noise = _Noise(seed)
    squares = [torch.zeros_like(y) for y in exact]
    for _ in range(RUNS):
        noisy = wide.map(lambda t: noise(t, u))
        with _Perturbed(recorder.units, u, noise):
            results = evaluate(noisy)
        for total, y, y0 in zip(squares, results, base, strict=True):
            total += finite(y - y0).square()
    scale = tuple(
        (total / RUNS + finite(torch.finfo(o.dtype).eps / 2 * y).square()).sqrt()
        for total, y, o in zip(squares, exact, own, strict=True)
    )
    return Spread(exact, own, scale)


class _Noise:
    """Random relative errors, uniform: slices of one block, which is cheaper than drawing anew."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        g = torch.Generator().manual_seed(seed)
        reach = math.sqrt(3.0)
        self._block = torch.empty(1 << 16, dtype=torch.float64).uniform_(-reach, reach, generator=g)

    def __call__(self, t: Tensor, u: float) -> Tensor:
        """A copy of t with errors of RMS u."""
        while t.numel() > len(self._block) // 2:
            self._block = torch.cat((self._block, self._block[torch.randperm(len(self._block))]))
        at = self._random.randrange(len(self._block) - t.numel())
        return torch.addcmul(t, t, self._block[at : at + t.numel()].view(t.shape), value=u)


def _rounds(func: Any) -> bool:
    """Whether an operation rounds: neither a view nor a copy."""
    if _short(func) in _EXACT:
        return False
    aliases = [r.alias_info for r in func._schema.returns]
    return not any(a is not None and not a.is_write for a in aliases)


def _short(func: Any) -> str:
    return str(func._schema.name.partition("::")[2])


def _floating(value: Any) -> list[Tensor]:
    values = value if isinstance(value, tuple | list) else (value,)
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that round, each with u of its result's dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.units: list[tuple[str, float]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _rounds(func) and (found := _floating(result)):
            self.units.append((func.name(), torch.finfo(found[0].dtype).eps / 2))
        return result


class _Perturbed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts errors on the inputs (u) and results (as recorded) of the operations that round."""

    def __init__(self, units: Sequence[tuple[str, float]], u: float, noise: _Noise) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.units = iter(units)
        self.u, self.noise = u, noise

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _rounds(func):
            return func(*args, **kwargs)
        if func in _TAKEN_APART:
            with _Perturbed((), self.u, self.noise):
                result = _TAKEN_APART[func](*args, **kwargs)
        else:
            simple = func._schema.is_mutable or _short(func) in _ELEMENTWISE
            noisy = args if simple else [self._input(a) for a in args]
            result = func(*noisy, **kwargs)
        for y in _floating(result):
            if y.dtype == torch.float64:
                y.copy_(self.noise(y, self._unit(func.name())))
        return result

    def _input(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            return self.noise(value, self.u)
        return value

    def _unit(self, name: str) -> float:
        """As recorded for this operation; u from where the two runs part."""
        recorded, unit = next(self.units, ("", self.u))
        return unit if recorded == name else self.u
