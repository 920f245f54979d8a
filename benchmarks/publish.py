"""Write the figures of the documents from the records in benchmarks/results, or say what is stale.

    make docs                                   or: python benchmarks/publish.py
    python benchmarks/publish.py --check        writes nothing; exits 1 when something is stale

No table of README.md, docs/performance.md, docs/ladder.md, docs/cases.md and docs/accuracy.md is
typed: they come from here, and a test compares them. Records of one class of machine count as
one; the class with the most cases is the one that is shown in full.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import cleandoc
from pathlib import Path

import accuracy

from fusedops.bench import bars, calls, charts, ladder, report
from fusedops.bench.peers import PEERS
from fusedops.bench.record import Case, Record, Result, load
from fusedops.testing import SPECS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCKS = {  # between markers, by document
    "README.md": ("readme",),
    "docs/performance.md": (
        "limits",
        "peers",
        "bars",
        "ops",
        "calls",
        "short",
        "sweep",
        "machines",
    ),
}
NOTHING = "No run is on record yet."
WORST = 20  # shapes of a sweep


# --- what is published ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A chart: where it lies (without suffix), what it must carry, and how it is drawn."""

    path: Path
    digest: str
    draw: Callable[[], None]


def read_records(folder: Path = RESULTS) -> list[Record]:
    """One for each class of machine, in the order in which they are published."""
    return merged([load(path) for path in sorted(folder.glob("*.json"))])


def merged(records: Iterable[Record]) -> list[Record]:
    """Those of one class of machine as one; the one with the most cases first."""
    classes: dict[str, list[Record]] = {}
    for record in records:
        classes.setdefault(record.machine["class"], []).append(record)
    return sorted(map(_merge, classes.values()), key=lambda record: -len(record.results))


def _merge(parts: Sequence[Record]) -> Record:
    """Several runs on one class of machine.

    Where the fingerprints differ all values are named. Noise only slows a probe down, so the best
    limit is the right one.
    """
    keys = dict.fromkeys(key for part in parts for key in part.machine)
    values = {key: dict.fromkeys(p.machine[key] for p in parts if key in p.machine) for key in keys}
    limits: dict[str, float] = {}
    for part in parts:
        limits |= {name: max(v, limits.get(name, v)) for name, v in part.limits.items()}
    return Record(
        {key: ", ".join(found) for key, found in values.items()},
        limits,
        "; ".join(part.command for part in parts),
        tuple(result for part in parts for result in part.results),
        any(part.partial for part in parts),
    )


def texts(records: Sequence[Record], root: Path = ROOT) -> dict[Path, str]:
    """What each document must be."""
    blocks = _blocks(records)
    written = {
        root / path: with_blocks((root / path).read_text(), {name: blocks[name] for name in names})
        for path, names in BLOCKS.items()
    }
    main = records[0] if records else None
    written[root / "docs/ladder.md"] = _ladder_page(main)
    written[root / "docs/cases.md"] = _cases_page(main)
    written[root / "docs/accuracy.md"] = accuracy.page()
    return written


def pictures(records: Sequence[Record], root: Path = ROOT) -> list[Picture]:
    """The charts of the first record that there is something to draw for."""
    if not records:
        return []
    main, found = records[0], []
    rungs, heading = ladder_results(main), report.machine_line(main)
    others = replace(main, results=tuple(op_results(main)))
    if rungs:
        path = root / "docs/ladder"
        found.append(
            Picture(
                path,
                charts.ladder_digest(rungs, heading),
                lambda: charts.ladder(rungs, path, heading),
            )
        )
    if others.results:
        roof = root / "docs/roofline"
        found.append(
            Picture(roof, charts.roofline_digest(others), lambda: charts.roofline(others, roof))
        )
    return found


def stale(records: Sequence[Record], root: Path = ROOT) -> list[str]:
    """One line for each file that is not what the records say."""
    lines = [
        f"{path.relative_to(root)} is not what benchmarks/results says"
        for path, text in texts(records, root).items()
        if not path.exists() or path.read_text() != text
    ]
    for picture in pictures(records, root):
        for path in (picture.path.with_suffix(suffix) for suffix in (".png", ".svg")):
            if not path.exists() or charts.digest_in(path) != picture.digest:
                lines.append(f"{path.relative_to(root)} was drawn from another record")
    return lines


# --- which results belong where -------------------------------------------------------------------


def ladder_results(record: Record) -> list[Result]:
    """The cases whose candidates are rungs."""
    return [r for r in record.results if any(row.candidate == ladder.SUBJECT for row in r.rows)]


def calls_results(record: Record) -> list[Result]:
    """The cases whose candidates are ways to call."""
    return [r for r in record.results if any(row.candidate == calls.SUBJECT for row in r.rows)]


def sweep_results(record: Record) -> list[Result]:
    """The cases of random shapes, and of every layout."""
    return [r for r in record.results if r.case.shape.startswith(("random/", "forms/"))]


def op_results(record: Record) -> list[Result]:
    """The named shapes; where a case was run twice, the run with more candidates."""
    return [runs[0] for runs in _runs(record).values()]


def _runs(record: Record) -> dict[Case, list[Result]]:
    """All runs of each named shape, that with the most candidates first."""
    other = (*ladder_results(record), *calls_results(record), *sweep_results(record))
    runs: dict[Case, list[Result]] = {}
    for result in record.results:
        if not any(result is one for one in other):
            runs.setdefault(result.case, []).append(result)
    return {case: sorted(found, key=lambda r: -len(r.rows)) for case, found in runs.items()}


