"""``fusedops verify TARGET``: the verdict; exit code 0 passed, 1 rejected, 2 misused."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fusedops.testing import DTYPES, SPECS
from fusedops.verification.session import PROMISES, verify
from fusedops.verification.targets import resolve

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of a parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify", help="whether a kernel is right: values, gradients, memory, cheats"
    )
    parser.add_argument(
        "target",
        nargs="?",
        help="FILE.py:NAME, MODULE:NAME (in a process of its own), torch.ops.NS.NAME, rung:OP/RUNG",
    )
    parser.add_argument(
        "--mutants",
        action="store_true",
        help="print what verify and other projects' rules say of planted wrong kernels",
    )
    parser.add_argument("--op", choices=[*SPECS], help="the op it computes; a rung knows")
    parser.add_argument("--against", metavar="REF", help="the reference, named like a target")
    parser.add_argument(
        "--inputs",
        metavar="FILE.py:NAME",
        help="with --against: a function of a torch.Generator, or a tuple of example arguments",
    )
    parser.add_argument("--dtype", metavar="NAMES", help=f"comma list of {', '.join(DTYPES)}")
    parser.add_argument("--samples", metavar="GLOB", help="narrow the samples of the op")
    parser.add_argument(
        "--promise",
        metavar="NAME",
        action="append",
        default=[],
        choices=PROMISES,
        help=f"a guarantee to hold it to: {', '.join(PROMISES)}; may be repeated",
    )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="fewer samples, two dtypes")
    effort.add_argument("--full", action="store_true", help="every sample in every distribution")
    parser.add_argument("--seed", type=int, default=0, help="other numbers")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report there too")
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=60.0, help="seconds an answer may take"
    )
    parser.add_argument(
        "--memory", metavar="GIB", type=float, default=4.0, help="what its process may add"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Verify, print the table, and return the exit code."""
    effort = "quick" if options.quick else "full" if options.full else "standard"
    if options.mutants == (options.target is not None):
        sys.stderr.write("fusedops verify: give a target, or --mutants\n")
        return 2
    if options.mutants:
        from fusedops.verification import killtable

        return killtable.main(inputs="quick" if options.quick else "standard")
    try:
        if options.json is not None:
            options.json.touch()  # a report that cannot be written is better known now
        report = verify(
            options.target,
            options.against,
            op=options.op,
            inputs=effort if options.inputs is None else _inputs(options.inputs),
            dtypes=options.dtype.split(",") if options.dtype else None,
            samples=options.samples,
            promises=options.promise,
            seed=options.seed,
            timeout=options.timeout,
            memory=options.memory,
        )
        sys.stdout.write(f"{report}\n")
        if options.json is not None:
            options.json.write_text(report.to_json() + "\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"fusedops verify: {error}\n")
        return 2
    return 0 if report.passed else 1


def _inputs(text: str) -> Any:
    return resolve(text, callable_only=False)
