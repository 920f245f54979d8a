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
from lane import DEVICE
from torch import Tensor

import fusedops


def memory(tensor: Tensor) -> Tensor:
    """A copy of all bytes of the storage behind tensor, those between its elements included."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage()).clone()


def exact(tensor: Tensor) -> Tensor:
    """The same numbers in float64, on the CPU: no other device need have that type."""
    return tensor.detach().to("cpu", torch.float64)


def here(tensor: Tensor) -> Tensor:
    """A tensor that was made when tests were collected, on the device of the tests."""
    if tensor.is_meta:
        return tensor
    if tensor.is_neg():
        return torch._neg_view(here(torch._neg_view(tensor)))
    return tensor.to(torch.get_default_device())


def mixed(other: str) -> str:
    """What mixing the device of the tests with another one is called."""
    return " and ".join(sorted((str(torch.empty(0, device=DEVICE).device), other)))


def opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    """``torch.library.opcheck``; on MPS without the one of its tests that knows no MPS."""
    known = DEVICE == "cpu"
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        op, arguments, test_utils=(*tests, "test_autograd_registration") if known else tests
    )


def _assert_told_late(call: Callable[[], Any], message: str) -> None:
    """The kernels of MPS look at positions themselves (docs/metal.md)."""
    table = message.partition("must be in ")[2].partition(" but got")[0]
    with pytest.raises(RuntimeError, match=re.escape(table)):
        _and_check(call)


def _and_check(call: Callable[[], Any]) -> None:
    call()
    fusedops.mps.check()


def assert_refused(call: Callable[[], Any], message: str, *tensors: Tensor) -> None:
    """Call raises RuntimeError with this message, and no byte of the tensors changes.

    Exactly this one, but for a hint of the doctor's behind it.
    """
    if DEVICE == "mps" and "position_ids + offset must be in" in message:
        return _assert_told_late(call, message)
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
