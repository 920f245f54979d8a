"""Random shapes, seeded: the worst rows, and those that lose.

The shapes come from ``OpSpec.random``, primes and tails as well as round sizes, or from
``OpSpec.forms``: models' shapes in every layout. A row that loses is measured once more before it
counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import groupby

import torch

from fusedops.bench.record import Case, Quantiles, Regime, Result
from fusedops.bench.report import best_other, duration, percent, standing, table
from fusedops.bench.timing import slower, verdict
from fusedops.testing import SPECS, Sample

__all__ = ["Shape", "forms", "loses", "shapes", "text"]

WORST = 10  # rows of each table


@dataclass(frozen=True)
class Shape:
    """One case of a sweep, and the sample that it runs; compiled: torch.compile takes part."""

    case: Case
    sample: Sample
    compiled: bool = False


def shapes(
    op: str,
    count: int,
    seed: int,
    dtypes: Sequence[str],
    regime: Regime,
    threads: int,
    isa: str,
    part: tuple[int, int] = (1, 1),
) -> Iterator[Shape]:
    """That many in each dtype, the same ones for the same seed.

    part (k, n): the shapes k, k + n, k + 2n and so on, so that n runs make one sweep.
    """
    g = torch.Generator().manual_seed(seed)
    first, step = part
    samples = [SPECS[op].random(g) for _ in range(count)]
    for sample in samples[first - 1 :: step]:
        for dtype in dtypes:
            yield Shape(Case(op, sample.name, dtype, regime, threads, isa), sample)


def forms(
    op: str, glob: str, dtypes: Sequence[str], regime: Regime, threads: int, isa: str
) -> Iterator[Shape]:
    """Every shape in every layout and dtype, those whose name matches.

    Compiling takes seconds, once for each of them. So each shape is compiled in one of its forms,
    another one than the shape before: every form meets the compiler, and every shape.
    """
    of_shape = groupby(SPECS[op].forms, key=lambda sample: sample.name.rpartition("-")[0])
    for number, (_, layouts) in enumerate(of_shape):
        every = [(sample, dtype) for sample in layouts for dtype in dtypes]
        for place, (sample, dtype) in enumerate(every):
            case = Case(op, sample.name, dtype, regime, threads, isa)
            if fnmatch(sample.name.removeprefix("forms/"), glob):
                yield Shape(case, sample, compiled=place == number % len(every))


def loses(result: Result, subject: str) -> bool:
    """Whether the best other candidate is faster beyond noise, or the subject is refused."""
    own = next((row for row in result.rows if row.candidate == subject), None)
    if own is None or own.fault is not None:
        return True
    against = standing(result, subject)
    return against is not None and slower(against[1], result.noise)


def text(results: Sequence[Result], lost: Sequence[Result], subject: str) -> str:
    """The worst rows by speed against the best other candidate, and by the share of the limit."""
    of_limit = sorted(results, key=lambda r: _of_limit(r, subject))[:WORST]
    speed = sorted((r for r in results if standing(r, subject)), key=lambda r: _ratio(r, subject))
    parts = []
    if speed:
        parts += ["### Worst against the best other candidate", _table(speed[:WORST], subject)]
    parts += ["### Farthest from the limit", _table(of_limit, subject)]
    parts.append(
        f"{len(results)} cases, {len(lost)} of them lost"
        + "".join(f"\n  {r.case.op} {r.case.shape} {r.case.dtype}" for r in lost)
    )
    return "\n\n".join(parts)


def _table(results: Sequence[Result], subject: str) -> str:
    lines = []
    for result in results:
        own = next((row for row in result.rows if row.candidate == subject), None)
        best, against = best_other(result, subject), standing(result, subject)
        if own is None:
            cells = ("not run", "", "", "", result.absent.get(subject, ""))
        else:
            cells = (
                duration(own.seconds.median),
                "" if best is None else f"{best.candidate}, {duration(best.seconds.median)}",
                "" if against is None else _ratio_text(against[1], result.noise),
                percent(own.of_limit),
                own.fault or "verified",
            )
        lines.append((f"{result.size} {result.case.dtype}", *cells, result.case.shape))
    columns = ("case", subject, "best other", "times faster", "of limit", "", "shape")
    return table(columns, lines)


def _ratio_text(quantiles: Quantiles, noise: float) -> str:
    if slower(quantiles, noise):
        suffix = " LOSES"
    else:
        suffix = "" if verdict(quantiles, noise) == "faster" else " (no difference)"
    return f"{quantiles.median:.2f}{suffix}"


def _ratio(result: Result, subject: str) -> float:
    against = standing(result, subject)
    return 1.0 if against is None else against[1].median


def _of_limit(result: Result, subject: str) -> float:
    return next((row.of_limit for row in result.rows if row.candidate == subject), 0.0)
