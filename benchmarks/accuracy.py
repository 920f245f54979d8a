"""The largest error of every activation on every instruction set: measured, and as a page.

    python benchmarks/accuracy.py                  samples; prints, seconds
    python benchmarks/accuracy.py --write          every float of size 2^-6 to 2^7, every 17th
                                                   of the others; writes results/accuracy, minutes
    python benchmarks/accuracy.py --exhaustive     all 2^32; writes it too, 15 minutes

The kernels are those of the installed library, called through the public functions. The reference
is exact.cpp in double (libm's erfc and exp), compiled here by the compiler of the kernels.
`make docs` writes docs/accuracy.md from the record.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fusedops
from fusedops.testing import DTYPES

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "accuracy"
CHUNK = 1 << 20
WRITE_STRIDE, NARROW_STRIDE = 17, 1009
VARIANTS = ("gelu", "gelu_tanh", "gelu_quick", "silu")  # in the order of exact.cpp
Floats = np.ndarray[Any, np.dtype[np.float32]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Worst:
    """The largest error, in ulp, and where it is."""

    ulp: float
    x: float


class Exact:
    """exact.cpp, compiled and loaded."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(ROOT))
        import setup as build

        path = folder / "exact.so"
        source = str(ROOT / "benchmarks/exact.cpp")
        flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared"]
        subprocess.run([*build.compiler().split(), *flags, source, "-o", str(path)], check=True)
        self.library = ctypes.CDLL(str(path))

    def values(self, variant: str, x: Floats) -> Doubles:
        """The true results, to less than an ulp of double."""
        y = np.empty(x.size)
        kind = VARIANTS.index(variant)
        self.library.exact_values(kind, _pointer(x), _pointer(y), ctypes.c_int64(x.size))
        return y

    def worst(self, x: Floats, exact: Doubles, actual: Floats) -> Worst:
        """The largest error of float32 results."""
        out = np.zeros(2)
        count = ctypes.c_int64(x.size)
        self.library.worst_error(
            _pointer(x), _pointer(exact), _pointer(actual), count, _pointer(out)
        )
        return Worst(float(out[0]), float(out[1]))


