"""``python -m fusedops``: info, verify, bench, autotune, selftest."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import fusedops


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # What a command needs is imported here: importing fusedops stays cheap.
    from fusedops import tuning
    from fusedops.bench import cli as bench
    from fusedops.bench import info
    from fusedops.selftest import cli as selftest
    from fusedops.verification import cli as verify

    parser = argparse.ArgumentParser(prog="fusedops", description=fusedops.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="CPU, instruction sets, threads, torch and measured limits")
    verify.add_parser(commands)
    bench.add_parser(commands)
    tuning.add_parser(commands)
    selftest.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        if options.command == "info":
            sys.stdout.write(info.text())
            return 0
        parts = {"verify": verify, "bench": bench, "autotune": tuning, "selftest": selftest}
        return int(parts[options.command].run(options))
    except BrokenPipeError:  # the reader of our output has gone: nothing to say and nobody to hear
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
