"""One case -> one Result: the candidates timed together, and what they returned verified.

Every candidate takes the same way, ours included: the same inputs, the same judge, the same
refusals. What is verified is what the last timed calls returned, copied when the clock stopped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

import fusedops
from fusedops import _C
from fusedops.bench import timing
from fusedops.bench.gradients import GradientJudge
from fusedops.bench.limits import Calm, DeviceLimits, Limits, has_matrix_unit
from fusedops.bench.peers.peer import Peer, Unsupported, main_inputs
from fusedops.bench.record import DEVICES, Case, Limit, Quantiles, Regime, Result, Row
from fusedops.bench.timing import TWIN, Candidate, Timed
from fusedops.testing import DTYPES, SPECS, Call, OpSpec, Sample, on_device, synchronize
from fusedops.verification.judge import Judge, Verdict

__all__ = [
    "EXPLAINED",
    "NOISE",
    "QUICK_NOISE",
    "Entry",
    "Explanation",
    "limits_of",
    "limits_on",
    "measure",
]

NOISE, QUICK_NOISE = 0.05, 0.10  # what two runs may differ by at the least
TOO_FAST = 10.0  # times faster than the best other candidate: refused until explained
LIMIT = "limit"  # the yardstick that limit_now makes
FAILED = "it failed"  # begins the reason of a candidate that raised
MATMULS = ("linear", "gelu_linear", "gelu_linear_quantized")
SOME_ROWS = 64  # checked of a large matmul, the first and the last among them
LARGE = 4e9  # flops of a matmul of which some rows are checked: float64 would take longer than all
COPIES = 32  # of an input that is overwritten, for calls that are too short to be timed alone
COPIED_BYTES = 1 << 20  # of all these copies together


@dataclass(frozen=True)
class Explanation:
    """Why a row that would be refused is right; the names are globs, the note goes with the row.

    kind: "limit" or "10x". best: the fastest other candidate. up_to: of the limit, or times faster
    than best; beyond it the row is refused all the same.
    """

    kind: str
    note: str
    up_to: float
    op: str = "*"
    shape: str = "*"
    dtype: str = "*"
    regime: str = "*"
    best: str = "*"


EXPLAINED: tuple[Explanation, ...] = (
    Explanation(
        "10x",
        "eager runs five operations, each into memory of its own",
        up_to=30.0,
        op="rope*",
        best="eager",
    ),
    Explanation(
        "10x",
        "the compiled function's result is fresh 4 KiB pages, where ours asks for huge ones",
        up_to=30.0,
        op="rope*",
        regime="forward",
        best="compile*",
    ),
    Explanation(
        "10x",
        "PyTorch has no fast float16 matmul for CPUs without AVX512-FP16",
        up_to=100.0,
        op="*linear",
        dtype="f16",
        best="[ec]*",
    ),
    Explanation(
        "10x",
        "PyTorch makes the narrow weight wide again at each call",
        up_to=1000.0,
        op="gelu_linear_quantized",
        best="[ec]*",
    ),
)


@dataclass(frozen=True)
class Entry:
    """One candidate of a case.

    build: makes the call that is timed, as ``Peer.build`` does, or the Candidate. missing: why it
    cannot run here. sample: what it runs where that is a slice of the case. read: makes tensors of
    what a call returned, untimed. yardstick: it does not compute the op; it is timed, but neither
    verified nor compared with as a candidate. unproven: its first outputs are judged as well, and
    if they are wrong it is not timed at all. device: where it gets its tensors, and what the clock
    waits for; it is set against that device's limit.
    """

    name: str
    build: Callable[[OpSpec, Call, Regime], Callable[[], Any] | Candidate]
    differentiable: bool = True
    loops: bool = False
    missing: str | None = None
    sample: Sample | None = None
    read: Callable[[Any], Any] = lambda output: output
    yardstick: bool = False
    unproven: bool = False
    note: str = ""
    device: str = "cpu"

    @classmethod
    def of(cls, peer: Peer) -> Entry:
        """The candidate that a peer is."""
        return cls(peer.name, peer.build, peer.differentiable, peer.loops, missing=peer.missing())


def measure(
    case: Case,
    entries: Sequence[Entry],
    *,
    subject: str = "fusedops",
    sample: Sample | None = None,
    seconds: float = 1.0,
    patience: float = 0.0,
    noise: float = NOISE,
    recording: bool = False,
    status: Callable[[str], None] = lambda text: None,
) -> Result:
    """Time the entries of a case together, then judge what they returned.

    Args:
        case: its shape is the name of a bench sample, unless ``sample`` is given.
        entries: the candidates.
        subject: the one that is timed twice a round, which tells how large the noise is.
        sample: what the case runs.
        seconds: of timing; warm-up, compilation and verification come on top.
        patience: seconds to spend on waiting for moments in which the machine is at its best.
        noise: the least that is taken for a difference, as a fraction.
        recording: run the forward pass with gradients enabled, as a user who forgot no_grad does.
        status: told what is happening.
    """
    spec = SPECS[case.op]
    sample = spec.sample(case.shape) if sample is None else sample
    with _conditions(case, recording or case.regime.work == "train"):
        here = [entry for entry in entries if entry.missing is None]  # the others' device is absent
        devices = dict.fromkeys(entry.device for entry in here) or {"cpu": None}
        own = next((e.device for e in here if e.name == subject), next(iter(devices)))
        limits = {device: _limit(device, spec, sample, case) for device in devices}
        run = _Run(spec, sample, case)
        calm = Calm(limits_of(case.threads), patience) if patience > 0.0 else None
        timed = run.time(entries, subject, seconds, calm, status)
        for device, limit in limits.items():
            again = _limit(device, spec, sample, case)
            limits[device] = min(limit, again, key=lambda one: one.seconds)
        status("verifying")
        rows = run.rows(entries, own, timed, limits)
    twin = timed.get(subject + TWIN)
    noise = noise if twin is None else timing.noise(timed[subject], twin, noise)
    dtype, passes = DTYPES[case.dtype], case.regime.passes
    trained = case.regime.work == "train" and case.op in MATMULS
    return Result(
        case=case,
        size=f"{case.op} {sample.size}",
        bytes=passes * sample.bytes_moved(dtype),
        flops=(3 if trained else passes) * sample.flops(),
        limit=limits[own],
        noise=noise,
        rows=tuple(_plausible(rows, entries, case, noise)),
        absent=run.absent,
        calm=None if calm is None else calm.share,
    )


def limit_now(case: Case) -> Entry:
    """A yardstick: the limit of a case as it is in each round, where that is its arithmetic.

    That of memory is none: a probe of so many bytes would take their place in the caches.
    """
    sample = SPECS[case.op].sample(case.shape)

    def build(spec: OpSpec, call: Call, regime: Regime) -> Candidate:
        limits, flops, dtype = limits_of(case.threads), sample.flops(), _arithmetic(sample, case)
        if _limit("cpu", spec, sample, case).seconds > flops / limits.fma(dtype):
            raise Unsupported("memory is the limit")
        return Candidate(lambda: None, seconds=lambda: limits.multiply_adds(flops, dtype))

    return Entry(LIMIT, build, yardstick=True, note="a yardstick")


@lru_cache
def limits_of(threads: int) -> Limits:
    """The limits of this process, the same ones at every call."""
    return Limits(threads)


@lru_cache
def limits_on(device: str) -> DeviceLimits:
    """Those of another device than the CPU."""
    return DeviceLimits(device)


class _Inputs:
    """The arguments of the calls of a case, what they are meant to be, and how they change."""

    def __init__(self, spec: OpSpec, sample: Sample, case: Case, device: str = "cpu") -> None:
        self.spec, self.flops = spec, sample.flops()
        self.call = on_device(sample.build(DTYPES[case.dtype]), device)
        # Weights and tables stay: a candidate may have packed them.
        self.moving = main_inputs(spec, self.call)
        self.leaves: tuple[Tensor, ...] = ()
        self.cotangents: tuple[Tensor, ...] = ()
        if case.regime.work == "train":
            learned = self.call.tensors if spec.name in MATMULS else self.moving
            self.leaves = tuple(t.requires_grad_() for t in learned if t.is_floating_point())
            with torch.no_grad():
                outputs = spec.run(spec.public(), self.call)
            g = torch.Generator().manual_seed(1)
            self.cotangents = tuple(
                torch.randn(y.shape, generator=g, dtype=torch.float32).to(y) for y in outputs
            )
        self.kept = [t.detach().to("cpu", copy=True) for t in self.call.tensors]

    def change(self, round: int) -> None:
        """Change one element of the moving tensors, in memory, where no version counter sees it."""
        for t, kept in zip(self.moving, self.kept, strict=False):
            if t.numel() == 0:
                continue
            index = torch.unravel_index(torch.tensor(round * 7919 % t.numel()), t.shape)
            where = tuple(int(i) for i in index)
            value = torch.tensor(0.5 + round % 128 / 128, dtype=t.dtype)
            for target in (t.detach(), kept):
                _write(target, where, value)

    def refill(self) -> None:
        """Give every tensor its values back, where no version counter sees it."""
        targets = tuple(t.detach() for t in self.call.tensors)
        with torch.autograd._unsafe_preserve_version_counter(targets):  # type: ignore[attr-defined]
            for t, kept in zip(targets, self.kept, strict=True):
                t.copy_(kept)

    def refill_warm(self) -> None:
        """``refill``, and what was filled is what the caches hold: a copy leaves half of each."""
        self.refill()
        for t in self.moving:
            t.sum()

    def changed(self, but: Sequence[Tensor] = ()) -> bool:
        """Whether a candidate wrote to a tensor that was not its to write."""
        return any(
            not torch.equal(t.detach().cpu(), kept)
            for t, kept in zip(self.call.tensors, self.kept, strict=True)
            if all(t is not other for other in but)
        )

    @cached_property
    def judge(self) -> Judge:
        """Of the values that the last round was given; to be used when the rounds are over."""
        kept = iter(self.kept)
        args = tuple(None if a is None else next(kept) for a in self.call.args)
        if self.some_rows is not None:
            x = self.kept[0]
            args = (x.reshape(-1, x.shape[-1])[self.some_rows], *args[1:])
        return Judge(self.spec, Call(args, self.call.kwargs))

    @cached_property
    def judge_gradients(self) -> GradientJudge:
        """The same for the gradients."""
        cotangents = [c.cpu() for c in self.cotangents]
        return GradientJudge(self.spec, self.judge.call, cotangents)

    @cached_property
    def some_rows(self) -> Tensor | None:
        """Of a matmul too large to check whole: the numbers of the rows that are checked."""
        rows = self.call.tensors[0].shape[:-1].numel()
        small = self.spec.name not in MATMULS or self.flops <= LARGE or rows <= SOME_ROWS
        if small or self.leaves:
            return None
        within = torch.randperm(rows - 2, generator=torch.Generator().manual_seed(rows)) + 1
        return torch.cat((torch.tensor([0, rows - 1]), within[: SOME_ROWS - 2]))


class _Run:
    """One case while it is measured."""

    def __init__(self, spec: OpSpec, sample: Sample, case: Case) -> None:
        self.spec, self.sample, self.case = spec, sample, case
        self.absent: dict[str, str] = {}
        self.faults: dict[str, str] = {}
        self._inputs: dict[tuple[Sample, str], _Inputs] = {}
        self._round = 0

    def inputs(self, entry: Entry) -> _Inputs:
        """What this entry is given."""
        key = entry.sample or self.sample, entry.device
        if key not in self._inputs:
            self._inputs[key] = _Inputs(self.spec, key[0], self.case, entry.device)
        return self._inputs[key]

    def time(
        self,
        entries: Sequence[Entry],
        subject: str,
        seconds: float,
        calm: Calm | None,
        status: Callable[[str], None],
    ) -> dict[str, Timed]:
        """All entries that can run, in interleaved rounds; fills absent and faults."""
        by_name = {entry.name: entry for entry in entries}
        candidates = {}
        for entry in entries:
            if entry.missing is not None:
                self.absent[entry.name] = entry.missing
                continue
            status(f"building {entry.name}")
            try:
                candidate = self._candidate(entry)
                fault = self._first_fault(entry, candidate) if entry.unproven else None
                if fault is None:
                    candidates[entry.name] = candidate
                else:
                    self.absent[entry.name] = f"{FAILED}: {fault}"
            except Unsupported as error:
                self.absent[entry.name] = str(error)
            except Exception as error:
                self._failed(entry.name, error)

        def check(name: str) -> None:
            """Whose the call was that has just ended, and what it must not have written."""
            inputs = self.inputs(by_name[name.removesuffix(TWIN)])
            overwritten = inputs.moving if self.case.regime.output == "in_place" else ()
            if inputs.changed(overwritten):
                self.faults.setdefault(name.removesuffix(TWIN), "it changed its inputs")
                inputs.refill()

        def before_first(name: str) -> None:
            status(f"warming up {name}")
            self.inputs(by_name[name]).refill()

        def keep(name: str, output: Any) -> Any:
            output = _copied(by_name[name.removesuffix(TWIN)].read(output))
            check(name)
            return output

        def new_round(round: int, last: bool) -> None:
            if round == 0:
                status("timing")
            for inputs in self._inputs.values():
                inputs.change(round)
                if last:  # nobody is judged by what another did to the inputs
                    inputs.refill()

        cold = self.case.regime.cache == "cold"
        return timing.interleaved(
            candidates,
            twin=subject,
            seconds=seconds,
            new_round=new_round,
            evict=timing.evictor(_C.last_cache_bytes()) if cold else None,
            calm=(lambda: None) if calm is None else calm.wait,
            keep=keep,
            before_first=before_first,
            after_first=check,
            on_error=self._failed,
        )

    def rows(
        self,
        entries: Sequence[Entry],
        device: str,
        timed: Mapping[str, Timed],
        limits: Mapping[str, Limit],
    ) -> list[Row]:
        """What each entry did, judged but not yet compared; device is the subject's."""
        scales = {
            e.name: self.sample.flops() / e.sample.flops() if e.sample else 1.0 for e in entries
        }
        rows = []
        for entry in entries:
            if entry.name not in timed:
                continue
            own = [timed[name] for name in (entry.name, entry.name + TWIN) if name in timed]
            scale = scales[entry.name]
            seconds = Quantiles.of([scale * s for one in own for s in one.seconds])
            verdict = _NOT_JUDGED if entry.yardstick else self._judged(entry, own)
            notes = [entry.note, f"runs 1/{scale:.0f} of it" if scale != 1.0 else ""]
            notes.append(self._rows_checked(entry))
            limit = limits[entry.device]
            if entry.device != device:
                notes.append(f"on {entry.device}, of whose limit: {limit.reason}")
            rows.append(
                Row(
                    candidate=entry.name,
                    seconds=seconds,
                    rounds=len(own[0].seconds),
                    first=own[0].first,
                    of_limit=limit.seconds / max(seconds.median, 1e-12),
                    error=verdict.error,
                    times_faster={
                        other: timing.ratios(own, timed[other], scale / scales[other])
                        for other in scales
                        if other in timed and other != entry.name
                    },
                    fault=self.faults.get(entry.name) or verdict.fault,
                    note="; ".join(note for note in notes if note),
                )
            )
        return rows

    def _candidate(self, entry: Entry) -> Candidate:
        inputs, regime = self.inputs(entry), self.case.regime
        if regime.work == "train" and not (entry.differentiable or entry.yardstick):
            raise Unsupported("it has no gradients")
        if regime.work == "loop" and not entry.loops:
            raise Unsupported("it has no decode loop")
        built = entry.build(self.spec, inputs.call, regime)
        if isinstance(built, Candidate):
            candidate = built
        elif regime.work == "train" and not entry.yardstick:
            candidate = Candidate(_with_backward(built, inputs))
        elif regime.output != "in_place" or entry.yardstick:
            candidate = Candidate(built)
        else:
            candidate = self._overwriting(entry, built, inputs)
        if entry.device == "cpu":
            return candidate
        return replace(candidate, synchronize=functools.partial(synchronize, entry.device))

    def _first_fault(self, entry: Entry, candidate: Candidate) -> str | None:
        """What is wrong with the outputs of the first call."""
        inputs = self.inputs(entry)
        verdict = self._judge(entry, _copied(entry.read(candidate.run())))
        for name in ("judge", "judge_gradients"):  # the inputs are going to change
            inputs.__dict__.pop(name, None)
        return verdict.fault

    def _overwriting(self, entry: Entry, built: Callable[[], Any], inputs: _Inputs) -> Candidate:
        """Its inputs are filled again before each measurement; of small ones there are copies."""
        size = sum(t.numel() * t.element_size() for t in inputs.moving)
        if size * COPIES > COPIED_BYTES or self.case.regime.cache == "cold":
            return Candidate(built, prepare=inputs.refill_warm)
        moving = [inputs.moving]
        runs = [built]
        for _ in range(COPIES - 1):
            copies = tuple(t.clone() for t in inputs.moving)
            args = (*copies, *inputs.call.args[len(copies) :])
            call = Call(args, inputs.call.kwargs)
            runs.append(self._thunk(entry.build(self.spec, call, self.case.regime)))
            moving.append(copies)

        def prepare() -> None:
            for tensors in moving:
                for t, kept in zip(tensors, inputs.kept, strict=False):
                    t.copy_(kept)

        return Candidate(built, batch=tuple(runs), prepare=prepare)

    @staticmethod
    def _thunk(built: Callable[[], Any] | Candidate) -> Callable[[], Any]:
        return built.run if isinstance(built, Candidate) else built

    def _failed(self, name: str, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        self.absent[name] = f"{FAILED}: {type(error).__name__}: {lines[0] if lines else ''}"

    def _judged(self, entry: Entry, own: Sequence[Timed]) -> Verdict:
        """Of the outputs of the last round, and of the twin's where they differ."""
        first = self._judge(entry, own[0].output)
        if len(own) == 1 or first.fault is not None or _same(own[0].output, own[1].output):
            return first
        again = self._judge(entry, own[1].output)
        return again if again.fault is not None or again.error > first.error else first

    def _judge(self, entry: Entry, output: Any) -> Verdict:
        inputs = self.inputs(entry)
        outputs = (output,) if isinstance(output, Tensor) else tuple(output or ())
        if inputs.some_rows is not None:
            cut, fault = _cut(inputs.call, outputs, inputs.some_rows)
            return inputs.judge(cut) if fault is None else Verdict(fault, math.inf, math.inf)
        if self.case.regime.work == "train":
            count = len(inputs.cotangents)
            forward, backward = (
                inputs.judge(outputs[:count]),
                inputs.judge_gradients(outputs[count:]),
            )
            return max((forward, backward), key=lambda v: (v.fault is not None, v.error))
        return inputs.judge(outputs)

    def _rows_checked(self, entry: Entry) -> str:
        inputs = self.inputs(entry)
        if entry.yardstick or inputs.some_rows is None:
            return ""
        rows = inputs.call.tensors[0].shape[:-1].numel()
        return f"{len(inputs.some_rows)} of {rows} rows checked"


_NOT_JUDGED = Verdict(None)


def _plausible(
    rows: Sequence[Row], entries: Sequence[Entry], case: Case, noise: float
) -> Iterator[Row]:
    """The rows, those refused that are faster than the limit or than all others by far."""
    yardsticks = {entry.name for entry in entries if entry.yardstick}
    # What another device's caches hold may be faster than its memory is.
    bound = {entry.name for entry in entries if entry.device == "cpu"}
    valid = [row for row in rows if row.fault is None and row.candidate not in yardsticks]
    for row in rows:
        bounded = row.candidate in bound
        found = _implausible(row, valid, case, noise, bounded) if row in valid else None
        if found is None:
            yield row
            continue
        kind, value, best, fault = found
        note = _explained(kind, value, best, case)
        if note is None:
            yield replace(row, fault=fault)
        else:
            yield replace(row, note="; ".join(text for text in (row.note, note) if text))


def _implausible(
    row: Row, valid: Sequence[Row], case: Case, noise: float, bounded: bool
) -> tuple[str, float, str, str] | None:
    """Kind, figure and rival of an explanation that is needed, and the fault without one.

    As for any difference, the whole interval must be beyond ten times and the noise.
    """
    if bounded and row.of_limit > 1.0 and not (case.op in MATMULS and has_matrix_unit()):
        share = f"{100 * row.of_limit:.4g}% of the limit"
        return "limit", row.of_limit, "", f"faster than this machine can be: {share}"
    others = [other for other in valid if other is not row and other.candidate in row.times_faster]
    if not others:
        return None
    best = min(others, key=lambda other: other.seconds.median)
    times = row.times_faster[best.candidate]
    least = times.p20 / (1.0 + noise)
    if least <= TOO_FAST:
        return None
    fault = f"{times.median:.3g} times faster than {best.candidate}, the best other candidate"
    return "10x", least, best.candidate, f"{fault}: that needs an explanation"


def _explained(kind: str, value: float, best: str, case: Case) -> str | None:
    for one in EXPLAINED:
        names = (one.op, one.shape, one.dtype, one.regime, one.best)
        values = (case.op, case.shape, case.dtype, str(case.regime), best)
        matches = all(fnmatch(v, glob) for v, glob in zip(values, names, strict=True))
        if one.kind == kind and matches and value <= one.up_to:
            return one.note
    return None


def _limit(device: str, spec: OpSpec, sample: Sample, case: Case) -> Limit:
    limits = limits_of(case.threads) if device == "cpu" else limits_on(device)
    dtype = DTYPES[case.dtype]
    written, flops = sample.bytes_written(dtype), sample.flops()
    read = sample.bytes_moved(dtype) - written
    matmul = case.op in MATMULS
    arithmetic = _arithmetic(sample, case)
    return limits.for_work(read, written, flops, arithmetic, case.regime, matmul=matmul)


def _arithmetic(sample: Sample, case: Case) -> str:
    """The dtype that is multiplied: of a quantized layer, not its input's."""
    return getattr(sample, "arithmetic", case.dtype)


@contextmanager
def _conditions(case: Case, recording: bool) -> Iterator[None]:
    """Instruction set, threads and grad mode of a case."""
    before = torch.get_num_threads()
    grad: AbstractContextManager[Any] = torch.enable_grad() if recording else torch.no_grad()
    kernels = nullcontext() if case.isa in DEVICES else fusedops.isa.use(case.isa)
    with kernels, grad:
        torch.set_num_threads(case.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _with_backward(forward: Callable[[], Any], inputs: _Inputs) -> Callable[[], tuple[Any, ...]]:
    leaves, cotangents = inputs.leaves, inputs.cotangents

    def run() -> tuple[Any, ...]:
        result = forward()
        outputs = (result,) if isinstance(result, Tensor) else tuple(result)
        return (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))

    return run


def _write(target: Tensor, where: tuple[int, ...], value: Tensor) -> None:
    """One element, where no version counter sees it."""
    if target.device.type == "cpu":
        _bits(target)[where] = _bits(value)
        return
    with torch.autograd._unsafe_preserve_version_counter((target,)):  # type: ignore[attr-defined]
        target[where] = value


def _bits(t: Tensor) -> Any:
    """The tensor's memory as an array of integers."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.view(integers[t.element_size()]).numpy()


def _copied(output: Any) -> Any:
    """What is there now; a result that is still being computed is caught unfinished."""
    if isinstance(output, (tuple, list)):
        return tuple(_copied(one) for one in output)
    return output.detach().to("cpu", copy=True) if type(output) is Tensor else output


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return False


def _cut(
    call: Call, outputs: tuple[Any, ...], rows: Tensor
) -> tuple[tuple[Tensor, ...], str | None]:
    """Some rows of a matmul's output, after a look at the shape of the whole; or a fault."""
    x, weight = call.tensors[:2]
    shape = (*x.shape[:-1], weight.shape[0])
    if len(outputs) != 1 or type(outputs[0]) is not Tensor:
        return (), f"it must return one plain torch.Tensor but returned {outputs!r:.80}"
    if outputs[0].shape != shape:
        return (), f"shape {[*outputs[0].shape]}, wanted {[*shape]}"
    return (outputs[0].reshape(-1, shape[-1])[rows],), None
