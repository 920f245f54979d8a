"""The Metal kernels: where they are, and the one thing that they tell late."""

from __future__ import annotations

import torch

from fusedops._library import ops

__all__ = ["check", "is_available"]


def is_available() -> bool:
    """Whether calls on this machine's GPU run Metal kernels of fusedops.

    False on every system but macOS, and on a Mac without MPS: there a tensor on ``mps`` cannot be.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("fusedops::rope", "MPS")
    return has_kernel and torch.backends.mps.is_available()


def check() -> None:
    """Wait for the GPU, and fail if a call met a position outside its table.

    ``position_ids`` on MPS are looked at by the kernel, not before it: the host would have to wait.
    Where a position is outside the table row 0 is read, and the fault is told by the first call of
    ``rope``, ``rope_``, ``rope_qk`` or ``rope_qk_`` after the news has arrived, or here. It is told
    once. Elsewhere positions are checked before anything is written, and this does nothing.

    Raises:
        RuntimeError: ``[rope] position_ids + offset must be in [0, rows) but got ...``.
    """
    if hasattr(ops, "mps_check"):
        ops.mps_check()
