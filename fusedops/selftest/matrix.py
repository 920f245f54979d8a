"""The matrix of a self-test: every op, dtype and memory layout, and every way to call it.

Values are judged by ``fusedops.verification.judge`` and gradients by the rule of ``fusedops
bench``, both in float64 on the CPU, from the numbers that the device was given. Nothing here has a
tolerance of its own.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fusedops
from fusedops import mps
from fusedops.bench.gradients import GradientJudge
from fusedops.bench.peers.peer import main_inputs, output_shapes
from fusedops.selftest.mistakes import MISTAKES, POSITIONS
from fusedops.testing import SPECS, Call, OpSpec, Sample, on_device, synchronize
from fusedops.verification.judge import Judge, Verdict
from fusedops.verification.task import one_thread

__all__ = ["Part", "kernel_missing", "repeat", "run"]

_USUAL = torch.get_num_threads()
AGAIN = 4  # more runs of a probe, whose bits must be the same: a race seldom shows at once


@dataclass
class Part:
    """One row of the report: an op called in one way, in one dtype ("" for errors).

    worst: the largest error in units of what an element may err by. faults: one line each, with the
    call that shows it again. skipped: why nothing ran.
    """

    op: str
    way: str
    dtype: str
    runs: int = 0
    worst: float = 0.0
    faults: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran and found nothing."""
        return not self.faults and not self.skipped


@dataclass(frozen=True)
class _Case:
    """One call to make and to judge."""

    spec: OpSpec
    sample: Sample
    dtype: str
    distribution: str
    device: str

    @property
    def call(self) -> Call:
        return self.sample.build(self.spec.dtypes[self.dtype], self.distribution)


def run(
    device: str,
    *,
    ops: Iterable[str] = tuple(SPECS),
    quick: bool = False,
    status: Callable[[str], None] = lambda text: None,
) -> Iterator[Part]:
    """The parts in order, each when it is done.

    Args:
        device: "cpu" or "mps".
        ops: names in ``fusedops.testing.SPECS``.
        quick: the probes alone, with normal numbers.
        status: told what runs.
    """
    for name in ops:
        spec = SPECS[name]
        for dtype in spec.dtypes:
            if device == "mps" and dtype == "f64":
                yield Part(name, "forward", dtype, skipped="MPS has no float64")
                continue
            for way, cases in _ways(spec, dtype, device, quick):
                status(f"{name} {way} {dtype}")
                yield _part(name, way, dtype, cases)
        status(f"{name} errors")
        yield _mistakes(spec, device)
        if spec.home == "rope":
            status(f"{name} positions")
            yield _positions(spec, device)


def repeat(
    op: str,
    sample: str,
    dtype: str,
    distribution: str = "normal",
    *,
    way: str = "forward",
    device: str = "cpu",
) -> str | None:
    """One case of the matrix again: what is wrong with it, or None."""
    spec = SPECS[op]
    case = _Case(spec, spec.sample(sample), dtype, distribution, device)
    return _judged(_WAYS[way], case).fault


def kernel_missing(spec: OpSpec, device: str) -> bool:
    """Whether PyTorch operations stand in for the op on the device.

    False for a call that fails otherwise: the matrix makes it again and reports it.
    """
    before = os.environ.get("FUSEDOPS_STRICT")
    os.environ["FUSEDOPS_STRICT"] = "1"
    try:
        call = on_device(spec.sample(spec.probes[0]).build(torch.float32), device)
        spec.run(spec.public(), call)
    except Exception as error:  # whatever a driver raises
        return "FUSEDOPS_STRICT=1" in str(error)
    finally:
        if before is None:
            del os.environ["FUSEDOPS_STRICT"]
        else:
            os.environ["FUSEDOPS_STRICT"] = before
    return False


# --- values -------------------------------------------------------------------------------------


