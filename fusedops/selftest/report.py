"""The report of a self-test: text to paste into an issue."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence

import torch

from fusedops.bench import info
from fusedops.bench.report import digits, table
from fusedops.selftest.matrix import Part

__all__ = ["UNVERIFIED", "emulated", "machine", "text"]

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


def text(found: Mapping[str, str], stands_in: Sequence[str], parts: Sequence[Part]) -> str:
    """The whole report.

    Args:
        found: the machine.
        stands_in: the ops that PyTorch operations compute on this device.
        parts: what was run.
    """
    device = found["device"]
    bad = [part for part in parts if part.faults]
    runs = sum(part.runs for part in parts)
    verdict = "PASSED" if not bad else f"FAILED: {len(bad)} of {len(parts)} parts"
    lines = [f"fusedops self-test on {device}: {verdict} ({runs} calls)", ""]
    lines += [f"{name:<18} {value}" for name, value in found.items()]
    lines += ["", table(_COLUMNS, map(_cells, parts)), ""]
    lines += [
        f"No {device} kernel, computed by PyTorch operations: {', '.join(stands_in) or 'none'}."
    ]
    for part in bad:
        lines += ["", f"### {_title(part)}: {len(part.faults)} of {part.runs} calls failed", ""]
        lines += [f"- {fault}" for fault in part.faults[:SHOWN]]
        more = len(part.faults) - SHOWN
        lines += [f"- and {more} more"] if more > 0 else []
    if bad:
        lines += ["", "To see a failure again: from fusedops.selftest import repeat"]
    return "\n".join([*lines, "", *_closing(device)]) + "\n"


_COLUMNS = ("op", "called", "dtype", "calls", "worst error / bound", "result")


def _cells(part: Part) -> tuple[str, ...]:
    result = f"skipped: {part.skipped}" if part.skipped else f"FAILED {len(part.faults)}"
    valued = part.way not in ("again", "errors", "positions") and part.runs
    worst = digits(part.worst) if valued and math.isfinite(part.worst) else ""
    return part.op, part.way, part.dtype, str(part.runs), worst, "ok" if part.passed else result


def _title(part: Part) -> str:
    return " ".join(word for word in (part.op, part.way, part.dtype) if word)


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
