"""The timings of a self-test: our ops against eager on one device, as a record of bench.

The candidates, the clock and the judge are those of ``fusedops bench``. The limit of a CPU is what
that measures; of another device, its bytes at the speed of a plain copy of a large tensor there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

import fusedops
from fusedops.bench.measure import NOISE, Entry, limits_of, limits_on, measure
from fusedops.bench.peers import PEERS
from fusedops.bench.record import Case, Record, Regime, Result
from fusedops.selftest.report import emulated, machine

__all__ = ["CASES", "record", "results"]

# A shape that is bound by memory, one by arithmetic, and the few rows of a decode step.
CASES = (
    ("rope", "article/rope"),
    ("rope", "llama-3-8b/prefill-512"),
    ("rope_qk", "llama-3-8b/prefill-2048"),
    ("rope_qk", "llama-3-8b/decode"),
    ("gelu", "article/gelu"),
    ("gelu_linear", "bert-base/128"),
    ("gelu_linear", "bert-large/512"),
    ("gelu_linear", "small/1-rows-1024"),
    ("gelu_linear", "small/4-rows-1024"),
)
DTYPES = ("f32", "f16", "bf16")


def results(
    device: str, *, seconds: float, status: Callable[[str], None] = lambda text: None
) -> Iterator[Result]:
    """Each case when it is measured.

    Raises:
        RuntimeError: the device is an emulator, which has no speed.
    """
    if emulated(device):
        raise RuntimeError(
            f"[selftest] --bench must time a real device but got an emulated {device}"
        )
    entries = [replace(Entry.of(PEERS[name]), device=device) for name in ("fusedops", "eager")]
    isa = fusedops.isa.current() if device == "cpu" else device
    threads = torch.get_num_threads() if device == "cpu" else 1
    for op, shape in CASES:
        for dtype in DTYPES:
            status(f"{op} {shape} {dtype}")
            case = Case(op, shape, dtype, Regime(), threads, isa)
            yield measure(case, entries, seconds=seconds, noise=NOISE)


def record(device: str, found: list[Result], command: str) -> Record:
    """What ``fusedops bench`` reads, compares and draws."""
    limits = limits_of(torch.get_num_threads()) if device == "cpu" else limits_on(device)
    return Record(machine(device), limits.table(), command, tuple(found))
