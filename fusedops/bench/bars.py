"""The speed that must hold: every bar of the OpSpecs with its figure.

Bars on one shape, dtype, regime and number of threads share one interleaved run. A figure within a
tenth of its bound is taken up to twice more and the median counts: machines have slow phases.
Measurements wait for calm moments, ``PATIENCE`` seconds in a run: what a neighbour takes is not the
kernel's to give. A share of the arithmetic's limit is taken within each round.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

from fusedops.bench.counts import Counts, counts
from fusedops.bench.measure import LIMIT
from fusedops.bench.record import Case, Regime, Result, Row
from fusedops.bench.report import digits, table
from fusedops.bench.timing import slower
from fusedops.testing import SPECS, Bar, Linear

__all__ = ["Check", "candidates", "check", "figure", "grouped", "holds", "text"]

NEAR = 0.1  # of its bound: a figure this near is taken again
AGAIN = 2  # times at most
PATIENCE = 3.0  # seconds
NOT_SLOWER = "not slower"
AT_MOST = ("time", "counted", "us")  # kinds of bars whose figures must stay below the bound


@dataclass
class Check:
    """A bar and its figures; reason says why there are none."""

    op: str
    bar: Bar
    figures: list[float] = field(default_factory=list)
    verdicts: list[bool] = field(default_factory=list)
    fault: str | None = None  # of the subject: whatever its figure, the bar does not hold
    reason: str | None = None
    calm: list[float] = field(default_factory=list)  # of each figure: Result.calm
    counted: Counts | None = None  # what the bound was made of

    @property
    def figure(self) -> float | None:
        """The median of the figures."""
        return statistics.median(self.figures) if self.figures else None

    @property
    def state(self) -> str:
        """ok, FAILED or not measured."""
        if self.fault is not None:
            return "FAILED"
        if self.reason is not None:
            return "not measured"
        if self.bar.kind == NOT_SLOWER:  # by majority, and one of two is enough
            return "ok" if 2 * sum(self.verdicts) >= len(self.verdicts) else "FAILED"
        value = self.figure
        assert value is not None
        return "ok" if holds(self.bar, value) else "FAILED"

    @property
    def near(self) -> bool:
        """Whether one more measurement could turn the result."""
        value = self.figure
        if value is None or self.fault is not None:
            return False
        if self.bar.kind == NOT_SLOWER:
            return self.state == "FAILED" or value < self.bar.bound
        return abs(value / self.bar.bound - 1.0) < NEAR


def holds(bar: Bar, value: float) -> bool:
    """Whether a figure reaches, or stays below, what the bar wants."""
    return value <= bar.bound if bar.kind in AT_MOST else value >= bar.bound


def grouped(glob: str, ops: Iterable[str], threads: int, isa: str) -> dict[Case, list[Check]]:
    """The bars whose "op/shape" or shape matches, by the case that serves them."""
    groups: dict[Case, list[Check]] = {}
    for op in ops:
        for bar in SPECS[op].bars:
            if not any(fnmatch(name, glob) for name in (bar.shape, f"{op}/{bar.shape}", op)):
                continue
            case = Case(
                op, bar.shape, bar.dtype, Regime.parse(bar.regime), bar.threads or threads, isa
            )
            groups.setdefault(case, []).append(_check(op, bar, isa))
    return groups


def _check(op: str, bar: Bar, isa: str) -> Check:
    """The bar, with the bound that is counted where it has none of its own."""
    if bar.kind != "counted":
        return Check(op, bar)
    sample = SPECS[op].sample(bar.shape)
    assert isinstance(sample, Linear)
    counted = counts(sample.k, bar.dtype, isa)
    bound = math.nan if counted is None else counted.bound
    return Check(op, replace(bar, bound=bound), counted=counted)


def candidates(checks: Sequence[Check], every: Sequence[str], subject: str) -> list[str]:
    """What has to run for these bars, the subject or whoever stands for it first.

    Nothing else does: the caches are theirs. ``every`` is what "best" means.
    """
    names = {subject: None} if any(not one.bar.candidate for one in checks) else {}
    for one in checks:
        names |= dict.fromkeys([one.bar.candidate or subject, *_against(one.bar, every)])
    return list(names)


def check(
    checks: Sequence[Check],
    every: Sequence[str],
    subject: str,
    run: Callable[[], Result],
) -> None:
    """Measure the case of these bars, as often as a figure near its bound asks for."""
    for _ in range(1 + AGAIN):
        result = run()
        for one in checks:
            figure(one, result, every, subject)
        if not any(one.near for one in checks):
            return


def figure(one: Check, result: Result, every: Sequence[str], subject: str) -> None:
    """Add to a check what a measurement of its case says."""
    rows = {row.candidate: row for row in result.rows}
    subject = one.bar.candidate or subject
    one.calm += [] if result.calm is None else [result.calm]
    own = rows.get(subject)
    if own is None:
        one.reason = result.absent.get(subject, "it did not run")
        return
    if own.fault is not None:
        one.fault = own.fault
        return
    kind = one.bar.kind
    if math.isnan(one.bar.bound):
        one.reason = f"{result.case.isa} has no count of this loop: make instructions"
        return
    if kind == "us":
        one.figures.append(1e6 * own.seconds.median)
    elif kind == "limit" and LIMIT in own.times_faster:
        one.figures.append(own.times_faster[LIMIT].median)
    elif kind == "limit":
        # The limit is the best that was seen of the machine: so is what is held against it.
        one.figures.append(own.of_limit * own.seconds.median / max(own.seconds.p20, 1e-12))
    else:
        best = _best(one.bar, every, rows, own)
        if best is None:
            one.reason = _reason(one.bar, every, rows, result)
            return
        ratio = own.times_faster[best.candidate]
        one.figures.append(1.0 / ratio.median if kind in AT_MOST else ratio.median)
        one.verdicts.append(not slower(ratio, result.noise))


def text(checks: Sequence[Check]) -> str:
    """The bars as a table, and how many hold."""
    lines = []
    for one in checks:
        bar, value = one.bar, one.figure
        sign = "<=" if bar.kind in AT_MOST else ">="
        bound = "noise" if bar.kind == NOT_SLOWER else digits(bar.bound)
        lines.append(
            (
                one.state,
                "" if value is None else digits(value),
                f"{sign} {bound}",
                _what(bar),
                _case(one),
                _remarks(one),
            )
        )
    states = [one.state for one in checks]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("ok", "FAILED", "not measured"))
    return f"{table(('', 'figure', 'bound', 'of', 'case', 'remarks'), lines)}\n\n{counts}\n"


def _against(bar: Bar, every: Sequence[str]) -> list[str]:
    if bar.kind == "us":
        return []
    if bar.kind == "limit":
        return [LIMIT]
    return list(every) if bar.against == "best" else bar.against.split(",")


def _best(bar: Bar, every: Sequence[str], rows: dict[str, Row], own: Row) -> Row | None:
    """The fastest good row of those the bar names."""
    named = [rows[name] for name in _against(bar, every) if name in own.times_faster]
    good = [row for row in named if row.fault is None]
    return min(good, key=lambda row: row.seconds.median, default=None)


def _reason(bar: Bar, every: Sequence[str], rows: dict[str, Row], result: Result) -> str:
    def why(name: str) -> str:
        row = rows.get(name)
        return result.absent.get(name, "") if row is None else row.fault or ""

    return "; ".join(f"{name}: {why(name)}" for name in _against(bar, every))


def _what(bar: Bar) -> str:
    against = "the best other candidate" if bar.against == "best" else bar.against
    against = against.replace(",", " and ")
    if bar.kind in ("time", "counted"):
        return f"of the time of {bar.against}"
    return {
        "us": "us a call",
        "limit": "of the limit",
        "faster": f"times faster than {against}",
        NOT_SLOWER: f"not slower than {against}",
    }[bar.kind]


def _case(one: Check) -> str:
    bar = one.bar
    threads = "" if bar.threads is None else f", {bar.threads} thread{'s' * (bar.threads != 1)}"
    regime = f", {bar.regime}" if bar.regime else ""
    sample = SPECS[one.op].sample(bar.shape)
    candidate = f" {bar.candidate}" if bar.candidate else ""
    return f"{one.op}{candidate} {sample.size} {bar.dtype}{regime}{threads} ({bar.shape})"


def _remarks(one: Check) -> str:
    parts = [] if one.counted is None else [str(one.counted)]
    why = one.fault or one.reason
    if why is not None:
        parts.append(why)
    elif len(one.figures) > 1:
        figures = ", ".join(digits(v) for v in one.figures)
        parts.append(f"median of {len(one.figures)} runs: {figures}")
    if one.calm and one.state == "FAILED":
        parts.append(f"calm {100 * statistics.mean(one.calm):.0f}% of the time")
    return "; ".join(parts)
