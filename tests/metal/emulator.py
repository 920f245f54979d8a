"""Kernels on the emulator without torch: a source, its kernels by name, arrays of NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import device
import numpy as np
from compiler import compiled

__all__ = ["EmulatorError", "Shaders"]

Array = np.ndarray


class EmulatorError(Exception):
    """The shader did what it must not."""


class Shaders:
    """The kernels of one source."""

    def __init__(self, source: Path, include: Sequence[Path] = (), language: str = "3.1") -> None:
        self._library = device.emulator()
        path = compiled(source, include=include, language=language)
        self._handle = self._library.emu_open(str(path).encode())
        if not self._handle:
            raise EmulatorError(self._library.emu_last_error().decode())

    def names(self) -> list[str]:
        size = self._library.emu_names(ctypes.c_void_p(self._handle), None, 0)
        text = ctypes.create_string_buffer(size)
        self._library.emu_names(ctypes.c_void_p(self._handle), text, size)
        return text.value.decode().split()

    def set_constant(self, index: int, value: Array) -> int:
        """A function constant; how many of the sources that are loaded have it."""
        return int(
            self._library.emu_set_constant(index, ctypes.c_void_p(value.ctypes.data), value.nbytes)
        )

    def run(
        self,
        kernel: str,
        arguments: Sequence[Array | None],
        grid: Sequence[int],
        group: Sequence[int],
    ) -> device.Dispatch:
        """Dispatch grid threads in groups; None is an argument that is not bound."""
        found = self._library.emu_find(self._handle, kernel.encode())
        if not found:
            raise EmulatorError(f"no kernel {kernel}")
        count = len(arguments)
        sizes = (ctypes.c_size_t * count)(*(0 if a is None else a.nbytes for a in arguments))
        addresses = (ctypes.c_void_p * count)(
            *(None if a is None else a.ctypes.data for a in arguments)
        )
        self._library.emu_record(1)
        failed = self._library.emu_dispatch(
            ctypes.c_void_p(found),
            kernel.encode(),
            (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid))),
            (ctypes.c_uint32 * 3)(*group, *[1] * (3 - len(group))),
            addresses,
            sizes,
            count,
        )
        self._library.emu_record(0)
        if failed:
            raise EmulatorError(self._library.emu_last_error().decode())
        return device.dispatches_on_record()[0]
