"""What this machine can do at best, measured in this process: what every row is held against.

Each figure is the best that was seen: noise only ever slows a probe. Rates of memory count bytes
read and bytes written, at a working set: all bytes that the work touches.
"""

from __future__ import annotations

import math
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

import fusedops
from fusedops import _C
from fusedops.bench.record import Limit, Regime
from fusedops.testing import synchronize

__all__ = ["Calm", "DeviceLimits", "Level", "Limits", "has_matrix_unit", "levels"]

UNITS = {"f16": "f32", "f32": "f32", "f64": "f64", "bf16": "bf16", "int8": "int8"}
_FIRST, _AGAIN = 5, 2  # repeats of a probe
CALM = 0.9  # of the best that the canary was seen to do
RECENT = 5e-3  # seconds that a calm moment is taken to last: what is asked for disturbs the caches


class Level(NamedTuple):
    """A level of memory, and a working set that lies in it."""

    name: str
    bytes: int


def levels(threads: int) -> tuple[Level, ...]:
    """The levels that so many threads use: half of each cache, then four times the last one."""
    found = []
    for level, kind, size, sharers in _C.cache_bytes():
        if kind != "instruction":
            # A private cache is there once for each thread, a shared one as often as it is needed.
            instances = -(-threads // sharers) if sharers else 1
            found.append(Level(f"L{level}", size * instances // 2))
    return (*found, Level("DRAM", min(4 * _C.last_cache_bytes(), _grid()[-1])))


class Limits:
    """The limits for one number of threads and one instruction set.

    A figure is measured when it is first asked for and kept for the process; `for_work` looks again
    each time. Threads and instruction set are switched for a probe and restored after it.

    Args:
        threads: of torch's pool; those in use where None.
        isa: of the probes; the one in use at each call where None.
        progress: told the name of each probe before it runs.
    """

    def __init__(
        self,
        threads: int | None = None,
        isa: str | None = None,
        progress: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1 but got {threads}")
        if isa is not None and isa not in fusedops.isa.supported():
            supported = ", ".join(fusedops.isa.supported())
            raise ValueError(f"isa must be one of {supported} but got {isa!r}")
        self._isa = isa
        self._progress = progress

    @property
    def isa(self) -> str:
        """The instruction set of the probes."""
        return fusedops.isa.current() if self._isa is None else self._isa

    def copy(self, bytes: int, *, cold: bool = False) -> float:
        """Bytes/s of the fastest copy at a working set of so many bytes, half of them written."""
        return self._memory("copy", bytes, cold)

    def read(self, bytes: int, *, cold: bool = False) -> float:
        """Bytes/s of the fastest read."""
        return self._memory("read", bytes, cold)

    def in_place(self, bytes: int, *, cold: bool = False) -> float:
        """Bytes/s of the fastest change of so many bytes where they lie, each read and written."""
        return self._memory("in place", bytes, cold)

    def fresh_copy(self, bytes: int, *, huge: bool = True) -> float:
        """Bytes/s of the fastest copy into memory never touched before, in huge or 4 KiB pages."""
        size = _grid()[_floor(bytes)]
        name = f"fresh copy {'huge' if huge else '4K'}"
        return self._best(name, size, lambda n: _C.probe_fresh_copy(size // 2, min(n, 3), huge))

    def fma(self, dtype: str) -> float:
        """Operations/s of the multiply-adds for kernels of this dtype; f16 has those of f32."""
        return self._multiply_add(dtype)

    def for_work(
        self,
        read: int,
        written: int,
        flops: int,
        dtype: str,
        regime: Regime,
        *,
        matmul: bool = False,
    ) -> Limit:
        """The least time for so many bytes and operations of a forward pass.

        Memory: the reads at the rate of reading, and as much as is both read and written at that of
        a copy (or of a change in place), whichever takes longer; each rate at the working set of
        the whole, because a cache that is a little too small is no cache at all. Training is
        twice the bytes and operations, with a matmul three times the operations; a loop is all of
        its steps. Each call probes
        again, for the best seen.

        Args:
            read: bytes.
            written: bytes.
            flops: operations.
            dtype: a name in `fusedops.testing.DTYPES`, or "int8".
            regime: in place and cold have rates of their own.
            matmul: whether the operations are those of a matmul.
        """
        passes = regime.passes
        cold, both = regime.cache == "cold", min(read, written)
        touched = read if regime.output == "in_place" else read + written
        candidates = []
        if read:
            rate = self._memory("read", touched, cold, again=True)
            reason = f"the bytes that it reads, at {rate / 1e9:.0f} GB/s"
            candidates.append(Limit(passes * read / rate, reason))
        if both and regime.output == "in_place":
            rate = self._memory("in place", touched, cold, again=True)
            reason = f"its bytes at {rate / 1e9:.0f} GB/s, the speed of a change in place"
            candidates.append(Limit(passes * 2 * both / rate, reason))
        elif both:
            rate = self._memory("copy", touched, cold, again=True)
            reason = f"its bytes at {rate / 1e9:.0f} GB/s, the speed of a copy"
            candidates.append(Limit(passes * 2 * both / rate, reason))
        if flops:
            rate = self._multiply_add(dtype, again=True)
            reason = (
                f"its operations at {rate / 1e9:.0f} GFLOP/s, "
                f"the vector units' peak for {UNITS[dtype]}"
            )
            times = 3 if matmul and regime.work == "train" else passes
            candidates.append(Limit(times * flops / rate, reason))
        if not candidates:
            return Limit(0.0, "there is nothing to do")
        return max(candidates, key=lambda limit: limit.seconds)

    def multiply_adds(self, flops: int, dtype: str) -> float:
        """Seconds that so many operations take on registers now, not at the best that was seen."""
        with self._conditions():
            return flops / _C.probe_fma(UNITS[dtype])

    def canary(self) -> float:
        """How fast all threads read the second cache now, as a share of the best that was seen.

        A neighbour on the same core or cache shows here, and not in multiply-adds on registers.
        """
        size = levels(self.threads)[:2][-1].bytes
        best = self.read(size)
        with self._conditions():
            now = _C.probe_read(size, 1, False)
        key = self._key("read", size)
        _seen[key] = max(_seen.get(key, 0.0), now)
        return now / max(best, now)

    def table(self) -> dict[str, float]:
        """Every limit by name ("read L1", "copy DRAM", "fma f32"): bytes/s or operations/s."""
        memory = levels(self.threads)
        probes = (("read", self.read), ("copy", self.copy), ("in place", self.in_place))
        rates = {f"{name} {level}": rate(size) for name, rate in probes for level, size in memory}
        dram = memory[-1].bytes
        rates["fresh copy huge"] = self.fresh_copy(dram // 2)
        rates["fresh copy 4K"] = self.fresh_copy(dram // 2, huge=False)
        return rates | {f"fma {unit}": self.fma(unit) for unit in ("f32", "f64", "bf16", "int8")}

    def _multiply_add(self, dtype: str, again: bool = False) -> float:
        if dtype not in UNITS:
            raise ValueError(f"dtype must be one of {', '.join(UNITS)} but got {dtype!r}")
        unit = UNITS[dtype]
        self._best(f"fma {unit}", 0, lambda _: _C.probe_fma(unit), again)
        return self._no_less(f"fma {unit}", 0)

    def _memory(self, name: str, bytes: int, cold: bool, again: bool = False) -> float:
        if bytes < 1:
            raise ValueError(f"bytes must be at least 1 but got {bytes}")
        if cold:
            grid, at = _grid(), _floor(bytes)
            # The rate is the lower the smaller or the larger the work: the better neighbour.
            near = {at, min(at + (grid[at] < bytes), len(grid) - 1)}
            return max(self._probed(name, grid[i], cold, again) for i in sorted(near))
        size = max(_grid()[0], min(bytes // 1024 * 1024, _grid()[-1]))
        self._probed(name, size, cold, again)
        return self._no_less(name, size)

    def _probed(self, name: str, size: int, cold: bool, again: bool) -> float:
        def probe(repeats: int) -> float:
            if name == "copy":
                return _C.probe_copy(size // 2, repeats, cold)
            if name == "read":
                return _C.probe_read(size, repeats, cold)
            return _C.probe_in_place(size, repeats, cold)

        return self._best(f"{name} cold" if cold else name, size, probe, again)

    def _no_less(self, name: str, size: int) -> float:
        """The best of this probe so far, with more memory and fewer threads as well."""
        return max(
            rate
            for (threads, isa, probe, seen_at), rate in _seen.items()
            if (isa, probe) == (self.isa, name) and threads <= self.threads and seen_at >= size
        )

    def _key(self, name: str, size: int) -> tuple[int, str, str, int]:
        return self.threads, self.isa, name, size

    def _best(
        self, name: str, size: int, probe: Callable[[int], float], again: bool = False
    ) -> float:
        """The best of what this probe has given, now or before."""
        key = self._key(name, size)
        if key not in _seen or again:
            self._progress(f"{name}, {size >> 10} KiB" if size else name)
            repeats = _AGAIN if key in _seen else _FIRST
            with self._conditions():
                _seen[key] = max(_seen.get(key, 0.0), probe(repeats))
        return _seen[key]

    @contextmanager
    def _conditions(self) -> Iterator[None]:
        before = torch.get_num_threads()
        with fusedops.isa.use(self.isa):
            torch.set_num_threads(self.threads)
            try:
                yield
            finally:
                torch.set_num_threads(before)


class Calm:
    """Puts a measurement off while the machine is slower than it was at its best.

    Args:
        limits: whose canary tells.
        patience: seconds of waiting altogether; then measurements begin whatever it says.
    """

    def __init__(self, limits: Limits, patience: float) -> None:
        self._limits, self._left = limits, patience
        self._calm = self._asked = 0
        self._until = -math.inf

    def wait(self) -> None:
        """Return at once where it is calm, was so a moment ago, or the patience has gone."""
        began = perf_counter()
        calm = began < self._until or self._limits.canary() >= CALM
        while not calm and perf_counter() - began < self._left:
            calm = self._limits.canary() >= CALM
        now = perf_counter()
        if calm and now >= self._until:
            self._until = now + RECENT
        self._left -= now - began
        self._calm += calm
        self._asked += 1

    @property
    def share(self) -> float:
        """Of the measurements, those that began in a calm moment."""
        return self._calm / max(self._asked, 1)


class DeviceLimits:
    """The limit of a device other than the CPU: the speed of a plain copy of a large tensor.

    It is the speed of the memory. What fits into the device's caches may be faster, and a matmul
    is bound by its arithmetic, whose peak is not measured.

    Args:
        device: such as "mps".
        bytes: read and written by the copy together.
    """

    def __init__(self, device: str, bytes: int = 1 << 28) -> None:
        self.device, self._bytes = device, bytes

    @cached_property
    def copy(self) -> float:
        """Bytes/s read and written, the best that was seen."""
        source = torch.ones(self._bytes // 8, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        best = math.inf
        for _ in range(_FIRST + _AGAIN):
            synchronize(self.device)
            start = perf_counter()
            target.copy_(source)
            synchronize(self.device)
            best = min(best, perf_counter() - start)
        return 2 * source.numel() * source.element_size() / best

    def for_work(
        self,
        read: int,
        written: int,
        flops: int,
        dtype: str,
        regime: Regime,
        *,
        matmul: bool = False,
    ) -> Limit:
        """As ``Limits.for_work``, by the bytes alone."""
        reason = f"its bytes at {self.copy / 1e9:.0f} GB/s, the speed of a large copy on it"
        return Limit(regime.passes * (read + written) / self.copy, reason)

    def table(self) -> dict[str, float]:
        """As ``Limits.table``."""
        return {"copy DRAM": self.copy}


_seen: dict[tuple[int, str, str, int], float] = {}  # of (threads, isa, probe, working set)


@cache
def _grid() -> tuple[int, ...]:
    """The working sets of cold and fresh probes: 32 KiB to 512 MiB by factors of 1.41.

    The first and the last are the smallest and the largest of all probes, as memory allows.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    steps = (int(2.0 ** (15 + half / 2)) // 1024 * 1024 for half in range(29))
    return tuple(size for size in steps if size <= memory // 4)


def _floor(bytes: int) -> int:
    """Index of the largest working set of the grid that is not larger, or of the smallest one."""
    return max(bisect_right(_grid(), bytes) - 1, 0)


@cache
def has_matrix_unit() -> bool:
    """Whether matmuls can be faster than the vector units' peak: Apple's AMX, Intel's AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    return sys.platform == "darwin" or (cpuinfo.exists() and "amx_tile" in cpuinfo.read_text())
