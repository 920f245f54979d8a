"""Results as tables: Markdown that also reads well on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fusedops.bench.record import STEPS, Quantiles, Record, Regime, Result, Row
from fusedops.bench.timing import TWIN, verdict

__all__ = [
    "OURS",
    "YARDSTICKS",
    "best_other",
    "case_table",
    "digits",
    "duration",
    "limits_table",
    "machine_line",
    "merit",
    "percent",
    "ratio",
    "short",
    "standing",
    "summary",
    "table",
    "title",
]

BASELINE = "eager"
UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))
# Timed beside the candidates, but no rival of any of them: see best_other.
YARDSTICKS = frozenset({"copy", "fresh_copy", "two_calls", "unfused", "linear", "kernel", "limit"})
# The peers that are ours; none is a rival of another, for a user has to ask for a packed weight.
OURS = ("fusedops", "packed", "plan")
LEVELS = ("L1", "L2", "L3", "L4", "DRAM")
FAR = 0.7  # of the limit; below it a row counts as far from it
CALL = 1e-5  # seconds; a limit below it says nothing, the price of the call does


# --- figures --------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """Three of them, without an exponent where that can be avoided."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """In the largest unit of which there is at least one."""
    rounded = float(f"{seconds:.3g}")  # 999.9 us is 1 ms
    unit, size = next(((u, s) for u, s in UNITS if rounded >= s), UNITS[-1])
    return f"{digits(seconds / size)} {unit}"


def percent(fraction: float) -> str:
    """A share of the limit; small ones are not told apart."""
    return f"{100.0 * fraction:.0f}%" if fraction >= 0.01 else "< 1%"


def ratio(quantiles: Quantiles, noise: float) -> str:
    """How many times faster: the median, or that the interval says nothing."""
    if verdict(quantiles, noise) == "no difference":
        return "no difference"
    return _times(quantiles.median)


def rate(result: Result, seconds: float) -> str:
    """Of what the case's limit is made of: bytes, or operations."""
    if result.limit.seconds == 0:
        return ""
    if "operations" in result.limit.reason:
        return f"{digits(result.flops / seconds / 1e9)} GFLOP/s"
    return f"{digits(result.bytes / seconds / 1e9)} GB/s"


def _times(value: float) -> str:
    if value >= 100:
        return digits(value)
    return f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"


# --- who against whom -----------------------------------------------------------------------------


def best_other(result: Result, subject: str = "fusedops") -> Row | None:
    """The fastest row that is neither the subject (nor its twin) nor refused nor a yardstick.

    Where the subject is ours, our other ways to call are no rivals.
    """
    rivals = [
        row
        for row in result.rows
        if row.fault is None
        and row.candidate not in YARDSTICKS
        and row.candidate.removesuffix(TWIN) not in (OURS if subject in OURS else (subject,))
    ]
    return min(rivals, key=lambda row: row.seconds.median, default=None)


def standing(result: Result, subject: str = "fusedops") -> tuple[str, Quantiles] | None:
    """The best other candidate and how many times faster the subject is; None without the two."""
    own, other = _row(result, subject), best_other(result, subject)
    if own is None or other is None or other.candidate not in own.times_faster:
        return None
    return other.candidate, own.times_faster[other.candidate]


def falls_short(result: Result, subject: str = "fusedops") -> bool:
    """Whether the subject is refused, loses, or is far from a limit that is more than a call."""
    own, against = _row(result, subject), standing(result, subject)
    if own is None:
        return False
    loses = against is not None and verdict(against[1], result.noise) == "slower"
    far = own.of_limit < FAR and result.limit.seconds >= CALL
    return own.fault is not None or loses or far


def _row(result: Result, candidate: str) -> Row | None:
    return next((row for row in result.rows if row.candidate == candidate), None)


# --- one case -------------------------------------------------------------------------------------


def title(result: Result) -> str:
    """Size, dtype, and what is not the plain forward pass."""
    return f"{result.size} {result.case.dtype}{_regime(result.case.regime)}"


def case_table(result: Result, subject: str = "fusedops", rivals: bool = True) -> str:
    """The table of one case under its title, with what did not run; ends in a newline.

    The columns "x eager" and "subject vs it" are how many times faster the row is than eager, and
    the subject than the row. Where a column has nothing to say in any row it is left out.
    rivals: False where the rows are ways to call one thing, among which nobody wins or loses.
    """
    own = _row(result, subject)
    lines = [_cells(result, row, own, rivals) for row in result.rows]
    lines += [(name, "not run", *[""] * 5, reason) for name, reason in result.absent.items()]
    columns = (
        "candidate",
        "time (p20 to p80)",
        f"x {BASELINE}",
        f"{subject} vs it",
        "rate",
        "of limit",
        "error / bound",
        "remarks",
    )
    used = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    shown = table([columns[i] for i in used], [[line[i] for i in used] for line in lines])
    conclusion = _conclusion(result, subject) if rivals else ""
    parts = (f"### {title(result)}", _preface(result), shown, conclusion)
    return "\n\n".join(part for part in parts if part) + "\n"


def _preface(result: Result) -> str:
    case, threads = result.case, "thread" if result.case.threads == 1 else "threads"
    limit = f"Limit: {duration(result.limit.seconds)} ({result.limit.reason})."
    return (
        f"{limit} Shape {case.shape}, {case.threads} {threads}, {case.isa}; "
        f"within {100.0 * result.noise:.0f}% nothing is a difference."
    )


