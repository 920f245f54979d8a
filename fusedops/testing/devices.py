"""Calls on another device: the same numbers in the same memory layout."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedops.testing.samples import Call

__all__ = ["on_device", "synchronize"]


def on_device(call: Call, device: str) -> Call:
    """The call with copies of its tensors on device, strides, gaps and shared memory included."""
    if device == "cpu":
        return call
    moved: dict[tuple[int, torch.dtype], Tensor] = {}  # by the memory that tensors share

    def move(t: Tensor) -> Tensor:
        if t.is_neg():
            return torch._neg_view(move(torch._neg_view(t)))
        storage = t.untyped_storage()
        key = storage.data_ptr(), t.dtype
        if key not in moved:
            flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage)
            moved[key] = flat.to(device)
        return moved[key].as_strided(t.shape, t.stride(), t.storage_offset())

    return Call(tuple(None if t is None else move(t) for t in call.args), call.kwargs)


def synchronize(device: str) -> None:
    """Wait for what was queued on the device; on a CPU a call is done when it returns."""
    if device == "mps":
        torch.mps.synchronize()
