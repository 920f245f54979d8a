"""The checks, one small function each: an observation in, what is wrong in one line each out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedops.testing import Call, OpSpec
from fusedops.verification import observe
from fusedops.verification.judge import Judge, element_fault, finite, within
from fusedops.verification.perturb import Spread

__all__ = [
    "aliasing",
    "deterministic",
    "gradient",
    "inputs_kept",
    "kept",
    "liveness",
    "missing_gradients",
    "operations",
    "out_of_memory",
    "same_bits",
    "state_kept",
    "types",
]

Record = dict[str, Any]


def out_of_memory(error: str) -> bool:
    """Whether an exception's line says that memory ran out."""
    return error.startswith("MemoryError") or "t allocate memory" in error


def types(record: Record) -> Iterator[str]:
    """Every output is a plain, strided torch.Tensor on the CPU, not a subclass that may be lazy."""
    for index, (name, y) in enumerate(zip(record["types"], record["outputs"], strict=True)):
        if name != "torch.Tensor":
            yield f"output {index} is a {name}, wanted a plain torch.Tensor"
        elif y is None:
            device = record["devices"][index]
            yield f"output {index} is on {device} or not strided, wanted a strided CPU tensor"


def same_bits(a: Tensor, b: Tensor) -> str | None:
    """None, or where two results part; any NaN equals any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {[*a.shape]} and {b.dtype} {[*b.shape]}"
    differ = (a != b) | (a.signbit() != b.signbit())
    differ &= ~(a.isnan() & b.isnan())
    if not differ.any():
        return None
    where = tuple(differ.nonzero()[0].tolist())
    return (
        f"{int(differ.sum())} of {differ.numel()} elements differ; at {list(where)} "
        f"{a[where].item():.9g} and {b[where].item():.9g}"
    )


def deterministic(first: Record, second: Record) -> Iterator[str]:
    """Two runs on the same inputs return the same bits."""
    if second["error"] is not None:
        yield f"the second run on the same inputs raised {second['error']}"
        return
    for a, b in zip(first["outputs"], second["outputs"], strict=False):
        if (text := same_bits(a, b)) is not None:
            yield f"two runs on the same inputs: {text} (unwritten memory is poisoned)"


def inputs_kept(
    args: Sequence[Any], memory: Sequence[Tensor], layout: Sequence[Any] | None = None
) -> Iterator[str]:
    """No byte of the inputs has changed, those between the elements included, and no shape."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    for index, (before, after) in enumerate(zip(observe.memory(args), memory, strict=True)):
        if not torch.equal(before, after):
            count = int((before != after).sum()) if before.shape == after.shape else "all"
            yield f"tensor argument {index} was written to: {count} of {before.numel()} bytes"
    for index, (t, found) in enumerate(zip(tensors, layout or (), strict=False)):
        if [[*t.shape], [*t.stride()], t.storage_offset()] != found:
            yield f"tensor argument {index} has another shape, strides or offset: {found}"


def aliasing(record: Record, others: Sequence[Sequence[int]], what: str) -> Iterator[str]:
    """No output shares memory with others."""
    for index, (begin, end) in enumerate(record["at"]):
        for other, (low, high) in enumerate(others):
            if begin < high and low < end:
                yield f"output {index} shares memory with {what} {other}"


def kept(record: Record, later: Sequence[Tensor | None], when: str) -> Iterator[str]:
    """The outputs hold the bits that they had when their call returned."""
    for index, (now, then) in enumerate(zip(record["outputs"], later, strict=True)):
        if now is not None and then is not None and (text := same_bits(now, then)) is not None:
            yield f"output {index} changed after its call returned, {when}: {text}"


def missing_gradients(gradients: Sequence[Tensor | None], exact: Sequence[Tensor]) -> Iterator[str]:
    """Every floating tensor argument that matters has a gradient."""
    for index, (g, wanted) in enumerate(zip(gradients, exact, strict=True)):
        if g is None and wanted.numel() and bool((wanted != 0).any()):
            yield f"the gradient of floating argument {index} is None"


