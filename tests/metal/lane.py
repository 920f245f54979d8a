"""The ordinary tests on the device "mps": FUSEDOPS_TEST_DEVICE=mps.

On a Mac that is the GPU, elsewhere the emulator. Tensors that a test makes without naming a device
are made there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

import torch

DEVICE = os.environ.get("FUSEDOPS_TEST_DEVICE", "cpu")
_TESTS = Path(__file__).resolve().parents[1]
_NO_FLOAT64 = "MPS framework doesn't support float64"


def prepare() -> None:
    """Before fusedops is imported: torch asks for a device's hooks once."""
    if DEVICE == "mps" and sys.platform != "darwin":
        import device

        device.load()


def start() -> None:
    """After it: the library's own kernels."""
    if DEVICE == "mps" and sys.platform != "darwin":
        import device

        torch.ops.load_library(device.host_library())


def wants_float64(error: BaseException, traceback: TracebackType | None) -> bool:
    """Whether a test, and not the library, asked the device for float64, which MPS lacks."""
    if DEVICE != "mps" or not isinstance(error, TypeError) or _NO_FLOAT64 not in str(error):
        return False
    asked = [path for path in _files(traceback) if _is_ours(path)]
    return bool(asked) and (_TESTS in asked[-1].parents or asked[-1].name == "reference.py")


def _files(traceback: TracebackType | None) -> list[Path]:
    files = []
    while traceback is not None:
        files.append(Path(traceback.tb_frame.f_code.co_filename))
        traceback = traceback.tb_next
    return files


def _is_ours(path: Path) -> bool:
    return _TESTS in path.parents or _TESTS.parent / "fusedops" in path.parents
