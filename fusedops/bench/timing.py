"""The clock: candidates in interleaved rounds, so that all see the same weather.

The clock is taken when this module is imported, before any candidate is: a candidate that replaces
``time.perf_counter`` changes nothing here.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter as _now
from typing import Any, Literal

import torch

from fusedops.bench.record import Quantiles

__all__ = [
    "Candidate",
    "Timed",
    "batch",
    "evictor",
    "interleaved",
    "noise",
    "order",
    "ratios",
    "slower",
    "verdict",
]

TWIN = " (again)"  # behind the name of the candidate that is timed twice a round
SHORT = 1e-3  # seconds; of a batch, below which calls are repeated within one measurement
MOST_CALLS = 2000  # in a batch
PATIENCE = 0.5  # seconds of warm-up after the first call of a candidate
MOST_NOISE = 0.25  # that excuses a loss
SETTLE = 5e-3  # seconds; a call shorter than this is made once, untimed, before it is timed


@dataclass(frozen=True)
class Candidate:
    """What is timed.

    run: one call; returns its outputs. batch: the calls of one measurement, where they are not
    all ``run`` (each has a buffer of its own). prepare: called before each of them, untimed, with
    the outputs of the last one gone. around: entered, untimed, around each. seconds: the candidate
    says itself how long it took, because it is a probe that has its own clock. synchronize: waits
    for a device that works on after a call has returned; the clock runs until it is done.
    """

    run: Callable[[], Any]
    batch: tuple[Callable[[], Any], ...] = ()
    prepare: Callable[[], None] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    seconds: Callable[[], float] | None = None
    synchronize: Callable[[], None] | None = None


@dataclass
class Timed:
    """Seconds a call in every round, of the very first call, and what the last round returned."""

    first: float
    seconds: list[float] = field(default_factory=list)
    output: Any = None


def interleaved(
    candidates: Mapping[str, Candidate],
    *,
    twin: str | None = None,
    seconds: float = 1.0,
    least: int = 7,
    most: int = 100,
    new_round: Callable[[int, bool], None] = lambda round, last: None,
    evict: Callable[[], None] | None = None,
    calm: Callable[[], None] = lambda: None,
    keep: Callable[[str, Any], Any] = lambda name, output: output,
    before_first: Callable[[str], None] = lambda name: None,
    after_first: Callable[[str], None] = lambda name: None,
    on_error: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timed]:
    """Time all candidates in rounds after warming each of them up.

    As many rounds as fit into ``seconds``, but between ``least`` and ``most``. A call that is very
    short is repeated within a measurement, as often for every candidate of the case.

    Args:
        candidates: by name, in the order of the first round.
        twin: the one that is timed twice a round, the second time as ``twin + TWIN``.
        seconds: the time to spend on rounds.
        least: rounds.
        most: rounds.
        new_round: called before each round, untimed, with its number and whether it is the last: it
            changes the inputs.
        evict: called before each timed call, untimed: it empties the caches.
        calm: called before each measurement, untimed: it may wait for a better moment.
        keep: called with the candidate's name and its outputs of the last round right after the
            clock stopped; returns what is kept of them.
        before_first: called with the name of a candidate before its first call.
        after_first: called with the name of a candidate after its first call.
        on_error: called when a candidate fails in its warm-up, which then is left out; without it
            the error is raised.
    """
    timed: dict[str, Timed] = {}
    last: dict[str, float] = {}
    for name, candidate in candidates.items():
        before_first(name)
        try:
            timed[name], last[name] = _warm_up(name, candidate, after_first)
        except Exception as error:
            if on_error is None:
                raise
            on_error(name, error)
    names = list(timed)
    if not names:
        return {}
    if twin in timed:
        assert twin is not None
        names.append(twin + TWIN)
        timed[twin + TWIN], last[twin + TWIN] = Timed(timed[twin].first), last[twin]
    runs = {name: candidates[name.removesuffix(TWIN)] for name in names}

    calls = 1
    if evict is None and not any(c.prepare and not c.batch for c in runs.values()):
        calls = batch(last.values(), seconds / least)
    settles = {name: evict is None and last[name] < SETTLE for name in names}
    costs = sum(last[name] * (calls + settles[name]) for name in names)
    rounds = max(least, min(most, int(seconds / max(costs, 1e-9))))
    with _no_garbage_collection():
        for i in range(rounds):
            new_round(i, i == rounds - 1)
            for name in order(names, i):
                timed[name].output = None  # its memory is free again, as in a user's loop
                calm()
                elapsed, output = _measured(runs[name], calls, settles[name], evict)
                timed[name].seconds.append(elapsed)
                if i == rounds - 1:
                    timed[name].output = keep(name, output)
                del output
    return timed


def order(names: Sequence[str], round: int) -> list[str]:
    """Rotated, and backwards every other round: nobody is always first or follows the same one."""
    start = round // 2 % len(names)
    rotated = [*names[start:], *names[:start]]
    return rotated if round % 2 == 0 else rotated[::-1]


def batch(durations: Iterable[float], most_seconds: float = math.inf) -> int:
    """How many calls one measurement is: enough for the fastest candidate to take SHORT.

    Unless a round of that many calls of all would take longer than ``most_seconds``.
    """
    each = [max(duration, 1e-9) for duration in durations]
    calls = min(MOST_CALLS, math.ceil(SHORT / min(each)))
    return max(1, min(calls, int(min(most_seconds / sum(each), MOST_CALLS))))


def ratios(own: Sequence[Timed], other: Timed, scale: float = 1.0) -> Quantiles:
    """How many times faster own is than other, by the ratios within each round.

    own: one or both of a candidate and its twin. scale: of own over other, where they ran slices.
    """
    return Quantiles.of(
        [
            theirs / max(scale * ours, 1e-12)
            for timed in own
            for theirs, ours in zip(other.seconds, timed.seconds, strict=True)
        ]
    )


def noise(one: Timed, again: Timed, least: float) -> float:
    """How far apart one candidate is from itself, as a fraction; never below ``least``."""
    apart = ratios([one], again)
    return max(least, apart.p80 - 1.0, 1.0 / max(apart.p20, 1e-12) - 1.0)


def verdict(times_faster: Quantiles, noise: float) -> Literal["faster", "slower", "no difference"]:
    """Of the one whose ratios these are; a difference needs the whole interval beyond the noise."""
    if times_faster.p20 > 1.0 + noise:
        return "faster"
    if times_faster.p80 < 1.0 / (1.0 + noise):
        return "slower"
    return "no difference"


def slower(times_faster: Quantiles, noise: float) -> bool:
    """Whether the one whose ratios these are loses: for a gate, noise excuses only so much."""
    lost = times_faster.median * (1.0 + MOST_NOISE) < 1.0
    return lost or verdict(times_faster, noise) == "slower"


def evictor(cache_bytes: int) -> Callable[[], None]:
    """A function that reads, with all threads, twice what the last cache holds."""
    buffer = torch.ones(2 * max(cache_bytes, 1 << 20) // 4, dtype=torch.float32)
    return lambda: _use(buffer.sum())


def _use(value: torch.Tensor) -> None:
    if value.item() < 0.0:  # reads the sum back; it is positive
        raise AssertionError("the sum of ones is positive")


def _measured(
    candidate: Candidate, calls: int, settles: bool, evict: Callable[[], None] | None
) -> tuple[float, Any]:
    """Seconds a call, and what the last call returned."""
    if candidate.prepare is not None:
        candidate.prepare()
    if candidate.seconds is not None:
        return candidate.seconds(), None
    runs = candidate.batch or (candidate.run,) * calls
    finish = candidate.synchronize
    with candidate.around():
        if settles and candidate.prepare is None:
            candidate.run()
        if evict is not None:
            evict()
        if finish is not None:
            finish()  # what was queued before the clock starts is not this candidate's
        if len(runs) == 1:
            run = runs[0]
            start = _now()
            output = run()
            if finish is not None:
                finish()
            return _now() - start, output
        start = _now()
        for run in runs:
            output = run()
        if finish is not None:
            finish()
        return (_now() - start) / len(runs), output


def _warm_up(
    name: str, candidate: Candidate, after_first: Callable[[str], None]
) -> tuple[Timed, float]:
    """Call until two calls in a row agree within 10%; returns the last one's seconds as well."""
    before, _ = _measured(candidate, 1, False, None)
    timed = Timed(before)
    after_first(name)
    began = _now()
    last, _ = _measured(candidate, 1, False, None)
    while abs(last - before) > 0.1 * before and _now() - began < PATIENCE:
        before = last
        last, _ = _measured(candidate, 1, False, None)
    return timed, last


class _no_garbage_collection:
    """No collection between the clock's two readings."""

    def __enter__(self) -> None:
        self._was = gc.isenabled()
        gc.disable()

    def __exit__(self, *error: object) -> None:
        if self._was:
            gc.enable()
