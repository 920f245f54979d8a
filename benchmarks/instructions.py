"""Instructions per element and per flop, counted in the loops that the compiler made.

    python benchmarks/instructions.py            print the rows of the builds for each machine
    python benchmarks/instructions.py --write    put them into benchmarks/results/instructions.csv

No time is measured: of a machine that nobody here has, this is what is known. A row is the
innermost loop of a kernel that does the most for an instruction: what it executes, loads and uses.
"""

from __future__ import annotations

import csv
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks/results/instructions.csv"
TOOLS = ROOT / "build/cross/bin"
MACHINES = ("x86_64", "aarch64")
SIZES = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2}


class Row(NamedTuple):
    """One loop. `work` elements or flops take `instructions`, `loads` of them from memory."""

    machine: str
    compiler: str
    isa: str
    kernel: str
    unit: str
    work: int
    instructions: int
    loads: int
    registers: int

    @property
    def loop(self) -> tuple[str, str, str, str]:
        """What tells rows apart."""
        return self.machine, self.compiler, self.isa, self.kernel

    @property
    def each(self) -> float:
        """Instructions for one element or flop."""
        return self.instructions / self.work


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


# --- what objdump prints -------------------------------------------------------------------------


def functions(objdump: str, path: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """(demangled name, instructions) of every function of an object."""
    text = subprocess.run(
        [objdump, "-d", "-C", "--no-show-raw-insn", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for block in text.split("\n\n"):
        head, _, body = block.strip().partition("\n")
        name = re.match(r"[0-9a-f]+ <(.*)>:$", head)
        if name is not None:
            found = re.findall(r"^ *([0-9a-f]+):\t(\S+)(?:[ \t]+(.*))?$", body, re.M)
            yield name[1], [Instruction(int(a, 16), n, o) for a, n, o in found]


def innermost_loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """From the target of a jump back to the jump, where no other such loop lies between.

    One that only asks for memory ahead does not count as such; its instructions do, once.
    """
    places = {instruction.address: i for i, instruction in enumerate(code)}
    back = []
    for i, (address, name, operands) in enumerate(code):
        if re.match(r"j[a-z]+$|b(\.\w+)?$|cbn?z$|tbn?z$", name):
            target = re.search(r"([0-9a-f]+) <", operands)
            start = places.get(int(target[1], 16)) if target else None
            if start is None or int(target[1], 16) > address:  # type: ignore[index]
                continue
            if any(map(flops, code[start : i + 1])):
                back.append((start, i))
    for start, end in back:
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in back):
            yield code[start : end + 1]


# --- what an instruction does --------------------------------------------------------------------

ARM_LANES = {"4s": 4, "2d": 2, "2s": 2}
X86_BYTES = {"x": 16, "y": 32, "z": 64}


def x86_bytes(operands: str) -> int:
    """Of the widest vector register that is named."""
    return max((X86_BYTES[kind] for kind in re.findall(r"%([xyz])mm", operands)), default=0)


def flops(instruction: Instruction) -> int:
    _, name, operands = instruction
    if name.startswith("f") or name == "bfdot":
        lanes = re.match(r"v\d+\.(4s|2d|2s)", operands)
        if lanes is None:
            return 0
        each = {"fmla": 2, "fmls": 2, "fmul": 1, "fadd": 1, "fsub": 1, "bfdot": 4}
        each |= {"fmlal": 2, "fmlal2": 2}
        return ARM_LANES[lanes[1]] * each.get(name, 0)
    if name == "vdpbf16ps":
        return x86_bytes(operands) // 4 * 4
    match = re.match(r"v?(fn?m(?:add|sub)\d+|mul|add|sub)(ps|pd)$", name)
    if match is None:
        return 0
    return x86_bytes(operands) // (4 if match[2] == "ps" else 8) * (2 if match[1][0] == "f" else 1)


def is_product(instruction: Instruction) -> bool:
    return bool(re.match(r"v?mulp[sd]$|fmul$", instruction.name)) and flops(instruction) > 0


def stored_bytes(instruction: Instruction) -> int:
    _, name, operands = instruction
    arm = re.match(r"st(r|ur|p|1)$", name) and re.match(r"\{?([qds]|v)\d+", operands)
    if arm:
        width = {"q": 16, "d": 8, "s": 4, "v": 16}[arm[1]]
        return width * (2 if name == "stp" else 1)
    if re.match(r"v?(mov|extract|cvtps2ph|pmov)", name) and operands.endswith(")"):
        if not re.search(r"%[xyz]mm", operands.split("(")[0]):
            return 0
        if re.match(r"v?mov(q|lps|lpd|hps|hpd)$", name):
            return 8
        if re.match(r"v?cvtps2ph|vpmovdw", name):
            return x86_bytes(operands) // 2
        return 16 if "extract" in name else x86_bytes(operands)
    return 0


def loads(instruction: Instruction) -> int:
    """Vector registers that are read from memory."""
    _, name, operands = instruction
    if "%" in operands:
        vector = re.search(r"%[xyz]mm", operands)
        return int(bool(vector) and "(" in operands and not operands.endswith(")"))
    if not (re.match(r"ld[rup1]\w*$", name) and re.match(r"\{?[qdsv]\d+", operands)):
        return 0
    return 2 if name == "ldp" else 1


def registers(loop: list[Instruction]) -> int:
    """How many vector registers the loop names."""
    names = " ".join(operands for _, _, operands in loop)
    return len({*re.findall(r"%[xyz]mm(\d+)", names), *re.findall(r"\b[vqds](\d+)\b", names)})


# --- the kernels ---------------------------------------------------------------------------------


def rope_kernels(name: str, code: list[Instruction]) -> Iterator[tuple[str, str, int, list, int]]:
    types = {"float": "f32", "double": "f64"}
    match = re.search(r"::rotate_run<([\w:]+), ([\w:]+), .*?::Adjacent<(\w+), (\w+)>", name)
    if match is None:
        return
    x, table = (types.get(t, t.rpartition(":")[2]) for t in match.groups()[:2])
    pairs = "neighbours" if match[3] == "true" else "halves"
    stores = ", around the caches" if match[4] == "true" else ""
    for loop in innermost_loops(code):
        stored = sum(map(stored_bytes, loop))
        if stored and any(map(is_product, loop)):
            kernel = f"rope {x} with {table} tables, {pairs}{stores}"
            yield kernel, "element", stored // SIZES[x], loop, 0


def matmul_kernels(name: str, code: list[Instruction]) -> Iterator[tuple[str, str, int, list, int]]:
    types = "float|double|fusedops::f16|fusedops::bf16"
    match = re.search(rf"::(\w*tile\w*|dot_vector)<({types})\b(?:, (\d+), (\d+))?", name)
    if match is None:
        return
    dtype = {"float": "f32", "double": "f64"}.get(match[2], match[2].rpartition(":")[2])
    source = re.search(r"Source\)(\d)", name)
    panels = ("", ", panels shared", ", panels streamed")[int(source[1]) if source else 0]
    placed = ", rows in place" if "::RowsInPlace<" in name else ""
    for loop in innermost_loops(code):
        total = sum(map(flops, loop))
        if total:
            sums = int(match[3]) * int(match[4]) if match[1] == "tile" else 0
            yield f"linear {dtype}, {match[1]}{panels}{placed}", "flop", total, loop, sums


def gelu_kernels(name: str, code: list[Instruction]) -> Iterator[tuple[str, str, int, list, int]]:
    """Where the compiler made it a function of its own: else nothing tells GELU from the others."""
    match = re.search(r"::forward<([\w:]+)>\(.*::operator\(\)<[^ ]*(?: [^ ]*)?::Gelu<", name)
    if match is None:
        return
    dtype = {"float": "f32"}.get(match[1], match[1].rpartition(":")[2])
    for loop in innermost_loops(code):
        # What goes to the stack, tables by st1 among it, is no result.
        results = (
            i for i in loop if not re.search(r"\(%r[sb]p|\[sp", i.operands) and i.name != "st1"
        )
        stored = sum(map(stored_bytes, results))
        if stored:
            yield f"gelu {dtype}", "element", stored // SIZES[dtype], loop, 0


def count(machine: str, folder: Path, objdump: str) -> list[Row]:
    """The main loop of every kernel of an instruction set.

    It asks for memory ahead, which those of the last elements do not, belongs to the largest tile
    and is the longest of it, and does the most for an instruction.
    """
    best: dict[str, tuple[tuple[bool, int, int, float], Row]] = {}
    isa, compiler = folder.name.removeprefix("isa_"), compiler_of(folder / "kernels/rope.o")
    every = ((rope_kernels, "rope"), (matmul_kernels, "linear"), (gelu_kernels, "gelu"))
    for kernels, source in every:
        for name, code in functions(objdump, folder / f"kernels/{source}.o"):
            for kernel, unit, work, loop, sums in kernels(name, code):
                costs = len(loop), sum(map(loads, loop)), registers(loop)
                asks = any(i.name.startswith(("prefetch", "prfm")) for i in loop)
                row = Row(machine, compiler, isa, kernel, unit, work, *costs)
                rank = not asks, -sums, -work if sums else 0, row.each
                if kernel not in best or rank < best[kernel][0]:
                    best[kernel] = rank, row
    return [best[kernel][1] for kernel in sorted(best)]


def compiler_of(path: Path) -> str:
    """What the object says about who made it."""
    command = ["readelf", "-p", ".comment", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"(GCC|clang)\D.*?(\d+\.\d+)", text)
    return f"{match[1]} {match[2]}" if match else "unknown"


def measure(machine: str) -> list[Row]:
    """The rows of what is built here for a machine; none without objdump for it."""
    native = machine == platform.machine()
    objdump = (
        shutil.which("objdump") if native else shutil.which(TOOLS / f"{machine}-linux-gnu-objdump")
    )
    folder = ROOT / "build" / ("ninja" if native else f"ninja-linux-{machine}")
    built = [path.parents[1] for path in sorted(folder.glob("isa_*/kernels/rope.o"))]
    return [row for isa in built if objdump for row in count(machine, isa, objdump)]


def read() -> list[Row]:
    """The rows on record."""
    with RECORD.open(newline="") as file:
        _, *lines = csv.reader(file)
    return [Row(*line[:5], *map(int, line[5:])) for line in lines]


def write(rows: list[Row]) -> None:
    with RECORD.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Row._fields, *rows])


def main(*arguments: str) -> None:
    rows = [row for machine in MACHINES for row in measure(machine)]
    if arguments == ("--write",):
        write(rows)
    for row in rows:
        per_load = row.work / max(row.loads, 1)
        print(
            f"{row.machine:8} {row.isa:11} {row.kernel:42} {row.each:7.3f} per {row.unit:8}"
            f" {row.instructions:4} instructions, {per_load:6.1f} {row.unit}s a load,"
            f" {row.registers} registers"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
