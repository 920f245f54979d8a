"""Where the compiler of the emulator is: a clang of 19 or later, which has Metal's 16-bit types."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "metal"
# What scripts/test-metal.sh unpacks where the system has none.
PRIVATE = BUILD / "clang"
_LEAST = 19


class MissingToolchainError(Exception):
    """There is no clang that compiles shaders."""


@lru_cache
def clang() -> Path:
    """clang++, of $FUSEDOPS_METAL_CLANG, the system or build/metal."""
    named = os.environ.get("FUSEDOPS_METAL_CLANG")
    names = [named] if named else [*(f"clang++-{v}" for v in range(25, _LEAST - 1, -1)), "clang++"]
    found = [Path(path) for name in names if (path := shutil.which(name))]
    private = sorted(PRIVATE.glob("usr/lib/llvm-*/bin/clang++"))
    for path in (*found, *private):
        if (version := _version(path)) is not None and version >= _LEAST:
            return path
    raise MissingToolchainError(
        f"clang {_LEAST} or later is missing (make test-metal fetches one; "
        "FUSEDOPS_METAL_CLANG names another)"
    )


def environment() -> dict[str, str]:
    """Of the compiler's process: the libraries of the private one, none of a sanitizer's."""
    own = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    folders = {str(p.parent) for p in PRIVATE.glob("usr/lib/**/lib*.so*")}
    if folders:
        own["LD_LIBRARY_PATH"] = ":".join([*sorted(folders), own.get("LD_LIBRARY_PATH", "")])
    return own


def sanitizer(name: str) -> Path:
    """The shared runtime of asan or tsan."""
    library = f"libclang_rt.{name}-{os.uname().machine}.so"
    beside = Path(run([str(clang()), f"-print-file-name={library}"]).stdout.strip())
    private = PRIVATE.glob(f"usr/lib/llvm-*/lib/clang/*/lib/linux/{library}")
    for path in (beside, *private):
        if path.is_file():
            return path
    raise MissingToolchainError(f"{library} is missing (make test-metal fetches it)")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """The finished process; its caller looks at what came of it."""
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


def _version(path: Path) -> int | None:
    match = re.search(r"clang version (\d+)", run([str(path), "--version"]).stdout)
    return int(match[1]) if match else None
