"""Mach-O files for arm64, read without Apple's tools: what macOS reads of them to load them."""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC, ARM64 = 0xFEEDFACF, 0x0100000C
DYLIB, BUNDLE = 6, 8  # file types
TWOLEVEL, FORCE_FLAT = 0x80, 0x100  # flags of the header
MACOS = 1  # platform

LC_SYMTAB, LC_ID_DYLIB, LC_CODE_SIGNATURE, LC_BUILD_VERSION = 0x2, 0xD, 0x1D, 0x32
LC_DYLD_INFO, LC_RPATH = (0x22, 0x80000022), 0x8000001C
LC_LOADS = (0xC, 0x80000018, 0x8000001F)  # dylib; weak; re-exported

FLAT = "flat"  # where an import names no library: any that is loaded may provide it
SIGNATURE, DIRECTORY, ADHOC, SHA256 = 0xFADE0CC0, 0xFADE0C02, 0x2, 2


class Binary(NamedTuple):
    """What is said in the load commands, the symbol table and the bind opcodes."""

    kind: int
    flags: int
    install_name: str
    libraries: list[str]
    rpaths: list[str]
    platform: int
    minimum_macos: str
    imports: dict[str, set[str]]  # by library, or FLAT
    bound: dict[str, set[str]]  # what the linker binds when it loads the file, likewise
    coalesced: set[str]  # weak symbols: of all libraries that have one, the first is taken
    exports: set[str]


def read(path: Path) -> Binary:
    """Read a file for arm64; raises ValueError for anything else."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read(path, data)


def _commands(data: mmap.mmap | bytes) -> Iterator[tuple[int, bytes]]:
    offset = 32
    for _ in range(struct.unpack_from("<I", data, 16)[0]):
        command, size = struct.unpack_from("<II", data, offset)
        yield command, data[offset : offset + size]
        offset += size


def _read(path: Path, data: mmap.mmap) -> Binary:
    if len(data) < 32 or struct.unpack_from("<II", data) != (MAGIC, ARM64):
        raise ValueError(f"{path.name} is not a Mach-O file for arm64")
    kind, flags = struct.unpack_from("<I", data, 12)[0], struct.unpack_from("<I", data, 24)[0]
    libraries: list[str] = []
    rpaths: list[str] = []
    install_name, minimum, platform = "", "", 0
    symtab, opcodes = (0, 0, 0, 0), (0,) * 10
    for command, body in _commands(data):
        if command in (*LC_LOADS, LC_RPATH, LC_ID_DYLIB):
            text = body[struct.unpack_from("<I", body, 8)[0] :].split(b"\0")[0].decode()
            if command == LC_ID_DYLIB:
                install_name = text
            else:
                (rpaths if command == LC_RPATH else libraries).append(text)
        elif command == LC_SYMTAB:
            symtab = struct.unpack_from("<4I", body, 8)
        elif command in LC_DYLD_INFO:
            opcodes = struct.unpack_from("<10I", body, 8)
        elif command == LC_BUILD_VERSION:
            platform, version = struct.unpack_from("<II", body, 8)
            minimum = f"{version >> 16}.{version >> 8 & 255}"

    imports: dict[str, set[str]] = defaultdict(set)
    exports: set[str] = set()
    at, count, strings, _ = symtab
    for name_at, kind_of, _, note, _ in struct.iter_unpack("<IBBHQ", data[at : at + 16 * count]):
        if kind_of & 0xE0 or not kind_of & 1:  # of a debugger, or local
            continue
        start = strings + name_at
        name = data[start : data.find(b"\0", start)].decode()
        if kind_of & 0xE == 0:
            imports[_library(note >> 8, libraries)].add(name)
        elif not kind_of & 0x10:  # not private
            exports.add(name)

    bound: dict[str, set[str]] = defaultdict(set)
    for place in (2, 6):  # at once, and at the first call
        for ordinal, name in _binds(data[opcodes[place] : opcodes[place] + opcodes[place + 1]]):
            bound[_library(ordinal, libraries)].add(name)
    coalesced = {name for _, name in _binds(data[opcodes[4] : opcodes[4] + opcodes[5]])}
    return Binary(
        kind,
        flags,
        install_name,
        libraries,
        rpaths,
        platform,
        minimum,
        dict(imports),
        dict(bound),
        coalesced,
        exports,
    )


def _library(ordinal: int, libraries: list[str]) -> str:
    return libraries[ordinal - 1] if 1 <= ordinal <= len(libraries) else FLAT


def _binds(opcodes: bytes) -> Iterator[tuple[int, str]]:
    """(ordinal of the library, symbol) of each place that is bound; 0 and less name no library."""
    at, ordinal, name = 0, 0, ""

    def uleb() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = opcodes[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(opcodes):
        opcode, immediate = opcodes[at] & 0xF0, opcodes[at] & 0xF
        at += 1
        if opcode == 0x10:
            ordinal = immediate
        elif opcode == 0x20:
            ordinal = uleb()
        elif opcode == 0x30:
            ordinal = immediate - 16 if immediate else 0
        elif opcode == 0x40:
            end = opcodes.index(b"\0", at)
            name, at = opcodes[at:end].decode(), end + 1
        elif opcode in (0x60, 0x70, 0x80):  # an addend; a segment and an offset; an offset
            uleb()
        elif opcode in (0x90, 0xA0, 0xB0, 0xC0):
            for _ in range({0xA0: 1, 0xC0: 2}.get(opcode, 0)):
                uleb()
            yield ordinal, name


def signature_fault(path: Path) -> str:
    """Why the kernel would refuse the file's ad-hoc signature, or "" where it is sound."""
    data = path.read_bytes()
    place = [body for command, body in _commands(data) if command == LC_CODE_SIGNATURE]
    if not place:
        return "has no signature"
    at, size = struct.unpack_from("<II", place[0], 8)
    blob = data[at : at + size]
    if len(blob) < 12 or struct.unpack_from(">I", blob)[0] != SIGNATURE:
        return "has a signature that cannot be read"
    entries = struct.iter_unpack(">II", blob[12 : 12 + 8 * struct.unpack_from(">I", blob, 8)[0]])
    directories = [
        blob[start:]
        for _, start in entries
        if struct.unpack_from(">I", blob, start)[0] == DIRECTORY
    ]
    if not directories:
        return "has a signature without hashes"
    _, _, _, flags, hashes, _, _, slots, limit = struct.unpack_from(">9I", directories[0])
    length, kind, _, page = struct.unpack_from(">4B", directories[0], 36)
    if not flags & ADHOC:
        return "has a signature that is not ad hoc"
    if (kind, length) != (SHA256, 32) or limit != at or slots != -(-limit >> page):
        return "has a signature that does not cover it with SHA-256"
    for slot in range(slots):
        block = data[slot << page : min(limit, slot + 1 << page)]
        if hashlib.sha256(block).digest() != directories[0][hashes + 32 * slot :][:32]:
            return "was changed after it was signed"
    return ""
