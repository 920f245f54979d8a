"""Mach-O files read without Apple's tools: link stubs for the system's C++ library, and an audit.

macho.py stub OUT DYLIB...      a stub of libc++ with the symbols that these import of it
macho.py audit WHEEL FOLDER...  what the binaries of a wheel import, held to the libraries of the
                                torch wheels in these folders; prints a summary
"""

from __future__ import annotations

import ctypes
import struct
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

MAGIC, ARM64 = 0xFEEDFACF, 0x0100000C
LC_SYMTAB, LC_CODE_SIGNATURE, LC_BUILD_VERSION, LC_RPATH = 0x2, 0x1D, 0x32, 0x8000001C
LC_LOADS = (0xC, 0x80000018, 0x8000001F)  # dylib; weak; re-exported
FLAT_LOOKUP = 0xFE
# Of the standard's exceptions torch lacks one; the library has had all since its first release.
STANDARD = ["__ZNSt12domain_errorD1Ev", "__ZTISt12domain_error", "__ZTVSt12domain_error"]
LIBCXX, LIBSYSTEM = "/usr/lib/libc++.1.dylib", "/usr/lib/libSystem.B.dylib"


class Binary(NamedTuple):
    """What a dynamic linker reads of a file."""

    libraries: list[str]
    imports: dict[str, set[str]]  # by library; "flat" where any library may provide the symbol
    exports: set[str]
    minimum_macos: str
    rpaths: list[str]
    signed: bool


def read(path: Path) -> Binary:
    data = path.read_bytes()
    magic, machine = struct.unpack_from("<II", data)
    assert (magic, machine) == (MAGIC, ARM64), f"{path} is not a Mach-O file for arm64"
    libraries: list[str] = []
    rpaths: list[str] = []
    minimum, signed, symtab = "", False, (0, 0, 0, 0)
    offset = 32
    for _ in range(struct.unpack_from("<I", data, 16)[0]):
        command, size = struct.unpack_from("<II", data, offset)
        body = data[offset : offset + size]
        if command in LC_LOADS or command == LC_RPATH:
            text = body[struct.unpack_from("<I", body, 8)[0] :].split(b"\0")[0].decode()
            (rpaths if command == LC_RPATH else libraries).append(text)
        elif command == LC_SYMTAB:
            symtab = struct.unpack_from("<4I", body, 8)
        elif command == LC_BUILD_VERSION:
            version = struct.unpack_from("<I", body, 12)[0]
            minimum = f"{version >> 16}.{version >> 8 & 255}"
        signed |= command == LC_CODE_SIGNATURE
        offset += size

    symbols, count, strings, _ = symtab
    imports: dict[str, set[str]] = defaultdict(set)
    exports: set[str] = set()
    for index in range(count):
        at, kind, _, description, _ = struct.unpack_from("<IBBHQ", data, symbols + 16 * index)
        if kind & 0xE0 or not kind & 1:  # of a debugger, or local
            continue
        start = strings + at
        name = data[start : data.index(b"\0", start)].decode()
        if kind & 0xE:
            exports.add(name)
        else:
            ordinal = description >> 8
            known = 1 <= ordinal <= len(libraries)
            imports[libraries[ordinal - 1] if known else "flat"].add(name)
    return Binary(libraries, dict(imports), exports, minimum, rpaths, signed)


def write_stub(out: Path, paths: list[Path]) -> None:
    """What torch imports is there on every system that torch supports; nothing else is known."""
    names = sorted(set(STANDARD).union(*(read(path).imports.get(LIBCXX, set()) for path in paths)))
    symbols = ", ".join(f"'{name}'" for name in names)
    out.write_text(
        "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
        f"install-name: '{LIBCXX}'\ncurrent-version: 1\nexports:\n"
        f"  - targets: [ arm64-macos ]\n    symbols: [ {symbols} ]\n...\n"
    )


def faults(name: str, binary: Binary, torches: list[Path]) -> list[str]:
    """What is wrong with a binary of the wheel."""
    found = []
    extension = not name.endswith(".dylib")
    own = "@rpath/libfusedops.dylib" if extension else "@rpath/libtorch_cpu.dylib"
    allowed = {own, LIBCXX, LIBSYSTEM}
    found += [f"loads {lib}" for lib in binary.libraries if lib not in {*allowed, own}]
    found += [] if binary.signed else ["has no signature"]
    found += [] if binary.minimum_macos == "14.0" else [f"needs macOS {binary.minimum_macos}"]
    for symbol in sorted(binary.imports.get("flat", ())):
        if not extension or not symbol.startswith(("_Py", "__Py")):
            found.append(f"imports {symbol} from anywhere")
    for symbol in sorted(binary.imports.get("@rpath/libtorch_cpu.dylib", ())):
        if not symbol.startswith(("_aoti_torch_", "_torch_")):
            found.append(f"imports {symbol}, which is not of the stable ABI")
    for torch in torches:
        exports = read(torch / "libtorch_cpu.dylib").exports
        missing = binary.imports.get("@rpath/libtorch_cpu.dylib", set()) - exports
        found += [f"{symbol} is not in {torch}" for symbol in sorted(missing)]
        if extension:
            known = set().union(*read(torch / "libtorch_python.dylib").imports.values())
            for symbol in sorted(binary.imports.get("flat", set()) - known):
                if not hasattr(ctypes.pythonapi, symbol[1:]):
                    found.append(f"{symbol} is not of this Python, and torch does not import it")
    return found


def audit(wheel: Path, torches: list[Path]) -> int:
    """Print each binary's imports by library; the number of faults."""
    total = 0
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if name.endswith((".dylib", ".so"))]
        assert len(names) == 2, names
        for name in names:
            binary = read(Path(archive.extract(name, folder)))
            counts = {library: len(symbols) for library, symbols in binary.imports.items()}
            sys.stdout.write(f"{name}: macOS {binary.minimum_macos}, imports {counts}\n")
            for fault in faults(name, binary, torches):
                sys.stdout.write(f"  {fault}\n")
                total += 1
    return total


if __name__ == "__main__":
    command, first, *rest = sys.argv[1:]
    if command == "stub":
        write_stub(Path(first), [Path(path) for path in rest])
    else:
        sys.exit(1 if audit(Path(first), [Path(path) for path in rest]) else 0)