def _ways(
    spec: OpSpec, dtype: str, device: str, quick: bool
) -> Iterator[tuple[str, Iterator[_Case]]]:
    probes = [spec.sample(name) for name in spec.probes]
    some = probes if quick else [s for i, s in enumerate(spec.samples) if s in probes or i % 4 == 0]

    def normal(samples: Iterable[Sample]) -> Iterator[_Case]:
        return (_Case(spec, s, dtype, "normal", device) for s in samples)

    whole = (_Case(spec, s, dtype, d, device) for s, d in spec.cases())
    yield "forward", normal(probes) if quick else whole
    yield "again", normal(probes)
    if spec.home != "quantized":
        yield "backward", normal(some)
    if hasattr(fusedops, f"{spec.name}_"):
        yield "in place", normal(s for s in some if getattr(s, "view", "") != "expanded")
    if "out" in inspect.signature(spec.public()).parameters:
        yield "out=", normal(some)


def _part(op: str, way: str, dtype: str, cases: Iterator[_Case]) -> Part:
    part = Part(op, way, dtype)
    for case in cases:
        verdict = _judged(_WAYS[way], case)
        part.runs += 1
        if verdict.fault is None:
            part.worst = max(part.worst, verdict.error)
        else:
            again = f"repeat({op!r}, {case.sample.name!r}, {dtype!r}, {case.distribution!r}, "
            again += f"way={way!r}, device={case.device!r})"
            part.faults.append(f"{verdict.fault}; {again}")
    return part


def _judged(way: Callable[[_Case], Verdict], case: _Case) -> Verdict:
    """The verdict; an exception is one too."""
    try:
        with _quiet(), one_thread():
            return way(case)
    except Exception as error:  # whatever a driver raises belongs into the report
        lines = str(error).strip().splitlines()
        return _lost(f"{type(error).__name__}: {lines[0] if lines else ''}")


def _outputs(result: Any, device: str) -> tuple[Tensor, ...]:
    """On the CPU; RuntimeError for one that was elsewhere than on the device."""
    synchronize(device)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    for y in outputs:
        if y.device.type != device:
            raise RuntimeError(f"the result is on {y.device}, wanted {device}")
    return tuple(y.detach().cpu() for y in outputs)


def _forward(case: _Case) -> Verdict:
    call, there = case.call, on_device(case.call, case.device)
    with torch.no_grad(), _threads():
        found = _outputs(case.spec.run(case.spec.public(), there), case.device)
    return _kept(call, there, 0) or Judge(case.spec, call)(found)


def _again(case: _Case) -> Verdict:
    there = on_device(case.call, case.device)
    with torch.no_grad(), _threads():
        first = _outputs(case.spec.run(case.spec.public(), there), case.device)
        for i in range(AGAIN):
            found = _outputs(case.spec.run(case.spec.public(), there), case.device)
            if not all(map(_same, found, first)):
                return _lost(f"run {i + 2} on the same inputs returned other bits than the first")
    return Verdict(None)


def _in_place(case: _Case) -> Verdict:
    call, there = case.call, on_device(case.call, case.device)
    with torch.no_grad(), _threads():
        result = getattr(fusedops, f"{case.spec.name}_")(*there.args, **there.kwargs)
    count = len(main_inputs(case.spec, call))
    returned = (result,) if isinstance(result, Tensor) else tuple(result)
    if any(y is not x for y, x in zip(returned, there.args, strict=False)):
        return _lost("what was returned is not the tensor that was given")
    return _kept(call, there, count) or Judge(case.spec, call)(_outputs(result, case.device))


def _out(case: _Case) -> Verdict:
    call, there = case.call, on_device(case.call, case.device)
    (shape,) = output_shapes(case.spec, call)
    target = torch.full(shape, math.nan, dtype=call.dtype, device=case.device)
    with torch.no_grad(), _threads():
        result = case.spec.public()(*there.args, **there.kwargs, out=target)
    if result is not target:
        return _lost("what was returned is not the out that was given")
    return _kept(call, there, 0) or Judge(case.spec, call)(_outputs(result, case.device))


