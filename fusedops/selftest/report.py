"""The report of a self-test: text to paste into an issue.

It comes in pieces, each written as soon as it is known: a driver may end the process.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence

import torch

from fusedops.bench import info
from fusedops.bench.report import digits
from fusedops.selftest.matrix import Part
from fusedops.testing import SPECS

__all__ = ["UNVERIFIED", "columns", "emulated", "end", "head", "machine", "problem", "row"]

SHOWN = 5  # faults of a part
UNVERIFIED = {
    "mps": (
        "that Apple's compiler accepts the shaders",
        "what the GPU computes: its exp, its rounding of subnormals, its contraction",
        "the order of our kernels and PyTorch's own on one stream",
        "that macOS loads a library that was built on Linux",
        "every speed",
    ),
    "cpu": ("what neon kernels compute, and how fast they are",),
}


def emulated(device: str) -> bool:
    """Whether the device is software: PyTorch has MPS on macOS alone, so elsewhere it is a test's.

    An emulator has no speed, and its results are not a GPU's.
    """
    return device == "mps" and sys.platform != "darwin"


def machine(device: str) -> dict[str, str]:
    """What a result depends on: ``fusedops info``'s fingerprint, and the device."""
    found = info.fingerprint()
    if device != "mps":
        return {**found, "device": device}
    gpu = "emulated, no GPU" if emulated(device) else info.cpu_name()
    return {
        **found,
        "class": f"{found['class'].rpartition('-')[0]}-{device}",
        "isa": device,
        "device": device,
        "gpu": gpu,
        "macos": platform.mac_ver()[0] or "not macOS",
        "mps fallback": os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK", "not set"),
        "metal validation": _validation(),
    }


def head(found: Mapping[str, str]) -> str:
    """What is known before anything has run: the machine."""
    lines = [f"fusedops self-test on {found['device']}; the verdict is at the end", ""]
    lines += [f"{name:<18} {value}" for name, value in found.items()]
    return "\n".join([*lines, ""])


def columns(device: str, stands_in: Sequence[str]) -> str:
    """Above the rows: what each part of them says, and the ops that PyTorch operations compute."""
    named = ", ".join(stands_in) or "none"
    titles = "op", "called", "dtype", "calls", "worst error / bound", "result"
    return f"\nNo {device} kernel, computed by PyTorch operations: {named}.\n\n{_line(titles)}"


def row(part: Part) -> str:
    """One part, whole when it is done: a line, and below it what failed."""
    result = f"skipped: {part.skipped}" if part.skipped else f"FAILED {len(part.faults)}"
    valued = part.way not in ("again", "errors", "positions") and part.runs > len(part.faults)
    worst = digits(part.worst) if valued and math.isfinite(part.worst) else ""
    result = "ok" if part.passed else result
    text = _line((part.op, part.way, part.dtype, str(part.runs), worst, result))
    text += "".join(f"  - {fault}\n" for fault in part.faults[:SHOWN])
    more = len(part.faults) - SHOWN
    return text + (f"  - and {more} more\n" if more > 0 else "")


def problem(device: str, stands_in: Sequence[str], parts: Sequence[Part]) -> str | None:
    """Why the run is no pass, or None."""
    bad = sum(bool(part.faults) for part in parts)
    if bad:
        return f"{bad} of {len(parts)} parts"
    if not any(part.runs for part in parts):
        return "no call was made"
    if device == "mps" and {part.op for part in parts} <= {*stands_in}:
        return "no op that was run has a Metal kernel, so none was tested"
    return None


def end(device: str, stands_in: Sequence[str], parts: Sequence[Part]) -> str:
    """Below the rows: the verdict, and what it says of the hardware."""
    wrong = problem(device, stands_in, parts)
    verdict = "PASSED" if wrong is None else f"FAILED: {wrong}"
    runs = sum(part.runs for part in parts)
    lines = ["", f"fusedops self-test on {device}: {verdict} ({runs} calls)"]
    if any(part.faults for part in parts):
        lines += ["To see a failure again: from fusedops.selftest import repeat"]
    return "\n".join([*lines, "", *_closing(device)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    """One row; its widths are known before the others are."""
    return " ".join(map(str.ljust, cells, _WIDTHS)).rstrip() + "\n"


_WIDTHS = (max(map(len, SPECS)) + 1, 10, 6, 6, 20, 0)


def _closing(device: str) -> list[str]:
    if emulated(device):
        return ["This device is an emulator: nothing here says what a GPU does."]
    if device == "cpu" and torch.backends.mps.is_available():
        return ["The GPU was not tested: --device mps."]
    if device == "cpu" and "neon" not in info.fingerprint()["isas"]:
        return ["Nothing of this says anything of Apple's hardware."]
    return [
        "Never verified on real hardware before the first report like this one:",
        *(f"- {what}" for what in UNVERIFIED[device]),
        "Please open an issue on the project's tracker with this text, passed or failed.",
    ]


def _validation() -> str:
    names = ("MTL_DEBUG_LAYER", "MTL_SHADER_VALIDATION")
    return ", ".join(f"{name}={os.environ.get(name, '0')}" for name in names)
