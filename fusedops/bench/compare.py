"""Two records: what became faster or slower beyond the noise of both.

Seconds of two runs are never compared: the machine has its moods. What is compared is how many
times faster the subject is than the best candidate that both records have; where they have none in
common, the share of the limit, which each run measured for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fusedops.bench.record import Case, Quantiles, Record, Result, Row
from fusedops.bench.report import OURS, YARDSTICKS, digits, percent, table

__all__ = ["Change", "compare", "same_class", "text"]

Kind = Literal["regressed", "improved", "same", "new", "gone"]


@dataclass(frozen=True)
class Change:
    """What became of a case. what: the figure compared, before and after; "" for new and gone."""

    case: Case
    size: str
    kind: Kind
    what: str = ""
    before: str = ""
    after: str = ""


def compare(
    old: Record, new: Record, subject: str = "fusedops", force: bool = False
) -> list[Change]:
    """Every case of either record, in the order of the new one; what is gone comes last.

    Raises:
        ValueError: the records are of different classes of machines, and force does not say that
            this is known.
    """
    if not force:
        same_class(old.machine, new.machine)
    before = {result.case: result for result in old.results}
    after = {result.case: result for result in new.results}
    changes = [
        _change(before[case], result, subject)
        if case in before
        else Change(case, result.size, "new")
        for case, result in after.items()
    ]
    gone = [Change(case, r.size, "gone") for case, r in before.items() if case not in after]
    return changes + gone


def same_class(old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Raise ValueError unless both fingerprints are of one class of machines."""
    classes = [machine.get("class", "unknown") for machine in (old, new)]
    if classes[0] != classes[1]:
        raise ValueError(
            f"[bench] records must be of one machine class but got {classes[0]} and {classes[1]} "
            "(--force compares them all the same)"
        )


def text(changes: list[Change]) -> str:
    """The changes as a table, cases that stayed the same only counted."""
    kinds: tuple[Kind, ...] = ("regressed", "improved", "new", "gone")
    lines = [
        (c.kind, f"{c.size} {c.case.dtype}, {c.case.regime}", c.what, c.before, c.after)
        for kind in kinds
        for c in changes
        if c.kind == kind
    ]
    counts = [(kind, sum(c.kind == kind for c in changes)) for kind in (*kinds, "same")]
    summary = ", ".join(f"{count} {kind}" for kind, count in counts)
    shown = table(("", "case", "figure", "before", "after"), lines) if lines else ""
    return f"{shown}\n\n{summary}\n" if shown else f"{summary}\n"


def _change(old: Result, new: Result, subject: str) -> Change:
    before, after = _row(old, subject), _row(new, subject)
    if before is None or after is None:
        kind: Kind = "same" if before is after else "new" if before is None else "gone"
        return Change(new.case, new.size, kind, subject)
    if before.fault is not None or after.fault is not None:
        return _faults(new, before.fault, after.fault)
    baseline = _best_common(old, new, subject)
    noise = (1.0 + old.noise) * (1.0 + new.noise)
    if baseline is None:
        what, one, other = "of the limit", _of_limit(before), _of_limit(after)
        shown = tuple(percent(q.median) for q in (one, other))
    else:
        what = f"times faster than {baseline}"
        one, other = before.times_faster[baseline], after.times_faster[baseline]
        shown = tuple(
            f"{digits(q.median)} ({digits(q.p20)} to {digits(q.p80)})" for q in (one, other)
        )
    kind = "same"
    if other.p80 * noise < one.p20:
        kind = "regressed"
    elif other.p20 > one.p80 * noise:
        kind = "improved"
    return Change(new.case, new.size, kind, what, *shown)


def _faults(new: Result, before: str | None, after: str | None) -> Change:
    kind: Kind = "same" if (before is None) == (after is None) else "improved"
    if before is None:
        kind = "regressed"
    return Change(new.case, new.size, kind, "verified", before or "yes", after or "yes")


def _row(result: Result, name: str) -> Row | None:
    return next((row for row in result.rows if row.candidate == name), None)


def _best_common(old: Result, new: Result, subject: str) -> str | None:
    """The candidate that was fastest before, of those that are good in both records."""
    good = [
        {row.candidate: row for row in result.rows if row.fault is None} for result in (old, new)
    ]
    own = [_row(result, subject) for result in (old, new)]
    common = [
        name
        for name in good[0]
        if name in good[1]
        and name not in (OURS if subject in OURS else (subject,))
        and name not in YARDSTICKS
        and all(row is not None and name in row.times_faster for row in own)
    ]
    return min(common, key=lambda name: good[0][name].seconds.median, default=None)


def _of_limit(row: Row) -> Quantiles:
    """The share of the limit as an interval, turned over as it goes with one over the time."""
    least = row.of_limit * row.seconds.median
    return Quantiles(*(least / s for s in (row.seconds.p80, row.seconds.median, row.seconds.p20)))
