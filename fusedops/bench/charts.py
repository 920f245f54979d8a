"""Results as pictures, PNG and SVG side by side. Each carries the digest of what it shows.

Colours are those of Okabe and Ito, which differ for colour-blind readers too; nothing is told by
colour alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedops.bench.record import Record, Result, Row, to_json
from fusedops.bench.report import digits, duration, machine_line

__all__ = ["digest_in", "ladder", "ladder_digest", "roofline", "roofline_digest"]

INK, GREY, PALE = "#222222", "#8a96a3", "#d5dae0"
OURS, BASELINES = "#d55e00", "#0072b2"
OUR_RUNGS, BASELINE_RUNGS = ("cpp_fused", "metal_fused"), ("eager", "compile")
DTYPE_COLOURS = {"f32": "#0072b2", "bf16": "#d55e00", "f16": "#009e73", "f64": "#cc79a7"}
LEVELS = ("DRAM", "L3", "L2")  # of memory that have a roof
UNITS = ("f32", "bf16", "int8")  # of arithmetic
OP_MARKERS = {
    "rope": "o",
    "rope_qk": "s",
    "gelu": "v",
    "linear": "^",
    "gelu_linear": "D",
    "gelu_linear_quantized": "P",
}
SLICE = "runs 1/"  # in the note of a row that ran a part of the case
MARK = "fusedops record "  # and the digest, in the file's metadata


def ladder(results: Sequence[Result], path: Path, heading: str = "") -> None:
    """A panel per case, dtypes side by side: a bar per rung on a log scale, the limit a line.

    path: without its suffix, or with one that is replaced; the folder is made.
    """
    panels: dict[str, dict[str, Result]] = {}
    for result in results:
        panels.setdefault(result.size, {})[result.case.dtype] = result
    dtypes = list(dict.fromkeys(result.case.dtype for result in results))
    # A rung has one height in all panels side by side.
    rungs = [
        list(dict.fromkeys(row.candidate for r in by_dtype.values() for row in r.rows))
        for by_dtype in panels.values()
    ]
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        len(panels),
        len(dtypes),
        figsize=(4.0 * len(dtypes), 0.26 * sum(map(len, rungs)) + 0.75 * len(panels) + 0.7),
        gridspec_kw={"height_ratios": [len(names) + 1.5 for names in rungs]},
        layout="constrained",
        squeeze=False,
    )
    for line, by_dtype, names in zip(axes, panels.values(), rungs, strict=True):
        for axis, dtype in zip(line, dtypes, strict=True):
            if dtype in by_dtype:
                _ladder_panel(axis, by_dtype[dtype], names, named=axis is line[0])
            else:
                axis.set_axis_off()
    figure.suptitle(heading, fontsize=9)
    figure.supxlabel(
        "time of a call, log scale; orange: fusedops, blue: PyTorch; dashed: the limit of this "
        "machine; hatched: a slice, scaled",
        fontsize=9,
    )
    _save(figure, path, ladder_digest(results, heading))


def ladder_digest(results: Sequence[Result], heading: str = "") -> str:
    """Of what ``ladder`` would draw."""
    return _digest(Record({"heading": heading}, {}, "ladder", tuple(results)))


def roofline(record: Record, path: Path) -> None:
    """Every row's flop/s over its flops per byte, under the measured roofs; ours filled.

    path: as for ``ladder``.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(10, 6.6), layout="constrained")
    points = [(r, row) for r in record.results for row in r.rows if row.fault is None and r.flops]
    if not points:
        raise ValueError("a roofline needs a row that is verified and does arithmetic")
    _roofline_points(axis, points)
    _roofs(axis, record.limits, points)
    axis.set_title(machine_line(record), loc="left", fontsize=9)
    axis.set_xlabel(
        "floating-point operations per byte read or written; "
        "bands: between the speeds of reading and of copying"
    )
    axis.set_ylabel("GFLOP/s")
    axis.spines[["top", "right"]].set_visible(False)
    _legend(axis, points)
    _save(figure, path, roofline_digest(record))


def roofline_digest(record: Record) -> str:
    """Of what ``roofline`` would draw."""
    return _digest(record)


def digest_in(path: Path) -> str | None:
    """The digest that a picture carries; None where there is none."""
    found = re.search(MARK.encode() + rb"([0-9a-f]{64})", path.read_bytes())
    return found[1].decode() if found else None


# --- the ladder -----------------------------------------------------------------------------------


