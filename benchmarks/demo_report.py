"""The ladder's rows as a table (Markdown, also on the terminal) and as a bar chart."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from demo_ladder import BASELINE, Row
from timing import Quantiles

import fusedops
from fusedops import ladder
from fusedops.__main__ import cpu_name

COLOURS = {"cpp_fused": "#c44e52", "eager": "#4c72b0", "compile": "#4c72b0"}
OTHER = "#9aa5b1"
UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def machine() -> str:
    """What a reader needs to place the figures."""
    return (
        f"{cpu_name()}, {torch.get_num_threads()} threads, fusedops {fusedops.__version__} "
        f"({fusedops.isa.current()}), torch {torch.__version__}, {datetime.date.today()}"
    )


def duration(seconds: float) -> str:
    unit, size = next(((u, s) for u, s in UNITS if seconds >= s), UNITS[-1])
    return f"{digits(seconds / size)} {unit}"


def digits(value: float) -> str:
    """Three of them, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def rate(row: Row) -> str:
    """What the op's limit is made of: bytes for rope, flops for gelu_linear."""
    bytes_moved, flops = row.case.work
    if row.case.op == "rope":
        return f"{digits(bytes_moved / row.seconds.median / 1e9)} GB/s"
    return f"{digits(flops / row.seconds.median / 1e9)} GFLOP/s"


def ratio(speedup: Quantiles) -> str:
    """The median, or that the interval says nothing."""
    if speedup.p20 <= 1.0 <= speedup.p80:
        return "no difference"
    return f"{speedup.median:.2f}" if speedup.median >= 0.1 else f"{speedup.median:.1g}"


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read as it is."""
    cells = [columns, *lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    padded = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (padded[0], rule, *padded[1:]))


def case_table(rows: Sequence[Row]) -> str:
    """The table of one case, under its title, with the rungs that this machine cannot run."""
    case = rows[0].case
    lines = [_line(row) for row in rows]
    lines += [
        (rung.name, "not run", "", "", "", rung.unavailable)
        for rung in ladder.rungs(case.op)
        if rung.unavailable is not None
    ]
    columns = ("rung", "time (p20 to p80)", "x eager", "rate", "of limit", "remarks")
    limit = f"Limit: {duration(rows[0].limit.seconds)} ({rows[0].limit.reason})."
    return f"### {case.title}\n\n{limit}\n\n{table(columns, lines)}\n"


def _line(row: Row) -> tuple[str, ...]:
    remarks = []
    if row.scale != 1.0:
        remarks.append(f"ran 1/{row.scale:.0f} of it, scaled")
    if row.rung == "compile":
        remarks.append(f"first call {duration(row.first)}")
    remarks.append("verified" if row.fault is None else f"REJECTED: {row.fault}")
    q = row.seconds
    return (
        row.rung,
        f"{duration(q.median)} ({duration(q.p20)} to {duration(q.p80)})",
        "1" if row.rung == BASELINE else ratio(row.speedup),
        rate(row),
        f"{100.0 * row.of_limit:.0f}%" if row.of_limit >= 0.01 else "< 1%",
        "; ".join(remarks),
    )


def document(rows: Sequence[Row]) -> str:
    """docs/ladder.md."""
    cases = [case_table(list(group)) for _, group in groupby(rows, key=lambda row: row.case.title)]
    return "\n".join(
        (
            "# The ladder\n",
            "Written by `python benchmarks/demo.py --save-docs`; do not edit. Each rung allocates",
            "its output. All of a case were timed in one interleaved run; the very outputs timed",
            "were then checked against float64, every element. Rates count each byte of input and",
            "output once, and the operations of the formula.\n",
            f"{machine()}\n",
            "![times of all rungs](ladder.png)\n",
            *cases,
        )
    )


README_BEGIN, README_END = "<!-- ladder: written by --save-docs -->", "<!-- /ladder -->"


def with_ladder(readme: str, rows: Sequence[Row]) -> str:
    """README.md with the float32 tables of the article's two sizes between its markers."""
    before, rest = readme.split(README_BEGIN)
    after = rest.split(README_END)[1]
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.case.title)]
    shown = [case_table(group) for group in groups if group[0].case.dtype == "f32"][:2]
    block = "\n".join((README_BEGIN, f"\n{machine()}:\n", *shown))
    return f"{before}{block}\n{README_END}{after}"


def chart(rows: Sequence[Row], path: Path) -> None:
    """One panel per case, dtypes side by side: a bar per rung on a log scale, the limit a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        panels.setdefault(row.case.size, {}).setdefault(row.case.dtype, []).append(row)
    dtypes = list(dict.fromkeys(row.case.dtype for row in rows))
    figure, axes = pyplot.subplots(
        len(panels),
        len(dtypes),
        figsize=(4.2 * len(dtypes), 2.1 * len(panels) + 0.6),
        layout="constrained",
        squeeze=False,
    )
    for line, by_dtype in zip(axes, panels.values(), strict=True):
        for axis, dtype in zip(line, dtypes, strict=True):
            _panel(axis, by_dtype[dtype])
    figure.suptitle(machine(), fontsize=9)
    figure.supxlabel(
        "time on a log scale; dashed line: the limit of this machine; hatched: a slice, scaled",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axis: Any, rows: Sequence[Row]) -> None:
    names = [row.rung for row in rows]
    times = [row.seconds.median for row in rows]
    bars = axis.barh(names, times, color=[COLOURS.get(name, OTHER) for name in names])
    for bar, row in zip(bars, rows, strict=True):
        bar.set_hatch("///" if row.scale != 1.0 else "")
    axis.bar_label(bars, [f" {duration(time)}" for time in times], fontsize=8)
    axis.axvline(rows[0].limit.seconds, color="black", linestyle="--", linewidth=1)
    axis.set_xscale("log")
    low, high = min(rows[0].limit.seconds, *times) / 2, max(times)
    axis.set_xlim(low, high * (high / low) ** 0.25)  # room for the label of the longest bar
    axis.xaxis.set_major_formatter(lambda seconds, _: duration(seconds))
    axis.xaxis.set_minor_formatter(lambda *_: "")
    axis.invert_yaxis()
    axis.set_title(rows[0].case.title, loc="left", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
