"""What the tests of several ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def memory(tensor: Tensor) -> Tensor:
    """A copy of all bytes of the storage behind tensor, those between its elements included."""
    device = "meta" if tensor.is_meta else "cpu"
    return torch.empty(0, dtype=torch.uint8, device=device).set_(tensor.untyped_storage()).clone()


def assert_refused(call: Callable[[], Any], message: str, *tensors: Tensor) -> None:
    """Call raises RuntimeError with exactly this message, and no byte of the tensors changes."""
    stored = [t for t in tensors if not t.is_meta]
    before = [memory(t) for t in stored]
    with pytest.raises(RuntimeError) as caught:
        call()
    assert caught.type is RuntimeError
    assert str(caught.value) == message
    assert all(torch.equal(memory(t), b) for t, b in zip(stored, before, strict=True))


def without_notes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, silent about what torch's compiler warns of in its own code."""
    return pytest.mark.filterwarnings("ignore::DeprecationWarning")(function)
