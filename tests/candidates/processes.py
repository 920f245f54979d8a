"""Kernels of gelu that test_verify.py runs in a process of their own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def honest(x: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


def crashes(x: Tensor, **_: Any) -> Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return x


def hangs(x: Tensor, **_: Any) -> Tensor:
    time.sleep(100)
    return x


def fills_the_memory(x: Tensor, **_: Any) -> Tensor:
    return torch.empty(1 << 40)


def fills_the_memory_without_torch(x: Tensor, **_: Any) -> Tensor:
    return torch.tensor(bytearray(1 << 40))


def is_killed(x: Tensor, **_: Any) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return x


def exits(x: Tensor, **_: Any) -> Tensor:
    sys.exit(4)


def ends_the_process(x: Tensor, **_: Any) -> Tensor:
    os._exit(3)


def prints(x: Tensor, *, approximate: str = "none") -> Tensor:
    sys.stdout.write("junk" * 10000)
    sys.stdout.flush()
    os.write(1, b"more junk")
    return honest(x, approximate=approximate)


def writes_into_the_pipe(x: Tensor, **_: Any) -> Tensor:
    for descriptor in range(3, 32):
        try:
            os.write(descriptor, b"\x10\0\0\0\0\0\0\0" + b"no torch file at")
        except OSError:
            continue
    return x


def reads_past_the_end(x: Tensor, *, approximate: str = "none") -> Tensor:
    if x.is_contiguous():
        ctypes.string_at(x.data_ptr(), x.numel() * x.element_size() + 1)
    return honest(x, approximate=approximate)


def reads_before_the_start(x: Tensor, *, approximate: str = "none") -> Tensor:
    if x.is_contiguous() and x.storage_offset() == 0:
        ctypes.string_at(x.data_ptr() - 1, 1)
    return honest(x, approximate=approximate)