def _pointer(a: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    assert a.flags.c_contiguous
    return ctypes.c_void_p(a.ctypes.data)


def by_library(variant: str, x: Tensor) -> Tensor:
    """Of a vector; silu is an activation of linear alone: with one input, 1, x is the weight."""
    if variant == "silu":
        return fusedops.linear(x.new_ones(1, 1), x.unsqueeze(1), activation="silu").flatten()
    approximate = {"gelu": "none", "gelu_tanh": "tanh", "gelu_quick": "quick"}[variant]
    return fusedops.gelu(x, approximate=approximate)


def floats(first: int, last: int, stride: int) -> Iterator[Floats]:
    """The floats of bit patterns first, first + stride, ..., below last, in chunks."""
    for begin in range(first, last, CHUNK * stride):
        end = min(last, begin + CHUNK * stride)
        yield np.arange(begin, end, stride, dtype=np.uint64).astype(np.uint32).view(np.float32)


def sweep(stride: int) -> Iterator[Floats]:
    """Every stride-th float; for --write all of size 2^-6 to 2^7 as well, where the maxima are."""
    if stride == WRITE_STRIDE:
        for first, last in ((0x3C800000, 0x43000000), (0xBC800000, 0xC3000000)):
            yield from floats(first, last, 1)
    yield from floats(0, 1 << 32, stride)


def measure(
    exact: Exact, stride: int, each: Callable[[int], None] = lambda chunks: None
) -> dict[str, dict[str, Worst]]:
    """By variant and instruction set, over every stride-th bit pattern."""
    isas = fusedops.isa.supported()
    found = {v: {isa: Worst(0.0, 0.0) for isa in isas} for v in VARIANTS}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for i, x in enumerate(sweep(stride)):
            references = list(pool.map(lambda v, x=x: exact.values(v, x), VARIANTS))
            for isa in isas:
                with fusedops.isa.use(isa):
                    actual = [by_library(v, torch.from_numpy(x)).numpy() for v in VARIANTS]
                for v, worst in zip(
                    VARIANTS,
                    pool.map(exact.worst, [x] * len(VARIANTS), references, actual),
                    strict=True,
                ):
                    found[v][isa] = max(found[v][isa], worst, key=lambda w: w.ulp)
            each(i + 1)
    return found


# --- 16 bits --------------------------------------------------------------------------------------


def as_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Input [n, 3] and weight [1, 3] of a 16-bit dtype whose product is x [n], without rounding.

    24 bits are three parts of 8 or 11; float16's are moved into its range.
    """
    step = 2.0**-11 if dtype == torch.float16 else 1.0
    parts, rest, scale = [], x.double(), 1.0
    for _ in range(3):
        part = (rest / scale).to(dtype)
        parts.append(part)
        rest = rest - part.double() * scale
        scale *= step
    assert (rest == 0).all()
    return torch.stack(parts, 1), torch.tensor([[1.0, step, step * step]], dtype=dtype)


def narrow_floats(stride: int) -> Tensor:
    """Every stride-th float32 of size 2^-8 to 15, both signs: sums of a 16-bit linear."""
    low, high = 0x3B800000, 0x41700000
    positive = torch.arange(low, high, stride, dtype=torch.int32).view(torch.float32)
    return torch.cat((positive, -positive))


def narrow_error(exact: Exact, variant: str, x: Tensor, y: Tensor) -> float:
    """The largest error in ulp of y's dtype; half an ulp is the rounding's."""
    info = torch.finfo(y.dtype)
    true = torch.from_numpy(exact.values(variant, x.float().numpy()))
    power = torch.exp2(true.abs().clamp_min(info.smallest_normal).log2().floor())
    error = (y.double() - true).abs() / (power * info.eps)
    good = (y.double() == true) | true.isnan() | (true.abs() >= info.max)
    return float(torch.where(good, 0.0, error).max())


def measure_narrow(exact: Exact, stride: int) -> dict[str, dict[str, dict[str, float]]]:
    """By dtype, variant and instruction set, over float32 sums."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    x = narrow_floats(stride)
    for name in ("f16", "bf16"):
        rows, weight = as_rows(x, DTYPES[name])
        found[name] = {v: {} for v in VARIANTS}
        for isa in fusedops.isa.supported():
            with fusedops.isa.use(isa):
                for v in VARIANTS:
                    y = fusedops.linear(rows, weight, activation=v).flatten()
                    found[name][v][isa] = narrow_error(exact, v, x, y)
    return found


# --- the record and its page ----------------------------------------------------------------------


def write(found: dict[str, dict[str, Worst]], narrow: Any, stride: int) -> Path:
    """The record of this kind of processor; stride is that of found."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    record = {
        "stride": stride,
        "libc": " ".join(platform.libc_ver()),
        "f32": {
            v: {isa: [round(w.ulp, 3), w.x] for isa, w in by_isa.items()}
            for v, by_isa in found.items()
        },
        "narrow_stride": NARROW_STRIDE,
        "narrow": {
            dtype: {v: {isa: round(e, 4) for isa, e in of.items()} for v, of in by.items()}
            for dtype, by in narrow.items()
        },
    }
    path = RECORDS / f"{platform.machine()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def recorded() -> dict[str, Any]:
    """The record of this kind of processor."""
    record: dict[str, Any] = json.loads((RECORDS / f"{platform.machine()}.json").read_text())
    return record


def page() -> str:
    """docs/accuracy.md: every record as tables."""
    parts = [PAGE]
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text())
        isas = list(record["f32"][VARIANTS[0]])
        head = f"| activation | `{'` | `'.join(isas)}` |\n|{' --- |' * (len(isas) + 1)}"
        rows = [
            f"| `{v}` | " + " | ".join(f"{ulp:.2f} at {x:.7g}" for ulp, x in by_isa.values()) + " |"
            for v, by_isa in record["f32"].items()
        ]
        parts.append(
            f"## {path.stem}\n\nAgainst {record['libc']}. float32, {_how_many(record['stride'])},"
            " largest error\nin ulp of the true result and where it is:\n\n"
            + "\n".join([head, *rows])
        )
        head = head.replace("| activation |", "| dtype | activation |") + " --- |"
        rows = [
            f"| {dtype} | `{v}` | " + " | ".join(f"{ulp:.4f}" for ulp in of.values()) + " |"
            for dtype, by in record["narrow"].items()
            for v, of in by.items()
        ]
        parts.append(
            "float16 and bfloat16, float32 sums of size 2^-8 to 15, every "
            f"{record['narrow_stride']}th bit pattern, in ulp of the\nresult's dtype (0.5 is the "
            "rounding):\n\n" + "\n".join([head, *rows])
        )
    return "\n\n".join(parts) + "\n"


def _how_many(stride: int) -> str:
    if stride == 1:
        return "every one of the 2^32 floats (`python benchmarks/accuracy.py --exhaustive`)"
    return (
        f"every float of size 2^-6 to 2^7 and every {stride}th\nof the others "
        "(`python benchmarks/accuracy.py --write`)"
    )


PAGE = """# Accuracy

Written by `make docs`; do not edit.

The largest error of every activation, on every instruction set. The reference is computed in
double with libm's `erfc` and `exp` (`benchmarks/exact.cpp`). Subnormal results, signed zeros,
infinities and NaN are included. The tests repeat thinned sweeps, the neighbourhood of each
maximum in this table, and all 65,536 values of float16 and bfloat16 on every run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="most floats; writes the record")
    parser.add_argument("--exhaustive", action="store_true", help="all floats; writes the record")
    options = parser.parse_args()

    def progress(chunks: int) -> None:
        print(f"\r{chunks} Mi floats", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        exact = Exact(Path(folder))
        stride = 1 if options.exhaustive else WRITE_STRIDE if options.write else 4099
        found = measure(exact, stride, progress)
        narrow = measure_narrow(exact, NARROW_STRIDE)
    print(file=sys.stderr)
    for v, by_isa in found.items():
        for isa, worst in by_isa.items():
            print(f"f32 {v:10} {isa:12} {worst.ulp:.3f} ulp at {worst.x!r}")
    for dtype, by in narrow.items():
        for v, of in by.items():
            for isa, ulp in of.items():
                print(f"{dtype:4} {v:10} {isa:12} {ulp:.4f} ulp")
    if stride < 4099:
        print(f"written: {write(found, narrow, stride).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
