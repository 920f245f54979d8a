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


def missing(error: BaseException) -> str | None:
    """What a test, and not the library, asked of the device and MPS or the emulator lacks."""
    if DEVICE != "mps":
        return None
    asked = [path for path in _files(error.__traceback__) if _is_ours(path)]
    if not asked or not (_TESTS in asked[-1].parents or asked[-1].name == "reference.py"):
        return None
    if isinstance(error, TypeError) and _NO_FLOAT64 in str(error):
        return "float64 does not exist on MPS"
    if isinstance(error, NotImplementedError) and "'SparseMPS' backend" in str(error):
        return "the emulated MPS has no sparse tensors"
    if "'_mps_get_core_count'" in str(error) or "RuntimeError: MPS is not available" in str(error):
        return "Inductor asks for a real GPU"
    if "deserializing the saved file" in str(error):
        return "torch loads no file into the emulated MPS"
    return None


def _files(traceback: TracebackType | None) -> list[Path]:
    files = []
    while traceback is not None:
        files.append(Path(traceback.tb_frame.f_code.co_filename))
        traceback = traceback.tb_next
    return files


def _is_ours(path: Path) -> bool:
    return _TESTS in path.parents or _TESTS.parent / "fusedops" in path.parents