def _cells(result: Result, row: Row, own: Row | None, rivals: bool) -> tuple[str, ...]:
    q, baseline = row.seconds, row.times_faster.get(BASELINE)
    if row.candidate == BASELINE:
        against_baseline = "1"
    else:
        against_baseline = ratio(baseline, result.noise) if baseline else ""
    against_own = own.times_faster.get(row.candidate) if own is not None else None
    marked = _marked if rivals else ratio
    return (
        row.candidate,
        f"{duration(q.median)} ({duration(q.p20)} to {duration(q.p80)})",
        against_baseline,
        marked(against_own, result.noise) if against_own and row.fault is None else "",
        rate(result, q.median),
        percent(row.of_limit),
        "" if row.candidate in YARDSTICKS else f"{row.error:.2g}",
        "; ".join(_remarks(row)),
    )


def _marked(quantiles: Quantiles, noise: float) -> str:
    loses = verdict(quantiles, noise) == "slower"
    return f"{ratio(quantiles, noise)}{' LOSES' if loses else ''}"


def _remarks(row: Row) -> Iterable[str]:
    if row.note:
        yield row.note
    if row.first >= 0.01 and row.first >= 5 * row.seconds.median:
        yield f"first call {duration(row.first)}"
    if row.fault is not None:
        yield f"REJECTED: {row.fault}"
    elif row.candidate not in YARDSTICKS:
        yield "verified"


def _conclusion(result: Result, subject: str) -> str:
    own, against = _row(result, subject), standing(result, subject)
    if own is None:
        return ""
    if own.fault is not None:
        return f"{subject} is REJECTED."
    if against is None:
        return ""
    name, quantiles = against
    if verdict(quantiles, result.noise) == "no difference":
        return f"{subject} and {name}, the best other candidate: no difference."
    loses = verdict(quantiles, result.noise) == "slower"
    return (
        f"{subject} {'LOSES to' if loses else 'against'} {name}, the best other candidate: "
        f"{_times(quantiles.median)} times its speed "
        f"({_times(quantiles.p20)} to {_times(quantiles.p80)})."
    )


# --- many cases -----------------------------------------------------------------------------------


def summary(results: Iterable[Result], subject: str = "fusedops") -> str:
    """One line a case: the subject, the best other candidate by name, and the limit."""
    columns = ("case", subject, "best other", "times faster", "of limit", "shape")
    lines = [_summary_line(r, subject) for r in results if _row(r, subject) is not None]
    return table(columns, lines) if lines else ""


def short(results: Iterable[Result], subject: str = "fusedops") -> str:
    """As ``summary``, of the cases that are lost, refused or far from the limit, worst first."""
    return summary(
        sorted((r for r in results if falls_short(r, subject)), key=lambda r: merit(r, subject)),
        subject,
    )


def merit(result: Result, subject: str = "fusedops") -> float:
    """A case's place among the worst, lowest first: refused, lost, then far from the limit."""
    own, against = _row(result, subject), standing(result, subject)
    if own is None or own.fault is not None:
        return 0.0
    loses = against is not None and verdict(against[1], result.noise) == "slower"
    return (against[1].median if against and loses else 1.0) * min(own.of_limit, 1.0)


def _summary_line(result: Result, subject: str) -> tuple[str, ...]:
    own, other = _row(result, subject), best_other(result, subject)
    against = standing(result, subject)
    assert own is not None  # of the results that have one
    return (
        title(result),
        duration(own.seconds.median) if own.fault is None else f"REJECTED: {own.fault}",
        f"{other.candidate}, {duration(other.seconds.median)}" if other else "",
        _marked(against[1], result.noise) if against and own.fault is None else "",
        percent(own.of_limit),
        result.case.shape,
    )


# --- the machine ----------------------------------------------------------------------------------


def machine_line(record: Record) -> str:
    """What a reader needs to place the figures; says so when the run was interrupted."""
    m = record.machine
    line = (
        f"{m['cpu']}, {m['threads']} threads, fusedops {m['fusedops']} ({m['isa']}), "
        f"torch {m['torch']}, {m['date']}"
    )
    return f"{line} (PARTIAL: the run was interrupted)" if record.partial else line


def limits_table(limits: Mapping[str, float]) -> str:
    """The measured limits of the machine: the speeds of its memory by level, then all others."""
    levels = [level for level in LEVELS if any(name.endswith(f" {level}") for name in limits)]
    memory = dict.fromkeys(n.rpartition(" ")[0] for n in limits if n.rpartition(" ")[2] in levels)
    shown = {f"{probe} {level}" for probe in memory for level in levels}
    grid = [[p, *(_limit(f"{p} {level}", limits) for level in levels)] for p in memory]
    others = [[name, _limit(name, limits)] for name in limits if name not in shown]
    tables = ((["memory", *levels], grid), (["limit", "measured"], others))
    return "\n\n".join(table(columns, lines) for columns, lines in tables if lines)


def _limit(name: str, limits: Mapping[str, float]) -> str:
    unit = "GB/s"
    if name.startswith("fma "):
        unit = "Gop/s" if "int" in name else "GFLOP/s"
    return f"{digits(limits[name] / 1e9)} {unit}" if name in limits else ""


# --- layout ---------------------------------------------------------------------------------------


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read as it is. A cell's "|" is escaped."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (columns, *lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    padded = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (padded[0], rule, *padded[1:]))


def _regime(regime: Regime) -> str:
    """In words, after a comma each; nothing for a forward pass with fresh outputs, warm."""
    words = {
        "forward and backward": regime.work == "train",
        f"{STEPS} compiled decode steps": regime.work == "loop",
        "given output": regime.output == "given",
        "in place": regime.output == "in_place",
        "cold caches": regime.cache == "cold",
    }
    return "".join(f", {word}" for word, holds in words.items() if holds)
