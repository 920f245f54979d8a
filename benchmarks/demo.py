"""The main job: every rung verified and timed, then two real models with fusedops inside.

    make demo                                       or: python benchmarks/demo.py
    python benchmarks/demo.py --part models         only the models
    python benchmarks/demo.py --save-docs           also docs/ladder.{md,png} and README's table

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

import demo_ladder
import demo_models
import demo_report

ROOT = Path(__file__).resolve().parent.parent


def show_ladder(seconds: float, save_docs: bool) -> list[str]:
    """Part (a). Returns what went wrong."""
    rows = []
    for case in demo_ladder.article_cases():
        measured = demo_ladder.measure(case, seconds)
        print(demo_report.case_table(measured), flush=True)
        rows += measured
    chart = ROOT / "benchmarks" / "out" / "ladder.png"
    demo_report.chart(rows, chart)
    print(f"chart: {chart.relative_to(ROOT)}\n")
    if save_docs:
        docs = ROOT / "docs"
        demo_report.chart(rows, docs / "ladder.png")
        (docs / "ladder.md").write_text(demo_report.document(rows))
        readme = ROOT / "README.md"
        readme.write_text(demo_report.with_ladder(readme.read_text(), rows))
    return [f"{row.case.title}, {row.rung}: {row.fault}" for row in rows if row.fault is not None]


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
        eager, fused = (demo_report.duration(q.median) for q in (c.eager, c.fused))
        print(f"{c.dtype:4}  eager {eager}, fused {fused}: x {demo_report.ratio(c.speedup)}")
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
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per comparison")
    parser.add_argument(
        "--save-docs", action="store_true", help="write docs/ladder.{md,png} and README's table"
    )
    options = parser.parse_args()

    print(f"{demo_report.machine()}\n")
    faults = []
    if options.part in ("all", "ladder"):
        faults += show_ladder(options.seconds, options.save_docs)
    if options.part in ("all", "models"):
        faults += show_models(options.seconds)
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    if not faults:
        print("All results verified.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
