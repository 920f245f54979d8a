"""The main job: every rung verified and timed, then two real models with fusedops inside.

    make demo                                       or: python benchmarks/demo.py
    python benchmarks/demo.py --part models         only the models

Exits 1 when a result is wrong, a figure impossible or a swapped model disagrees.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Everything is on this machine already: nothing may be looked up, and nothing be reported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import demo_models

import fusedops
from fusedops.bench import charts, info, ladder, report
from fusedops.bench.record import Record, Result

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "benchmarks" / "out" / "ladder.png"


def show_ladder(seconds: float, heading: str) -> list[str]:
    """Part (a). Returns what went wrong."""
    results = []
    for case in ladder.cases():
        results.append(ladder.run(case, seconds))
        print(report.case_table(results[-1], ladder.SUBJECT), flush=True)
    charts.ladder(results, CHART, heading)
    print(f"chart: {CHART.relative_to(ROOT)}\n")
    return [fault for result in results for fault in faults_of(result)]


def faults_of(result: Result) -> list[str]:
    """Rows that are refused, and rungs that failed although they said that they can run."""
    faults = {row.candidate: row.fault for row in result.rows if row.fault is not None}
    for name, reason in result.absent.items():
        if fusedops.ladder.get(result.case.op, name).unavailable is None:
            faults[name] = reason
    return [f"{report.title(result)}, {name}: {fault}" for name, fault in faults.items()]


def show_models(seconds: float) -> list[str]:
    """Part (b). Returns what went wrong."""
    sentences = demo_models.SENTENCES.read_text().splitlines()
    pair = demo_models.sentence_model(sentences)
    faults = show_pair(pair, ("f32", "bf16", "f16"), seconds)
    show_neighbours(pair, sentences)
    return faults + show_pair(demo_models.neox_model(), ("f32", "bf16"), seconds)


def show_pair(pair: demo_models.Pair, dtypes: tuple[str, ...], seconds: float) -> list[str]:
    """Print one line per dtype and one per check; returns the checks that failed."""
    print(f"### {pair.title}\n")
    faults = []
    for c in demo_models.compare(pair, dtypes, seconds):
        eager, fused = (report.duration(q.median) for q in (c.eager, c.fused))
        print(f"{c.dtype:4}  eager {eager}, fused {fused}: x {report.ratio(c.speedup, c.noise)}")
        for check in c.checks:
            print(f"      {'ok    ' if check.holds else 'FAILED'}  {check.text}", flush=True)
        faults += [f"{pair.title}, {c.dtype}: {k.text}" for k in c.checks if not k.holds]
    print()
    return faults


def show_neighbours(pair: demo_models.Pair, sentences: list[str]) -> None:
    """What the embeddings are for: a few sentences and the nearest other one of each."""
    nearest = demo_models.neighbours(pair)
    for i in range(0, len(sentences), 6):
        print(f"  {sentences[i]}\n    -> {sentences[nearest[i]]}")
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=("all", "ladder", "models"), default="all")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per comparison")
    options = parser.parse_args()

    heading = report.machine_line(Record(info.fingerprint(), {}, "demo"))
    print(f"{heading}\n")
    faults = []
    if options.part in ("all", "ladder"):
        faults += show_ladder(options.seconds, heading)
    if options.part in ("all", "models"):
        faults += show_models(options.seconds)
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    if not faults:
        print("All results verified.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
