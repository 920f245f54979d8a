"""Calls on another device: the same numbers in the same memory layout."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedops.testing.samples import Call

__all__ = ["on_device", "synchronize"]


def on_device(call: Call, device: str) -> Call:
    """The call with copies of its tensors on device, strides, offsets and gaps included."""
    if device == "cpu":
        return call
    return Call(
        tuple(None if t is None else _moved(t, device) for t in call.args),
        call.kwargs,
    )


def synchronize(device: str) -> None:
    """Wait for what was queued on the device; on a CPU a call is done when it returns."""
    if device == "mps":
        torch.mps.synchronize()


def _moved(t: Tensor, device: str) -> Tensor:
    if t.is_neg():
        return torch._neg_view(_moved(torch._neg_view(t), device))
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())