def _ladder_panel(axis: Any, result: Result, rungs: Sequence[str], named: bool) -> None:
    rows = result.rows
    times = [row.seconds.median for row in rows]
    bars = axis.barh([rungs.index(row.candidate) for row in rows], times, height=0.72)
    for bar, row in zip(bars, rows, strict=True):
        colour = _rung_colour(row.candidate)
        bar.set(facecolor=colour if row.fault is None else "white", edgecolor="white")
        bar.set_hatch("////" if SLICE in row.note else "")
    labels = [duration(row.seconds.median) if row.fault is None else "REJECTED" for row in rows]
    axis.bar_label(bars, labels, padding=3, fontsize=8, color=INK)
    axis.axvline(result.limit.seconds, color=INK, linestyle="--", linewidth=1)
    axis.set_xscale("log")
    low, high = min([result.limit.seconds, *times]) / 2, max([result.limit.seconds, *times])
    axis.set_xlim(low, high * (high / low) ** 0.3)  # room for the label of the longest bar
    axis.xaxis.set_major_formatter(lambda seconds, _: duration(seconds))
    axis.xaxis.set_minor_formatter(lambda *_: "")
    axis.set_yticks(range(len(rungs)), rungs if named else [""] * len(rungs))
    axis.set_ylim(len(rungs) - 0.5, -0.5)
    axis.set_title(f"{result.size} {result.case.dtype}", loc="left", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def _rung_colour(name: str) -> str:
    if name in OUR_RUNGS:
        return OURS
    return BASELINES if name in BASELINE_RUNGS else GREY


# --- the roofline ---------------------------------------------------------------------------------


def _roofline_points(axis: Any, points: Sequence[tuple[Result, Row]]) -> None:
    # Ours last: on top of the others.
    for result, row in sorted(points, key=lambda point: _is_ours(point[1])):
        colour, ours = DTYPE_COLOURS[result.case.dtype], _is_ours(row)
        axis.plot(
            result.flops / result.bytes,
            result.flops / row.seconds.median / 1e9,
            linestyle="none",
            marker=OP_MARKERS[result.case.op],
            markersize=6.5 if ours else 4.5,
            markerfacecolor=colour if ours else "none",
            markeredgecolor="white" if ours else colour,
            markeredgewidth=0.6 if ours else 0.8,
            alpha=1.0 if ours else 0.55,
            zorder=4 if ours else 3,
        )
    axis.loglog()
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter("{x:g}")
    axis.grid(which="major", color=PALE, linewidth=0.5)
    axis.set_axisbelow(True)


def _is_ours(row: Row) -> bool:
    return row.candidate == "fusedops" or row.candidate in OUR_RUNGS


def _roofs(axis: Any, limits: Mapping[str, float], points: Sequence[tuple[Result, Row]]) -> None:
    """Memory: a band for each level, from its slower to its faster probe. Arithmetic: lines."""
    intensities = [result.flops / result.bytes for result, _ in points]
    rates = [result.flops / row.seconds.median / 1e9 for result, row in points]
    low, high = min(intensities) / 5, max(intensities) * 1.6  # room for labels on the left
    peaks = {unit: limits[f"fma {unit}"] / 1e9 for unit in UNITS if f"fma {unit}" in limits}
    top = max([*peaks.values(), *rates])
    for level in LEVELS:
        probes = [
            limits[f"{p} {level}"] / 1e9 for p in ("read", "copy") if f"{p} {level}" in limits
        ]
        if probes:
            _memory_roof(axis, level, min(probes), max(probes), low * 1.1, top)
    for unit, peak in peaks.items():
        ridge = peak / max([limits.get(f"read {level}", peak * 1e9) / 1e9 for level in LEVELS])
        colour = DTYPE_COLOURS.get(unit, GREY)
        axis.plot([ridge, high], [peak, peak], color=colour, linewidth=1.2, zorder=2)
        kind = "Gop/s" if unit == "int8" else "GFLOP/s"
        axis.text(
            high * 1.05,
            peak,
            f"{unit} {digits(peak)} {kind}",
            color=colour,
            fontsize=8,
            ha="left",
            va="center",
        )
    axis.set_xlim(low, high)
    axis.set_ylim(min(rates) / 2, top * 1.8)


def _memory_roof(
    axis: Any, level: str, slower: float, faster: float, at: float, top: float
) -> None:
    """Of rates in GB/s; its label begins at this intensity, on the upper edge."""
    start = at / 100
    corners = [(start, start * slower), (top / slower, top), (top / faster, top)]
    corners.append((start, start * faster))
    axis.fill(*zip(*corners, strict=True), facecolor=PALE, edgecolor=GREY, linewidth=0.9, zorder=1)
    axis.text(
        at,
        at * faster * 1.08,
        f"{level} {digits(slower)} to {digits(faster)} GB/s",
        fontsize=8,
        color=INK,
        rotation=math.degrees(math.atan(faster)),  # of the line, in the units of the axes
        rotation_mode="anchor",
        transform_rotates_text=True,
        va="bottom",
    )


def _legend(axis: Any, points: Sequence[tuple[Result, Row]]) -> None:
    """Colours are dtypes, shapes are ops, filled is ours; only what is drawn."""
    from matplotlib.lines import Line2D

    def entry(label: str, marker: str, colour: str, filled: bool = True) -> Any:
        face = colour if filled else "none"
        return Line2D(
            [],
            [],
            linestyle="none",
            marker=marker,
            markerfacecolor=face,
            markeredgecolor=colour,
            label=label,
        )

    ops = {result.case.op for result, _ in points}
    dtypes = {result.case.dtype for result, _ in points}
    entries = [
        entry("fusedops", "o", INK),
        entry("others", "o", INK, filled=False),
        *(entry(d, "o", c) for d, c in DTYPE_COLOURS.items() if d in dtypes),
        *(entry(op, m, GREY) for op, m in OP_MARKERS.items() if op in ops),
    ]
    axis.legend(handles=entries, fontsize=8, loc="lower right", frameon=True, ncols=2)


# --- files ----------------------------------------------------------------------------------------


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _digest(record: Record) -> str:
    return hashlib.sha256(to_json(record).encode()).hexdigest()


def _save(figure: Any, path: Path, digest: str) -> None:
    """As PNG and SVG; the same bytes for the same figure, so that only a new record is a change."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    text = MARK + digest
    with matplotlib.rc_context({"svg.hashsalt": "fusedops", "svg.fonttype": "none"}):
        figure.savefig(
            path.with_suffix(".png"), dpi=150, metadata={"Description": text, "Software": None}
        )
        figure.savefig(
            path.with_suffix(".svg"), metadata={"Description": text, "Date": None, "Creator": None}
        )
    _pyplot().close(figure)