# --- blocks ---------------------------------------------------------------------------------------


def with_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """The text with what stands between its markers replaced; each block has one place."""
    for name, block in blocks.items():
        begin, end = f"<!-- generated: {name} -->\n", "<!-- /generated -->"
        if text.count(begin) != 1:
            raise ValueError(f"the marker {begin.strip()} must be there once")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{block}\n\n{end}{rest.partition(end)[2]}"
    return text


def _blocks(records: Sequence[Record]) -> dict[str, str]:
    """By name: what stands between the markers."""
    blocks = {name: NOTHING for names in BLOCKS.values() for name in names}
    blocks["peers"] = report.table(
        ("candidate", "what it is"),
        [(f"`{peer.name}`", _without_versions(peer.description)) for peer in PEERS.values()],
    )
    if not records:
        return blocks
    main = records[0]
    named = op_results(main)
    return blocks | {
        "readme": _readme_block(main),
        "limits": f"{report.machine_line(main)}:\n\n{report.limits_table(main.limits)}",
        "ops": _ops_block(main, named),
        "bars": _bars_block(main),
        "calls": _calls_block(calls_results(main)),
        "short": report.short(named) or "There are none.",
        "sweep": _sweep_block(sweep_results(main)),
        "machines": _machines_block(records[1:]),
    }


def _without_versions(text: str) -> str:
    """What is installed here is no property of the document."""
    return re.sub(r" \d+\.[\w.+]*\w", "", text)


def _readme_block(record: Record) -> str:
    first: dict[str, Result] = {}  # of each op, in f32
    for result in ladder_results(record):
        if result.case.dtype == "f32":
            first.setdefault(result.case.op, result)
    parts = [f"{report.machine_line(record)}:"]
    if first:
        parts.append("![times of all rungs](docs/ladder.png)")
        parts += [report.case_table(result, ladder.SUBJECT).rstrip() for result in first.values()]
    return "\n\n".join(parts)


def _ops_block(record: Record, results: Sequence[Result]) -> str:
    parts = [f"{report.machine_line(record)}:"]
    for op in SPECS:
        of_op = [result for result in results if result.case.op == op]
        if of_op:
            parts.append(f"### {op}\n\n{report.summary(of_op)}")
    if results:
        parts.append("![every row under the machine's limits](roofline.png)")
    return "\n\n".join(parts)


def _calls_block(results: Sequence[Result]) -> str:
    tables = [report.case_table(result, calls.SUBJECT, rivals=False) for result in results]
    tables.append(calls.text(results))
    return "\n\n".join(text.rstrip() for text in tables if text) or "No calls are on record."


def _machines_block(records: Sequence[Record]) -> str:
    parts = [
        f"{report.machine_line(record)}:\n\n{report.summary(op_results(record))}"
        for record in records
    ]
    return "\n\n".join(parts) or "No other machine is on record."


def _bars_block(record: Record) -> str:
    """Each bar with its figure: the median of all runs of its case that have what it compares."""
    runs = _runs(record)
    threads = max((case.threads for case in runs), default=1)
    every = [name for name in PEERS if name not in report.OURS]
    checks = []
    for case, wanted in bars.grouped("*", SPECS, threads, record.machine["isa"]).items():
        for check in wanted:
            check.reason = "not on record"
            for result in runs.get(case, []):
                one = bars.Check(check.op, check.bar)
                bars.figure(one, result, every, "fusedops")
                if one.reason is None:
                    check.reason, check.fault = None, check.fault or one.fault
                    check.figures += one.figures
                    check.verdicts += one.verdicts
        checks += wanted
    return bars.text(checks).rstrip()


def _sweep_block(results: Sequence[Result]) -> str:
    if not results:
        return "No sweep is on record."
    worst = sorted(results, key=report.merit)[:WORST]
    return f"The worst {len(worst)} of {len(results)} shapes:\n\n{report.summary(worst)}"


# --- pages that are generated as a whole ----------------------------------------------------------


def _ladder_page(record: Record | None) -> str:
    results = ladder_results(record) if record else []
    return _page(
        "The ladder",
        """
        Every rung computes the same thing, from Python loops up to the fused kernel. Each one
        allocates its output. [performance.md](performance.md) says how a figure is taken.
        """,
        record,
        ["![times of all rungs](ladder.png)"] if results else [],
        [report.case_table(result, ladder.SUBJECT) for result in results],
    )


def _cases_page(record: Record | None) -> str:
    results = [*op_results(record), *sweep_results(record)] if record else []
    return _page(
        "Every case",
        """
        Each candidate of each case on record, also those that lose and those that are refused.
        [performance.md](performance.md) says who the candidates are and how a figure is taken.
        """,
        record,
        [],
        [report.case_table(result) for result in results],
    )


def _page(
    heading: str, text: str, record: Record | None, before: list[str], cases: list[str]
) -> str:
    parts = [f"# {heading}", "Written by `make docs`; do not edit.", cleandoc(text)]
    parts.append(f"{report.machine_line(record)}." if record else NOTHING)
    return "\n\n".join([*parts, *before, *(case.rstrip() for case in cases)]) + "\n"


# --- the command ----------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say what is stale")
    options = parser.parse_args()
    records = read_records()
    before = stale(records)
    if options.check:
        print("\n".join(before) or "The documents are what benchmarks/results says.")
        return 1 if before else 0
    for path, text in texts(records).items():
        path.write_text(text)
    for picture in pictures(records):
        picture.draw()
    print("\n".join(f"was stale: {line}" for line in before) or "Nothing was stale.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