def gradient(index: int, g: Tensor, cotangents: Sequence[Tensor], found: Spread) -> str | None:
    """Why a gradient is wrong: by the rule of ``perturb``, and the usual mistakes by name."""
    exact, own = found.exact[index], found.own[index]
    name = f"the gradient of floating argument {index}"
    if g.dtype != own.dtype or g.shape != exact.shape:
        return f"{name} is {g.dtype} {[*g.shape]}, wanted {own.dtype} {[*exact.shape]}"
    value, allowed = g.to(torch.float64), found.allowed(index)
    good = within(value, exact, allowed, g.dtype)
    wide = own.to(torch.float64)
    good |= (value == wide) | (value.isnan() & wide.isnan())
    if not good.all():
        if any(c.shape == g.shape and torch.equal(c, g) for c in cotangents):
            return f"{name} is the cotangent unchanged: backward is the identity"
        if not g.any():
            return f"{name} is zero"
        return f"{name}: {element_fault(value, exact, good, finite(value - exact) / allowed)}"
    ratio, limit = found.ratio(index, value), found.allowed_ratio(index)
    return None if ratio <= limit else f"{name}: RMS error {ratio:.3g} units, allowed {limit:.3g}"


def state_kept(before: dict[str, Any], after: dict[str, Any], when: str) -> Iterator[str]:
    """Timers and settings are what they were."""
    for name in after["replaced"]:
        if name not in before["replaced"]:
            yield f"{name} was replaced {when}"
    for name, value in after.items():
        if name != "replaced" and before[name] != value:
            yield f"the {name} went from {before[name]} to {value} {when}"


# Operations that compute nothing: making, viewing and copying tensors.
_TRIVIAL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "zeros", "zeros_like", "ones", "full"),
    *("fill", "zero", "copy", "clone", "_to_copy", "detach", "view", "_unsafe_view", "reshape"),
    *("expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "alias"),
    *("as_strided", "contiguous", "narrow", "split", "resolve_neg", "lift_fresh", "set", "unbind"),
}
_MATMULS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "addmv", "mv"}


def _computing(names: Sequence[str]) -> set[str]:
    """The operations that compute; the matmuls are one."""
    short = {n.removeprefix("aten::").rstrip("_") for n in names} - _TRIVIAL
    return {"a matmul" if n in _MATMULS else n for n in short}


def operations(seen: dict[str, Any], reference: Sequence[str]) -> Iterator[str]:
    """The kernel runs neither the reference's code nor all of its PyTorch operations."""
    if seen["reference"]:
        yield f"runs the reference's own function: {', '.join(seen['reference'])}"
    wanted = _computing(reference)
    if wanted and wanted <= _computing(seen["operations"]):
        yield f"runs the reference's operations: {', '.join(sorted(wanted))}"


def liveness(spec: OpSpec, call: Call) -> Iterator[str]:
    """The inputs can tell right from wrong: the outputs vary, and every argument matters."""
    judge = Judge(spec, call)
    if not any(y.numel() > 1 for y in judge.expected):
        return
    for index, (y, bound) in enumerate(zip(judge.expected, judge.bounds, strict=True)):
        spread = (y.max() - y.min()).item() if y.numel() > 1 else 1.0
        if spread == 0.0:
            yield f"output {index} is the constant {y.flatten()[0].item():.3g}"
        elif spread <= 100.0 * bound.median().item():
            yield f"output {index} ranges over {spread:.3g}, no more than its errors may"
    for position, arg in enumerate(call.args):
        if not isinstance(arg, Tensor) or arg.numel() == 0:
            continue
        args: list[Any] = [*call.args]
        args[position] = _other(arg)
        changed = Judge(spec, type(call)(tuple(args), call.kwargs))
        pairs = zip(changed.expected, judge.expected, judge.bounds, strict=True)
        if all((finite(a - b) <= 10.0 * bound).all() for a, b, bound in pairs):
            yield f"argument {position} does not matter: other values in it change no output"


def _other(t: Tensor) -> Tensor:
    """The values of t, each in its neighbour's place; one more where all are the same."""
    rolled = t.flatten().roll(1).reshape(t.shape)
    return rolled if not torch.equal(rolled, t) else t + 1
