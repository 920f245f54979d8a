"""What the tests of several ops share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedops


def memory(tensor: Tensor) -> Tensor:
    """A copy of all bytes of the storage behind tensor, those between its elements included."""
    device = "meta" if tensor.is_meta else "cpu"
    return torch.empty(0, dtype=torch.uint8, device=device).set_(tensor.untyped_storage()).clone()


def assert_refused(call: Callable[[], Any], message: str, *tensors: Tensor) -> None:
    """Call raises RuntimeError with this message, and no byte of the tensors changes.

    Exactly this one, but for a hint of the doctor's behind it.
    """
    stored = [t for t in tensors if not t.is_meta]
    before = [memory(t) for t in stored]
    with pytest.raises(RuntimeError, match=rf"^{re.escape(message)}(\. Hint: .*)?\Z") as caught:
        call()
    assert caught.type is RuntimeError
    assert all(torch.equal(memory(t), b) for t, b in zip(stored, before, strict=True))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The code run by a fresh interpreter in an empty folder."""
    package = Path(fusedops.__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, "PYTHONPATH": str(package), **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
