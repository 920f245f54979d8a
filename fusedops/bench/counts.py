"""How much longer a dense layer may take for its GELU: by instructions, counted in the build.

    1 + (instructions of the GELU) / (multiply-adds), for one vector of the output

The GELU is the loop of ``gelu`` alone, its load and its store included; that loop is in the record
of ``make instructions``. An output vector takes K multiply-adds, half of them where an instruction
adds two products.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["Counts", "counts"]

RECORD = Path(__file__).resolve().parents[2] / "benchmarks/results/instructions.csv"
LANES = {"avx512bf16": 16, "avx512": 16, "avx2": 8}  # float32 of a vector; elsewhere 4
PAIRS = ("avx512bf16", "neon_bf16")  # add two products of bf16


class Counts(NamedTuple):
    """Instructions for one vector of the output."""

    epilogue: float
    products: float

    @property
    def bound(self) -> float:
        """Times as long as the layer without its GELU."""
        return 1.0 + self.epilogue / self.products

    def __str__(self) -> str:
        return f"1 + {self.epilogue:.1f} / {self.products:.0f} instructions a vector"


def counts(k: int, dtype: str, isa: str) -> Counts | None:
    """Of a layer with K inputs; None where the record has no such loop."""
    each = _recorded().get((isa, f"gelu {dtype}"))
    if each is None:
        return None
    pairs = dtype == "bf16" and isa in PAIRS
    return Counts(each * LANES.get(isa, 4), k / 2 if pairs else k)


@cache
def _recorded() -> dict[tuple[str, str], float]:
    """Instructions for an element, by (isa, loop); the least of its compilers.

    Not of the portable kernels, whose name does not say for which machine they were built.
    """
    found: dict[tuple[str, str], float] = {}
    if RECORD.exists():  # it comes with the source, not with the wheel
        with RECORD.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["isa"] != "portable":
                    loop = row["isa"], row["kernel"]
                    each = int(row["instructions"]) / int(row["work"])
                    found[loop] = min(each, found.get(loop, each))
    return found
