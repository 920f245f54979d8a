"""The device "mps" of the tests: builds it, loads it, and says what its kernels did."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from toolchain import BUILD, HERE, clang, run

EMULATOR = HERE / "emulator"


class BuildError(Exception):
    """The emulator or the device does not compile."""


@dataclass(frozen=True)
class Traffic:
    """What a dispatch did to one buffer. Of arguments that share memory, the last one's."""

    loads: int
    load_bytes: int
    stores: int
    store_bytes: int


@dataclass(frozen=True)
class Dispatch:
    """One kernel that ran."""

    kernel: str
    grid: tuple[int, int, int]
    group: tuple[int, int, int]
    barriers: int
    threadgroup_bytes: int
    buffers: dict[int, Traffic] = field(default_factory=dict)


def _built(
    name: str, sources: list[Path], headers: list[Path], compiler: list[str], link: list[str]
) -> Path:
    """The library of these sources, made once for each content and command."""
    key = hashlib.sha256("\0".join([*compiler, *link]).encode())
    for path in (*sources, *headers):
        key.update(path.read_bytes())
    library = BUILD / f"{name}-{key.hexdigest()[:16]}" / f"lib{name}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiler, "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor() as pool:
            _require(pool.map(run, commands))
        made = Path(folder) / library.name
        _require([run([*compiler, "-shared", *map(str, objects), *link, "-o", str(made)])])
        os.replace(made, library)
    return library


def _require(results: Iterable[subprocess.CompletedProcess[str]]) -> None:
    for result in results:
        if result.returncode:
            raise BuildError(result.stderr)


@lru_cache
def emulator_library() -> Path:
    """The emulator alone, which needs no torch."""
    flags = "-std=c++20 -O2 -g1 -fPIC -fno-builtin -Wall -Wextra -Wshadow -Werror"
    sources = sorted(EMULATOR.glob("*.cpp"))
    compiler = [str(clang()), *flags.split()]
    headers = sorted(EMULATOR.glob("*.h"))
    return _built("emu", sources, headers, compiler, ["-Wl,-soname,libemu.so", "-ldl"])


@lru_cache
def device_library() -> Path:
    """The device and the C shim on the emulator."""
    import torch

    home = Path(torch.__file__).parent
    compiler = [
        *shlex.split(os.environ.get("CXX", "c++")),
        *["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror"],
        *(f"-I{EMULATOR}", f"-isystem{home}/include"),
        f"-isystem{home}/include/torch/csrc/api/include",
        f'-DTORCH_OF_THE_TESTS="{torch.__version__}"',
    ]
    link = [
        *(f"-L{home}/lib", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    sources = [HERE / "fakemps.cpp", HERE / "shim_emu.cpp"]
    headers = [HERE / "fakemps.h", EMULATOR / "emu.h"]
    return _built("fakemps", sources, headers, compiler, link)


@lru_cache
def emulator() -> ctypes.CDLL:
    """The emulator's functions (emulator/emu.h)."""
    library = ctypes.CDLL(str(emulator_library()), mode=ctypes.RTLD_GLOBAL)
    library.emu_open.restype = library.emu_find.restype = ctypes.c_void_p
    library.emu_find.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.emu_last_error.restype = ctypes.c_char_p
    return library


@lru_cache
def load() -> ctypes.CDLL:
    """Gives torch the device. Before torch has asked for one, and before fusedops is loaded."""
    emulator()
    os.environ["FUSEDOPS_METAL_COMPILER"] = shlex.join([sys.executable, str(HERE / "compiler.py")])
    return ctypes.CDLL(str(device_library()), mode=ctypes.RTLD_GLOBAL)


def host_library() -> Path:
    """The library's host code for Metal, as setup.py builds it with FUSEDOPS_EMULATED_MPS=1."""
    library = BUILD / "libfusedops_mps.so"
    if not library.exists():
        raise BuildError(f"{library} is missing: build with FUSEDOPS_EMULATED_MPS=1")
    return library


@contextmanager
def deferred() -> Iterator[None]:
    """Launches wait until something looks at device memory."""
    load().fakemps_defer(1)
    try:
        yield
    finally:
        load().fakemps_defer(0)


@contextmanager
def recorded() -> Iterator[list[Dispatch]]:
    """The dispatches inside, listed when the block ends."""
    dispatches: list[Dispatch] = []
    load().fakemps_drain()
    emulator().emu_record(1)
    try:
        yield dispatches
    finally:
        load().fakemps_drain()
        emulator().emu_record(0)
        dispatches += dispatches_on_record()


def dispatches_on_record() -> list[Dispatch]:
    size = emulator().emu_recorded(None, 0)
    text = ctypes.create_string_buffer(size)
    emulator().emu_recorded(text, size)
    return [_dispatch(entry) for entry in json.loads(text.value)]


def _dispatch(entry: dict[str, Any]) -> Dispatch:
    buffers = {int(i): Traffic(*counts) for i, counts in entry.pop("buffers").items()}
    grid, group = tuple(entry.pop("grid")), tuple(entry.pop("group"))
    return Dispatch(grid=grid, group=group, buffers=buffers, **entry)
