"""The products of a linear layer's backward beside PyTorch's: microseconds, medians taken in turn.

    python benchmarks/backward.py [bf16,f32] [N,K] [rows,...]

Where the table lets PyTorch multiply (docs/autotune.md) the ratio is about 1. float16 is
not timed against PyTorch by default: its matmul of such a layer takes seconds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from fusedops._library import ops
from fusedops.testing import DTYPES

SECONDS = 0.5


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds of each call, taking turns for SECONDS."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times["dx"]) < 3:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) * 1e6 for name, taken in times.items()}


def main(dtypes: str = "bf16,f32", size: str = "3072,768", rows: str = "1,4,16,64,512") -> None:
    """Print one line for each dtype and number of rows."""
    n, k = map(int, size.split(","))
    for name in dtypes.split(","):
        for m in map(int, rows.split(",")):
            grad, x, w = (torch.randn(s).to(DTYPES[name]) for s in ((m, n), (m, k), (n, k)))
            took = medians(
                {
                    "dx": lambda: ops.linear_backward_nograd(grad, None, w, False),  # noqa: B023
                    "dx torch": lambda: grad @ w,  # noqa: B023
                    "dw": lambda: ops.linear_backward_nograd(grad, x, None, False),  # noqa: B023
                    "dw torch": lambda: grad.t() @ x,  # noqa: B023
                }
            )
            figures = "  ".join(f"{what} {t:.0f}" for what, t in took.items())
            dx, dw = (took[f"{what} torch"] / took[what] for what in ("dx", "dw"))
            print(f"{name} {m}x{k}->{n}: {figures}  |  dx {dx:.2f}x  dw {dw:.2f}x")


if __name__ == "__main__":
    main(*sys.argv[1:])