def _backward(case: _Case) -> Verdict:
    spec, call = case.spec, case.call
    there = on_device(call, case.device)
    learned = main_inputs(spec, there) if spec.home == "rope" else there.tensors
    leaves = tuple(t.requires_grad_() for t in learned if t.is_floating_point())
    with torch.enable_grad(), _threads():
        outputs = spec.run(spec.public(), there)
        g = torch.Generator().manual_seed(1)
        cotangents = tuple(
            torch.randn(y.shape, generator=g, dtype=torch.float32).to(y.dtype) for y in outputs
        )
        moved = [c.to(y.device) for c, y in zip(cotangents, outputs, strict=True)]
        found = torch.autograd.grad(outputs, leaves, moved)
    forward = Judge(spec, call)(_outputs(outputs, case.device))
    backward = GradientJudge(spec, call, cotangents)(_outputs(found, case.device))
    if backward.fault is not None:
        backward = _lost(f"backward: {backward.fault}")
    return max((forward, backward), key=lambda v: (v.fault is not None, v.error))


_WAYS: Mapping[str, Callable[[_Case], Verdict]] = {
    "forward": _forward,
    "again": _again,
    "backward": _backward,
    "in place": _in_place,
    "out=": _out,
}


def _kept(call: Call, there: Call, first: int) -> Verdict | None:
    """A fault where a call has changed an argument that was not its to write."""
    pairs = zip(call.args[first:], there.args[first:], strict=True)
    for index, (before, after) in enumerate(pairs, first):
        if before is not None and after is not None and not _same(after.detach().cpu(), before):
            return _lost(f"argument {index} was written to")
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN equal to NaN and 0 not to -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    differ = (a != b) | (a.signbit() != b.signbit())
    return not (differ & ~(a.isnan() & b.isnan())).any()


# --- errors -------------------------------------------------------------------------------------


def _mistakes(spec: OpSpec, device: str) -> Part:
    """Bad calls: each must raise, name the op, and write nothing."""
    part = Part(spec.name, "errors", "")
    for mistake in MISTAKES[spec.name]:
        part.runs += 1
        if (fault := _refused(partial(mistake.call, device), mistake.says)) is not None:
            part.faults.append(f"{mistake.name}: {fault}")
    return part


def _positions(spec: OpSpec, device: str) -> Part:
    """Positions outside the table: at once on a CPU, by ``fusedops.mps.check`` on MPS."""
    part = Part(spec.name, "positions", "")
    for mistake in POSITIONS[spec.name]:
        part.runs += 1
        bad = partial(mistake.call, device)
        fault = _refused(partial(_checked, bad) if device == "mps" else bad, mistake.says)
        if fault is None and device == "mps":
            fault = _raised(mps.check)  # once it was told, the flag is down
        if fault is not None:
            part.faults.append(f"{mistake.name}: {fault}")
    return part


def _checked(call: Callable[[], Any]) -> None:
    call()
    mps.check()


def _refused(call: Callable[[], Any], says: str) -> str | None:
    """None where the call raises a RuntimeError that says so."""
    try:
        with _quiet():
            call()
    except RuntimeError as error:
        line = " ".join(str(error).split())
        return None if says in line else f"wanted an error with {says!r} but got {line:.200}"
    except Exception as error:
        return f"wanted a RuntimeError but got {type(error).__name__}: {error!s:.200}"
    return f"wanted an error with {says!r} but nothing was raised"


def _raised(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"
    return None


def _lost(fault: str) -> Verdict:
    return Verdict(fault, math.inf, math.inf)


@contextmanager
def _threads() -> Iterator[None]:
    """As many as the user has, for the op; making and judging small tensors is done by one."""
    judging = torch.get_num_threads()
    torch.set_num_threads(_USUAL)
    try:
        yield
    finally:
        torch.set_num_threads(judging)


@contextmanager
def _quiet() -> Iterator[None]:
    """That PyTorch operations stand in for a kernel is in the report already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fusedops has no")
        yield
