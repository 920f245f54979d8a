"""The speed that must hold, each bar with its figure; exits 1 when one falls short.

    python benchmarks/bars.py

All candidates of a bar run interleaved in this process; a ratio is the median over the rounds.
Take it on a quiet machine: anything else that computes is measured as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timing import Measurement, interleaved

import fusedops
from fusedops.ladder import get
from fusedops.testing import DTYPES, SPECS

CALLS = 2000  # of one tiny candidate in a round


@dataclass(frozen=True)
class Bar:
    """``figure`` of the measurements, ours under "ours", must reach (or stay below) ``bound``."""

    what: str
    candidates: Mapping[str, Callable[[], Any]]
    figure: Callable[[Mapping[str, Measurement]], float]
    bound: float
    at_most: bool = False

    def check(self) -> bool:
        value = self.figure(interleaved(self.candidates, label=self.what, least=15))
        holds = value <= self.bound if self.at_most else value >= self.bound
        sign = "<=" if self.at_most else ">="
        print(f"{'ok    ' if holds else 'FAILED'} {value:8.2f} {sign} {self.bound:<5g} {self.what}")
        return holds


def faster_than(peer: str) -> Callable[[Mapping[str, Measurement]], float]:
    return lambda m: m["ours"].times_faster_than(m[peer]).median


def rope_bars() -> list[Bar]:
    call = SPECS["rope"].sample("article/rope").build(torch.float32)
    x, cos, sin = call.args[:3]
    out, copy = torch.empty_like(x), torch.empty_like(x)
    peers = {name: get("rope", name) for name in ("eager", "compile")}
    fresh: dict[str, Callable[[], Any]] = {
        name: lambda rung=rung: rung(x, cos, sin) for name, rung in peers.items()
    }
    fresh["ours"] = lambda: fusedops.rope(x, cos, sin)
    warm = {
        "ours": lambda: fusedops.rope(x, cos, sin, out=out),
        "copy": lambda: copy.copy_(x),
    }
    size = "rope [1, 32, 2048, 128] f32"
    return [
        Bar(f"{size}, fresh output: times eager", fresh, faster_than("eager"), 5),
        Bar(f"{size}, fresh output: times torch.compile", fresh, faster_than("compile"), 3),
        Bar(
            f"{size}, given output: of the time of copy_",
            warm,
            lambda m: 1 / faster_than("copy")(m),
            1.5,
            at_most=True,
        ),
    ]


def call_bars() -> list[Bar]:
    x, table = torch.randn(1, 8, 1, 64), torch.rand(2048, 32)

    def repeated() -> None:
        for _ in range(CALLS):
            fusedops.rope(x, table, table, offset=77)

    return [
        Bar(
            "rope [1, 8, 1, 64] f32, decode: us a call",
            {"ours": repeated},
            lambda m: 1e6 * m["ours"].quantiles().median / CALLS,
            4,
            at_most=True,
        )
    ]


def gelu_linear_bars() -> list[Bar]:
    bars = []
    for dtype, bound in (("f32", 1.0), ("bf16", 1.0), ("f16", 3.0)):
        x, w, b = (torch.randn(*s).to(DTYPES[dtype]) for s in ((2048, 1024), (4096, 1024), (4096,)))
        candidates: dict[str, Callable[[], Any]] = {
            "eager": lambda args=(x, w, b): get("gelu_linear", "eager")(*args),
            "ours": lambda args=(x, w, b): fusedops.gelu_linear(*args),
        }
        what = f"gelu_linear 2048x1024->4096 {dtype}: times eager"
        bars.append(Bar(what, candidates, faster_than("eager"), bound))
    return bars


def main() -> int:
    with torch.no_grad():
        held = [bar.check() for bar in (*rope_bars(), *call_bars(), *gelu_linear_bars())]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
