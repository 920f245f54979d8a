"""Interleaved timing: every candidate once per round, so that all see the same weather."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Quantiles:
    """Median, 20th and 80th percentile."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Quantiles:
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(values), fifths[3])


@dataclass(frozen=True)
class Measurement:
    """What one candidate did: seconds of every round, and what its last timed call returned."""

    first: float  # the very first call, compilation included
    seconds: list[float]
    output: Any

    def quantiles(self, scale: float = 1.0) -> Quantiles:
        return Quantiles.of([scale * s for s in self.seconds])

    def times_faster_than(self, other: Measurement, scale: float = 1.0) -> Quantiles:
        """Ratio of the two within each round, which is what noise from outside leaves alone."""
        pairs = zip(other.seconds, self.seconds, strict=True)
        return Quantiles.of([theirs / (scale * ours) for theirs, ours in pairs])


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    output = function()
    return time.perf_counter() - start, output


def _warm_up(function: Callable[[], Any], patience: float) -> tuple[float, float]:
    """Call until two calls in a row agree within 10%; returns the first and the last time."""
    first, _ = _timed(function)
    began = time.perf_counter()
    before, (last, _) = first, _timed(function)
    while abs(last - before) > 0.1 * before and time.perf_counter() - began < patience:
        before, (last, _) = last, _timed(function)
    return first, last


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    label: str = "",
    seconds: float = 3.0,
    least: int = 5,
    most: int = 50,
) -> dict[str, Measurement]:
    """Time all candidates in rounds (A B C, A B C, ...) after warming each of them up.

    As many rounds as fit into ``seconds``, but between ``least`` and ``most``.
    """
    warm = {
        name: _warm_up(candidates[name], patience=0.5)
        for name in tqdm(candidates, desc=f"{label}: warm-up", leave=False, disable=None)
    }
    fit = int(seconds / sum(last for _, last in warm.values()))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    outputs: dict[str, Any] = dict.fromkeys(candidates)
    for _ in tqdm(range(max(least, min(most, fit))), desc=label, leave=False, disable=None):
        for name, function in candidates.items():
            outputs[name] = None  # its memory is free again, as in a user's loop
            elapsed, outputs[name] = _timed(function)
            times[name].append(elapsed)
    return {name: Measurement(warm[name][0], times[name], outputs[name]) for name in candidates}
