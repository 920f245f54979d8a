"""linux_wheel.py WHEEL...: hold wheels to manylinux_2_28, by what auditwheel says of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

FLOOR = (2, 28)
MISSING = ["libtorch_cpu.so"]  # torch itself, which every user has


def show(wheel: Path) -> dict[str, Any]:
    """`auditwheel show` on a wheel."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"auditwheel failed on {wheel.name}: {done.stderr.strip()}")
    return dict(json.loads(done.stdout))


def faults(report: dict[str, Any]) -> list[str]:
    """Why the wheel is not a manylinux_2_28 one that leaves out libtorch alone."""
    found = []
    tag = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", report["sym_tag"])
    if tag is None or (int(tag[1]), int(tag[2])) > FLOOR:
        found.append(f"needs {report['sym_tag']} for its symbols: {report['versioned_symbols']}")
    if sorted(report["external_libs"]) != MISSING:
        found.append(f"needs {sorted(report['external_libs'])} and not {MISSING} alone")
    if report["unsupported_isa"]:
        found.append("says that it needs a newer CPU than every machine has")
    return found


if __name__ == "__main__":
    failed = False
    for path in map(Path, sys.argv[1:]):
        report = show(path)
        print(f"{path.name}: the symbols are those of {report['sym_tag']};", end=" ")
        print("not in the wheel:", ", ".join(sorted(report["external_libs"])) or "nothing")
        found = faults(report)
        failed |= bool(found)
        if found:
            print(*found, sep="\n")
    sys.exit(failed)
