"""``python -m fusedops info``: what this build and this machine offer."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fusedops
from fusedops import _C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fusedops", description=fusedops.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="CPU, instruction sets, threads, torch and measured limits")
    parser.parse_args(arguments)
    sys.stdout.write(_info())
    return 0


def cpu_name() -> str:
    """The processor as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _info() -> str:
    rows = (
        ("fusedops", fusedops.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("system", platform.platform()),
        ("cpu", cpu_name()),
        ("isa compiled", " ".join(fusedops.isa.compiled())),
        ("isa supported", " ".join(fusedops.isa.supported())),
        ("isa in use", fusedops.isa.current()),
        ("compiler", _C.compiler()),
        ("threads", str(_C.threads())),
        ("last cache", f"{_C.last_cache_bytes() / 2**20:.0f} MiB"),
        ("copy, 64 MiB", f"{_C.probe_copy(64 << 20) / 1e9:.1f} GB/s read + written"),
        ("multiply-add f32", f"{_C.probe_fma('f32') / 1e9:.0f} GFLOP/s"),
        ("multiply-add bf16", f"{_C.probe_fma('bf16') / 1e9:.0f} GFLOP/s"),
    )
    return "".join(f"{name:<18} {value}\n" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())
