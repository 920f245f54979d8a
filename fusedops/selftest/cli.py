"""``fusedops selftest``: exit code 0 passed, 1 failed, 2 misused."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from fusedops.bench import report as tables
from fusedops.bench.record import TargetError, Writer
from fusedops.selftest import matrix, report, speed
from fusedops.testing import SPECS

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of a parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "selftest",
        help="whether the ops are right on this machine's device: a report for an issue",
        description="Runs every op, dtype and memory layout on the device against float64 and "
        "prints a report. Exits 1 when anything failed, 2 when it cannot run.",
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "mps"), help="default: mps where there is one, else cpu")
    add("--op", choices=[*SPECS], action="append", help="only this op; may be repeated")
    add("--quick", action="store_true", help="the main shapes with normal numbers: seconds")
    add("--bench", action="store_true", help="then time the ops against eager on the device")
    add("--seconds", type=float, default=0.5, help="of timing per case (default: %(default)s)")
    add("--json", metavar="FILE", help="with --bench: keep the record there, for fusedops bench")
    return parser


def run(options: argparse.Namespace) -> int:
    """Test, print the report, time if asked to; returns the exit code."""
    device = options.device or ("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        _require(
            device == "cpu" or torch.backends.mps.is_available(),
            "--device mps must be one that torch finds",
            "none on this machine",
        )
        _require(
            options.json is None or options.bench, "--json must come with --bench", "--json alone"
        )
        _require(
            not (options.bench and report.emulated(device)),
            "--bench must time a real device",
            f"an emulated {device}",
        )
        writer = Writer(options.json)
    except (ValueError, TargetError) as error:
        sys.stderr.write(f"fusedops selftest: error: {error}\n")
        return 2
    # The report goes where the record does not.
    out = sys.stderr if writer.is_stdout else sys.stdout
    ops = options.op or tuple(SPECS)
    _tell(out, report.head(report.machine(device)))
    _running("a first call of each op")
    stands_in = [op for op in ops if matrix.kernel_missing(SPECS[op], device)]
    _tell(out, report.columns(device, stands_in))
    parts = []
    for part in matrix.run(device, ops=ops, quick=options.quick, status=_running):
        parts.append(part)
        _tell(out, report.row(part))
    _tell(out, report.end(device, stands_in, parts))
    bad = report.problem(device, stands_in, parts) is not None
    if options.bench:
        bad = _bench(device, options, writer, out) or bad
    return 2 if writer.failed else int(bad)


def _bench(device: str, options: argparse.Namespace, writer: Writer, out: Any) -> bool:
    """Whether a result that was timed is wrong."""
    found = []
    for result in speed.results(device, seconds=options.seconds, status=_status):
        _status("")
        out.write(f"\n{tables.case_table(result)}")
        found.append(result)
    out.write(f"\n{tables.summary(found)}\n")
    writer.finish(speed.record(device, found, "fusedops selftest --bench"))
    faults = [row.fault for r in found for row in r.rows if row.candidate == "fusedops"]
    return any(faults) or any("fusedops" in r.absent for r in found)


def _tell(out: Any, text: str) -> None:
    """A piece of the report, in the file at once: the next call may end the process."""
    _status("")
    out.write(text)
    out.flush()


def _running(text: str) -> None:
    """What runs now: the last word of a process that a driver ends, so not on a terminal only."""
    if sys.stderr.isatty():
        _status(text)
    else:
        sys.stderr.write(f"running: {text}\n")
        sys.stderr.flush()


def _status(text: str) -> None:
    """One line that is written over, on a terminal only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def _require(holds: bool, requirement: str, got: str) -> None:
    if not holds:
        raise ValueError(f"[selftest] {requirement} but got {got}")
