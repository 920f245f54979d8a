"""The processor as the system names it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

__all__ = ["cpu_family", "cpu_name"]


def cpu_name() -> str:
    """The processor as the system names it."""
    name = _cpuinfo().get("model name", "")
    if not name and shutil.which("sysctl"):
        name = output("sysctl", "-n", "machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine()


def cpu_family() -> str:
    """What tells processors of one name apart."""
    info = _cpuinfo()
    if "cpu family" in info:
        return f"family {info['cpu family']} model {info['model']} stepping {info['stepping']}"
    if "CPU part" in info:
        return f"implementer {info['CPU implementer']} part {info['CPU part']}"
    return platform.machine()


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    with path.open() as file:  # no more than the first: on a large machine the rest takes a while
        first = file.read(1 << 14).partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def output(*command: str) -> str:
    """What a command prints, empty if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
