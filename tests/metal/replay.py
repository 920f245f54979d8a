"""Runs captured dispatches again, without torch: what the sanitizers' lanes do.

The ordinary tests, run with EMU_CAPTURE=FOLDER, leave one file per kernel, grid and sizes there
(emulator/capture.cpp). Every buffer here is memory of its own. ``--under`` starts a process with
the sanitizer's runtime in LD_PRELOAD, which ends with the sanitizer's error.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections import Counter
from pathlib import Path

# ThreadSanitizer has 256 slots for threads, and beyond them it misses races without a word.
MOST_THREADS = {"asan": None, "tsan": 200}
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "report_signal_unsafe=0:exitcode=66:halt_on_error=1",
}


def sanitized(
    name: str, emulator: Path, library: Path, folder: Path
) -> subprocess.CompletedProcess[str]:
    """The dispatches of a folder under asan or tsan, whose instrumentation the library has."""
    from toolchain import environment, sanitizer

    most = MOST_THREADS[name]
    command = [sys.executable, str(Path(__file__)), str(folder)]
    command += ["--emulator", str(emulator), "--library", str(library)]
    command += ["--most-threads", str(most)] if most else []
    # ThreadSanitizer wants its addresses where no random layout puts anything.
    return subprocess.run(
        ["setarch", "-R", *command],
        env={**environment(), **_OPTIONS, "LD_PRELOAD": str(sanitizer(name))},
        capture_output=True,
        text=True,
        check=False,
    )


def _launch(emulator: ctypes.CDLL, shaders: int, path: Path, most: int | None) -> str | None:
    """Run one file; the kernel's name, or None if it has too many threads."""
    head, memory = path.read_bytes().split(b"\n\n", 1)
    name, sizes, regions, *bindings = head.decode().split("\n")
    grid = [int(n) for n in sizes.split()]
    if most is not None and grid[0] * grid[1] * grid[2] > most:
        return None
    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    lengths = [int(n) for n in regions.split()]
    addresses, position = [], 0
    for length in lengths:
        addresses.append(malloc(length))
        ctypes.memmove(addresses[-1], memory[position : position + length], length)
        position += length
    count = 31
    pointers, bytes_of = (ctypes.c_void_p * count)(), (ctypes.c_size_t * count)()
    for binding in bindings:
        argument, region, offset = (int(n) for n in binding.split())
        pointers[argument] = addresses[region] + offset
        bytes_of[argument] = lengths[region] - offset
    kernel = emulator.emu_find(shaders, name.encode())
    if not kernel:
        raise SystemExit(f"{path}: no kernel {name}")
    dims = [(ctypes.c_uint32 * 3)(*grid[i : i + 3]) for i in (0, 3)]
    if emulator.emu_dispatch(kernel, name.encode(), *dims, pointers, bytes_of, count):
        raise SystemExit(f"{name}: {emulator.emu_last_error().decode()}")
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    for address in addresses:
        free(address)
    return name


def _run(emulator_path: str, library: str, folder: Path, most: int | None) -> str:
    """Every dispatch of the folder; how many there were."""
    emulator = ctypes.CDLL(emulator_path, mode=ctypes.RTLD_GLOBAL)
    emulator.emu_open.restype = emulator.emu_find.restype = ctypes.c_void_p
    emulator.emu_find.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    pointers = [ctypes.c_void_p] * 4
    emulator.emu_dispatch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, *pointers, ctypes.c_int]
    emulator.emu_last_error.restype = ctypes.c_char_p
    shaders = emulator.emu_open(library.encode())
    if not shaders:
        raise SystemExit(emulator.emu_last_error().decode())
    paths = sorted(folder.glob("*.launch"))
    ran = Counter(_launch(emulator, shaders, path, most) for path in paths)
    left_out = ran.pop(None, 0)
    return f"{ran.total()} dispatches of {len(ran)} kernels; {left_out} have too many threads"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--under", choices=MOST_THREADS, help="start a process under a sanitizer")
    parser.add_argument("--source", type=Path, help="the shaders, with --under")
    parser.add_argument("--emulator", help="its library, in the process that --under starts")
    parser.add_argument("--library", help="the shaders, compiled, there")
    parser.add_argument("--most-threads", type=int)
    arguments = parser.parse_args()
    if not arguments.under:
        print(_run(arguments.emulator, arguments.library, arguments.folder, arguments.most_threads))
        return 0
    from compiler import compiled
    from device import emulator_library

    library = compiled(arguments.source, instrumentation=arguments.under)
    result = sanitized(arguments.under, emulator_library(), library, arguments.folder)
    print(result.stdout + result.stderr, end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
