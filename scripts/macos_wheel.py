"""The wheel for macOS, held to what its users' systems and torches have, on any system.

macos_wheel.py unpack WHEEL DIR FOLDER...  the files of a wheel that lie in these folders
macos_wheel.py record LIB OUT              what the libraries of torch in a folder import and export
macos_wheel.py stub OUT RECORD...          a link stub of libc++: what torch imports of it
macos_wheel.py audit WHEEL RECORD...       list what the wheel's binaries load, and every fault
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import macho

MINIMUM = "14.0"
LIBRARY, EXTENSION = "fusedops/libfusedops.dylib", "_C.cpython-{}-darwin.so"
TORCH, OWN = "@rpath/libtorch_cpu.dylib", "@rpath/libfusedops.dylib"
LIBCXX, LIBSYSTEM = "/usr/lib/libc++.1.dylib", "/usr/lib/libSystem.B.dylib"
# Of the standard's exceptions torch throws all but one; the library has always had it.
STANDARD = {"__ZNSt12domain_errorD1Ev", "__ZTISt12domain_error", "__ZTVSt12domain_error"}

Record = dict[str, Any]


def unpack(wheel: Path, out: Path, folders: list[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(
            out, [name for name in archive.namelist() if name.startswith(tuple(folders))]
        )


def record(lib: Path, out: Path) -> None:
    """What is read of 400 MB of libraries at every audit, kept."""
    names = ["torch_cpu", "c10", "torch_python", "shm", "torch"]
    read = {name: macho.read(lib / f"lib{name}.dylib") for name in names}
    used: dict[str, set[str]] = {LIBCXX: set(), LIBSYSTEM: set()}
    for binary in read.values():
        for library, symbols in used.items():
            symbols |= binary.imports.get(library, set())
    python = set().union(*read["torch_python"].imports.values())
    out.write_text(
        json.dumps(
            {
                "macos": read["torch_cpu"].minimum_macos,
                # Names of C: those of C++ are never imported.
                "exports": sorted(s for s in read["torch_cpu"].exports if not s.startswith("__Z")),
                "imports": {library: sorted(symbols) for library, symbols in used.items()},
                "python": sorted(s for s in python if s.startswith(("_Py", "__Py"))),
            },
            indent=0,
        )
    )


def used_of(library: str, records: list[Record]) -> set[str]:
    """What torches that run on the oldest macOS import of a system library is there."""
    runs = [r for r in records if tuple(map(int, r["macos"].split("."))) <= (14, 0)]
    return set().union(*(r["imports"][library] for r in runs))


def stub(install_name: str, names: Iterable[str]) -> str:
    """The text of a .tbd file: a linker takes it for a library with these symbols."""
    symbols = ", ".join(f"'{name}'" for name in sorted(names))
    return (
        "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
        f"install-name: '{install_name}'\ncurrent-version: 1\nexports:\n"
        f"  - targets: [ arm64-macos ]\n    symbols: [ {symbols} ]\n...\n"
    )


def faults_of_file(binary: macho.Binary) -> list[str]:
    """What no binary of the wheel may be or do."""
    found = []
    if not binary.flags & macho.TWOLEVEL or binary.flags & macho.FORCE_FLAT:
        found.append("does not say of which library its symbols are")
    if (binary.platform, binary.minimum_macos) != (macho.MACOS, MINIMUM):
        found.append(f"is for platform {binary.platform}, version {binary.minimum_macos}")
    if binary.imports != binary.bound:
        names = set().union(*binary.imports.values()) ^ set().union(*binary.bound.values())
        found.append(f"binds other symbols than it imports: {sorted(names)}")
    # A second C++ library has types of its own: an exception of one is not caught by the other.
    runtime = re.compile(r"___cxa_|___gxx_|__Unwind_|__ZTISt\d|__ZN[KV]*St3__1\d+basic_string")
    found += [f"has a {name} of its own" for name in sorted(filter(runtime.match, binary.exports))]
    # One row's kernel must never stand for another's.
    kernels = re.compile(r"__ZN?[KV]*8fusedops\d+(neon\w*|portable)")
    found += [f"exports {name}" for name in sorted(filter(kernels.match, binary.exports))]
    own = sorted(name for name in binary.coalesced & binary.exports if "fusedops" in name)
    found += [f"leaves it to chance whose {name} is taken" for name in own]
    return found


def faults_of_imports(binary: macho.Binary, records: dict[str, Record]) -> list[str]:
    """Symbols that are not stable, or not there on the oldest system or in a torch."""
    found = []
    every = list(records.values())
    of = {library: binary.imports.get(library, set()) for library in (TORCH, LIBCXX, LIBSYSTEM)}
    for symbol in sorted(of[TORCH]):
        lacking = [torch for torch, record in records.items() if symbol not in record["exports"]]
        if not symbol.startswith(("_aoti_torch_", "_torch_")):
            found.append(f"imports {symbol}, which is not of the stable ABI")
        elif lacking:
            found.append(f"imports {symbol}, which torch {', '.join(lacking)} lacks")
    for library in (LIBCXX, LIBSYSTEM):
        for symbol in sorted(of[library] - used_of(library, every) - STANDARD):
            found.append(f"imports {symbol}, which no torch proves to be in macOS {MINIMUM}")
    return found


def faults_of_names(binary: macho.Binary, loads: set[str], rpaths: list[str]) -> list[str]:
    """Libraries and folders: exactly those that are meant."""
    found = [f"loads {name}" for name in binary.libraries if name not in loads]
    found += [f"does not load {name}" for name in sorted(loads.difference(binary.libraries))]
    if binary.rpaths != rpaths:
        found.append(f"looks for libraries in {binary.rpaths} and not in {rpaths}")
    return found


def faults_of_library(binary: macho.Binary, records: dict[str, Record]) -> list[str]:
    """libfusedops: everything is found when it is linked."""
    found = faults_of_file(binary) + faults_of_imports(binary, records)
    found += faults_of_names(binary, {TORCH, LIBCXX, LIBSYSTEM}, ["@loader_path/../torch/lib"])
    if binary.kind != macho.DYLIB or binary.install_name != OWN:
        found.append(f"is called {binary.install_name!r} and not {OWN!r}")
    for symbol in sorted(binary.imports.get(macho.FLAT, ())):
        found.append(f"takes {symbol} from anywhere")
    return found


def faults_of_extension(binary: macho.Binary, records: dict[str, Record], tag: str) -> list[str]:
    """_C: what is left to be found is of Python."""
    found = faults_of_file(binary) + faults_of_imports(binary, records)
    found += faults_of_names(binary, {OWN, LIBCXX, LIBSYSTEM}, ["@loader_path"])
    name = f"@rpath/{EXTENSION.format(tag[2:])}"
    if binary.install_name != name:
        found.append(f"is called {binary.install_name!r} and not {name!r}")
    for symbol in sorted(binary.imports.get(macho.FLAT, ())):
        if not symbol.startswith(("_Py", "__Py")):
            found.append(f"takes {symbol} from anywhere")
        elif not is_of_python(symbol, tag, list(records.values())):
            found.append(f"takes {symbol} from Python, which may lack it")
    return found


def is_of_python(symbol: str, tag: str, records: list[Record]) -> bool:
    """Torch takes it from Python as well; or the Python of that version that runs this has it."""
    if any(symbol in record["python"] for record in records):
        return True
    same = tag == f"cp{sys.version_info.major}{sys.version_info.minor}"
    return same and hasattr(ctypes.pythonapi, symbol[1:])


def describe(binary: macho.Binary) -> list[str]:
    """What a binary loads, and how much it takes from each library."""
    lines = []
    for library in [*binary.libraries, *([macho.FLAT] if macho.FLAT in binary.imports else [])]:
        name = "whoever has it" if library == macho.FLAT else library
        lines.append(f"    {name}: {len(binary.imports.get(library, ()))} symbols")
    return lines


def audit(wheel: Path, records: dict[str, Record]) -> tuple[list[str], list[str]]:
    """(a listing of the binaries and what they load, faults)."""
    lines: list[str] = []
    found: list[str] = []
    python, _, tag = wheel.stem.split("-")[-3:]
    if tag != "macosx_14_0_arm64":
        found.append(f"{wheel.name}: is for {tag}")
    extension = f"fusedops/{EXTENSION.format(python[2:])}"
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        binaries = [n for n in names if archive.read(n)[:4] in (b"\xcf\xfa\xed\xfe", b"\x7fELF")]
        for name in sorted({LIBRARY, extension, *binaries}):
            if name not in binaries:
                found.append(f"{name}: is missing")
                continue
            if name not in (LIBRARY, extension):
                found.append(f"{name}: does not belong here")
                continue
            path = Path(archive.extract(name, folder))
            try:
                binary = macho.read(path)
            except ValueError as error:
                found.append(f"{name}: {error}")
                continue
            size = f"{path.stat().st_size // 1024} KiB"
            lines += [f"{name} ({size}, macOS {binary.minimum_macos}, {binary.install_name})"]
            lines += describe(binary)
            of_name = (
                faults_of_library(binary, records)
                if name == LIBRARY
                else faults_of_extension(binary, records, python)
            )
            signature = macho.signature_fault(path)
            found += [
                f"{name}: {fault}" for fault in [*of_name, *([signature] if signature else [])]
            ]
    return lines, found


if __name__ == "__main__":
    command, first, *rest = sys.argv[1:]
    if command == "unpack":
        unpack(Path(first), Path(rest[0]), rest[1:])
    elif command == "record":
        record(Path(first), Path(rest[0]))
    elif command == "stub":
        records = [json.loads(Path(path).read_text()) for path in rest]
        Path(first).write_text(stub(LIBCXX, used_of(LIBCXX, records) | STANDARD))
    elif command == "audit":
        torches = {
            Path(path).stem.removeprefix("torch-"): json.loads(Path(path).read_text())
            for path in rest
        }
        listing, faults = audit(Path(first), torches)
        print(*listing, f"held to torch {', '.join(torches)}", *faults, sep="\n")
        sys.exit(1 if faults else 0)
