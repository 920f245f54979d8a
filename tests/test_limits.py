"""The limits: that the probes do the work they are timed for, what is made of them, and `info`.

No figure is compared with another one: a busy machine must not fail a test.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_fakes import Clock
from helpers import assert_refused

import fusedops
from fusedops import _C
from fusedops.bench import info, limits
from fusedops.bench.limits import RECENT, Calm, Level, Limits, has_matrix_unit, levels
from fusedops.bench.record import Limit, Regime

BLOCK = 512  # bytes: what every probe works in
ROOT = Path(fusedops.__file__).resolve().parent.parent


@pytest.fixture
def nothing_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure of an earlier test."""
    monkeypatch.setattr(limits, "_seen", {})


# --- what a probe does ----------------------------------------------------------------------------


def aligned(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The values where a probe takes them: torch aligns to 64 bytes."""
    array: np.ndarray[Any, np.dtype[np.float32]] = torch.empty(len(values)).numpy()
    array[:] = values
    return array


def numbers(blocks: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Whole numbers whose sums are exact in float32 in any order."""
    return aligned(np.random.default_rng(0).integers(0, 64, blocks * BLOCK // 4))


def ways(probe: str) -> Any:
    return pytest.mark.parametrize("way", _C.probe_ways(probe))


# 1 block is less than there are threads, 41 is not a multiple of the 4 places.
each_size = pytest.mark.parametrize("blocks", [1, 41])


@each_size
@ways("copy")
def test_copy_copies(way: str, blocks: int, isa: str) -> None:
    source, target = numbers(blocks), aligned(np.full(blocks * BLOCK // 4, -1))
    before = source.copy()
    _C.probe_once("copy", way, source, target)
    assert np.array_equal(target, before)
    assert np.array_equal(source, before)


@each_size
@ways("read")
def test_read_reads(way: str, blocks: int, isa: str) -> None:
    source = numbers(blocks)
    assert _C.probe_once("read", way, source, aligned(source)) == source.sum(dtype=np.float64)


@ways("read")
def test_read_reads_every_element(way: str, isa: str) -> None:
    powers = 2.0 ** (np.arange(5 * BLOCK // 4) % 24)  # a missing one shows, wherever it is
    for block in range(5):
        source = aligned(np.zeros(5 * BLOCK // 4))
        part = slice(block * BLOCK // 4, block * BLOCK // 4 + 24)
        source[part] = powers[:24]
        assert _C.probe_once("read", way, source, aligned(source)) == 2.0**24 - 1


@each_size
@ways("in_place")
def test_in_place_changes_each_element_once(way: str, blocks: int, isa: str) -> None:
    target = numbers(blocks)
    expected = target + 1
    _C.probe_once("in_place", way, aligned(target), target)
    assert np.array_equal(target, expected)


RATES: dict[str, Callable[[], float]] = {
    "copy": lambda: _C.probe_copy(1 << 15, 1),
    "read": lambda: _C.probe_read(1 << 15, 1),
    "in_place": lambda: _C.probe_in_place(1 << 15, 1),
    "fresh": lambda: _C.probe_fresh_copy(1 << 20, 1),
    "fresh 4K": lambda: _C.probe_fresh_copy(1 << 20, 1, huge=False),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Quick on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("probe", RATES)
@pytest.mark.usefixtures("one_thread")
def test_probe_gives_a_rate(probe: str, isa: str) -> None:
    rate = RATES[probe]()
    assert math.isfinite(rate)
    assert rate > 0


@pytest.mark.parametrize("probe", [_C.probe_copy, _C.probe_read, _C.probe_in_place])
@pytest.mark.usefixtures("one_thread")
def test_cold_probe_gives_a_rate(probe: Callable[..., float]) -> None:
    rate = probe(BLOCK, 1, cold=True)
    assert math.isfinite(rate)
    assert rate > 0


def test_all_threads_give_a_rate() -> None:
    assert 0 < _C.probe_read(1 << 15, 1) < math.inf
    assert 0 < _C.probe_fma() < math.inf


# Registers cannot do more than this: 8 pipes of 64 bytes at 10 GHz; a loop that was optimised away
# is far beyond it.
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "int8"])
@pytest.mark.usefixtures("one_thread")
def test_multiply_adds_are_executed(dtype: str, isa: str) -> None:
    bytes_each = {"f32": 4, "f64": 8, "bf16": 2, "int8": 1}[dtype]
    most = 2 * 8 * 64 / bytes_each * 10e9
    assert 0 < _C.probe_fma(dtype) < most


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "int8"])
def test_unit_is_named(dtype: str, isa: str) -> None:
    assert {"f32": "f32", "f64": "f64"}.get(dtype, "") in _C.fma_unit(dtype)
    assert ("vpdpbusd" in _C.fma_unit(dtype)) == (isa == "avx512bf16" and dtype == "int8")
    assert ("bf16" in _C.fma_unit(dtype)) == (isa == "avx512bf16" and dtype == "bf16")


MOST = 2**62
A, B = numbers(1), numbers(2)


@pytest.mark.parametrize("probe", ["copy", "read", "in_place", "fresh_copy"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BLOCK - 1,), "bytes must be at least 512 but got 511"),
        ((-1,), "bytes must be at least 512 but got -1"),
        ((BLOCK, 0), "repeats must be at least 1 but got 0"),
    ],
)
def test_size_of_a_probe_is_checked(probe: str, arguments: tuple[int, ...], message: str) -> None:
    call = getattr(_C, f"probe_{probe}")
    assert_refused(lambda: call(*arguments), f"[probe_{probe}] {message}")


@pytest.mark.parametrize("probe", ["copy", "read", "in_place", "fresh_copy"])
def test_more_than_the_memory_is_refused(probe: str) -> None:
    call = getattr(_C, f"probe_{probe}")
    with pytest.raises(
        RuntimeError, match=rf"\[probe_{probe}\] bytes must be at most a quarter of"
    ):
        call(MOST)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: _C.probe_ways("write"),
            "[probe] name must be 'copy', 'read' or 'in_place' but got 'write'",
        ),
        (
            lambda: _C.probe_once("copy", "magic", A, A),
            "[probe_once] way must be one of probe_ways('copy') but got 'magic'",
        ),
        (
            lambda: _C.probe_once("copy", "stores", A, B),
            "[probe_once] source and target must have one size but got 128 and 256",
        ),
        (
            lambda: _C.probe_once("copy", "stores", A[:64], A[64:]),
            "[probe_once] the arrays must hold a multiple of 512 bytes but got 256",
        ),
        (
            lambda: _C.probe_once("copy", "stores", B[1:129], B[1:129]),
            "[probe_once] the arrays must be aligned to 64 bytes but got others",
        ),
        (
            lambda: _C.probe_fma("f16"),
            "[probe_fma] dtype must be 'f32', 'f64', 'bf16' or 'int8' but got 'f16'",
        ),
        (
            lambda: _C.fma_unit("f8"),
            "[probe_fma] dtype must be 'f32', 'f64', 'bf16' or 'int8' but got 'f8'",
        ),
    ],
)
def test_probe_is_refused(call: Callable[[], Any], message: str) -> None:
    assert_refused(call, message)


# --- caches ---------------------------------------------------------------------------------------

SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")


@pytest.mark.skipif(
    not (SYSFS / "index0/size").exists(), reason="needs the caches of Linux's sysfs"
)
def test_caches_are_those_of_sysfs() -> None:
    expected = []
    for entry in sorted(SYSFS.glob("index*")):
        told = {name: (entry / name).read_text().strip() for name in ("level", "type", "size")}
        size = int(told["size"].removesuffix("K")) << 10
        ranges = (entry / "shared_cpu_list").read_text().strip().split(",")
        ends = [[int(end) for end in text.split("-")] for text in ranges]
        sharers = sum(end[-1] - end[0] + 1 for end in ends)
        expected.append((int(told["level"]), told["type"].lower(), size, sharers))
    assert sorted(_C.cache_bytes()) == sorted(expected)
    level, _, size, _ = max(row for row in _C.cache_bytes() if row[1] != "instruction")
    assert level > 1
    assert _C.last_cache_bytes() == size


def test_last_cache_is_of_the_list() -> None:
    sizes = [
        size for level, kind, size, _ in _C.cache_bytes() if level > 1 and kind != "instruction"
    ]
    assert _C.last_cache_bytes() == (sizes[-1] if sizes else 32 << 20)


def test_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [
        (1, "data", 32 << 10, 1),
        (1, "instruction", 64 << 10, 1),
        (2, "unified", 1 << 20, 2),
        (3, "unified", 16 << 20, 8),
    ]
    monkeypatch.setattr(limits, "_C", FakeProbes(told))
    expected = {"L1": 3 * (16 << 10), "L2": 2 * (512 << 10), "L3": 8 << 20, "DRAM": 64 << 20}
    assert levels(3) == tuple(Level(*level) for level in expected.items())


# --- Limits ---------------------------------------------------------------------------------------


class FakeProbes:
    """Stands for `_C`: rates that tests know, and a list of what was asked."""

    def __init__(self, caches: list[tuple[int, str, int, int]] | None = None) -> None:
        self.caches = caches or [(1, "data", 1 << 15, 1), (2, "unified", 1 << 20, 1)]
        self.asked: list[tuple[Any, ...]] = []
        self.rate = {"copy": 20.0, "read": 50.0, "in_place": 30.0, "fma": 1000.0, "fresh": 2.0}

    def cache_bytes(self) -> list[tuple[int, str, int, int]]:
        return self.caches

    def last_cache_bytes(self) -> int:
        return self.caches[-1][2]

    def _answer(self, name: str, *arguments: Any) -> float:
        state = torch.get_num_threads(), fusedops.isa.current()
        self.asked.append((name, *arguments, *state))
        return self.rate[name]

    def probe_copy(self, size: int, repeats: int, cold: bool) -> float:
        return self._answer("copy", size, cold) / (10 if cold else 1)

    def probe_read(self, size: int, repeats: int, cold: bool) -> float:
        return self._answer("read", size, cold) / (10 if cold else 1)

    def probe_in_place(self, size: int, repeats: int, cold: bool) -> float:
        return self._answer("in_place", size, cold) / (10 if cold else 1)

    def probe_fresh_copy(self, size: int, repeats: int, huge: bool) -> float:
        return self._answer("fresh", size, huge) * (1 if huge else 0.5)

    def probe_fma(self, dtype: str) -> float:
        return self._answer("fma", dtype) * (2 if dtype == "bf16" else 1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, nothing_seen: None) -> FakeProbes:
    probes = FakeProbes()
    monkeypatch.setattr(limits, "_C", probes)
    monkeypatch.setattr(limits, "_grid", lambda: (1000, 2000, 4000, 8000))
    return probes


FORWARD = Regime()


@pytest.mark.parametrize(
    ("read", "written", "flops", "dtype", "regime", "options", "seconds", "reason"),
    [
        (2000, 2000, 0, "f32", FORWARD, {}, 200.0, "copy"),  # 4000 bytes at 20
        (8000, 1000, 0, "f32", FORWARD, {}, 160.0, "reads"),  # 8000 at 50; 2000 at 20 is less
        (8000, 8000, 0, "f32", Regime(output="in_place"), {}, 16000 / 30, "in place"),
        (2000, 2000, 0, "f32", Regime(cache="cold"), {}, 2000.0, "copy"),
        (0, 1000, 0, "f32", FORWARD, {}, 0.0, "nothing"),
        (100, 100, 10**6, "f32", FORWARD, {}, 1000.0, "peak for f32"),
        (100, 100, 10**6, "f16", FORWARD, {}, 1000.0, "peak for f32"),
        (100, 100, 10**6, "bf16", FORWARD, {}, 500.0, "peak for bf16"),
        (2000, 2000, 0, "f32", Regime(work="train"), {}, 400.0, "copy"),
        (100, 100, 10**6, "f32", Regime(work="train"), {}, 2000.0, "peak"),
        (100, 100, 10**6, "f32", Regime(work="train"), {"matmul": True}, 3000.0, "peak"),
        (100, 100, 10**6, "f32", FORWARD, {"matmul": True}, 1000.0, "peak"),
    ],
)
def test_least_time(
    read: int,
    written: int,
    flops: int,
    dtype: str,
    regime: Regime,
    options: dict[str, bool],
    seconds: float,
    reason: str,
    fake: FakeProbes,
) -> None:
    limit = Limits(1).for_work(read, written, flops, dtype, regime, **options)
    assert isinstance(limit, Limit)
    assert limit.seconds == pytest.approx(seconds)
    assert reason in limit.reason


def test_copy_is_asked_for_half_of_the_working_set(fake: FakeProbes) -> None:
    one = Limits(1)
    assert (one.copy(2048), one.read(2048), one.in_place(2048)) == (20.0, 50.0, 30.0)
    assert [call[:2] for call in fake.asked] == [("copy", 1024), ("read", 2048), ("in_place", 2048)]


@pytest.mark.parametrize(("size", "at"), [(1, 1000), (2047, 1024), (3500, 3072), (10**9, 8000)])
def test_working_set_is_rounded_down_to_a_kibibyte(size: int, at: int, fake: FakeProbes) -> None:
    Limits(1).read(size)
    assert fake.asked[0][1] == at


def test_cold_rate_is_of_the_better_neighbour(fake: FakeProbes) -> None:
    Limits(1).read(3000, cold=True)
    assert sorted(call[1] for call in fake.asked) == [2000, 4000]


def test_figure_is_measured_once(fake: FakeProbes) -> None:
    assert Limits(1).read(2048) == Limits(1).read(2500)
    assert len(fake.asked) == 1
    Limits(1, fusedops.isa.supported()[-1]).read(2000)
    Limits(2).read(2000)
    assert len(fake.asked) == 3


def test_work_is_measured_again_and_the_best_is_kept(fake: FakeProbes) -> None:
    one = Limits(1)
    first = one.for_work(2000, 2000, 0, "f32", FORWARD).seconds
    fake.rate["copy"] = 40.0
    better = one.for_work(2000, 2000, 0, "f32", FORWARD).seconds
    fake.rate["copy"] = 10.0
    assert (first, better, one.for_work(2000, 2000, 0, "f32", FORWARD).seconds) == (200, 100, 100)


def test_less_memory_and_more_threads_are_never_slower(fake: FakeProbes) -> None:
    fake.rate["read"] = 70.0
    Limits(1).read(8000)
    fake.rate["read"] = 50.0
    assert Limits(1).read(1000) == 70.0
    assert Limits(2).read(1000) == 70.0
    fake.rate["read"] = 90.0
    assert Limits(2).read(4000) == 90.0
    assert Limits(1).read(4000) == 90.0  # its own probe; of 2 threads it knows nothing
    assert Limits(2).read(8000) == 90.0
    fake.rate["fma"] = 1.0
    assert Limits(2).fma("f32") == 1.0


@pytest.mark.parametrize("fails", [False, True])
def test_threads_and_isa_are_set_and_restored(fails: bool, fake: FakeProbes) -> None:
    before, isa = torch.get_num_threads(), fusedops.isa.supported()[-1]
    if fails:
        fake.rate.clear()
        with pytest.raises(KeyError):
            Limits(before + 1, isa).read(1000)
    else:
        Limits(before + 1, isa).read(1000)
    assert fake.asked[0][-2:] == (before + 1, isa)
    assert (torch.get_num_threads(), fusedops.isa.current()) == (
        before,
        fusedops.isa.supported()[0],
    )


def test_canary_is_the_second_cache_as_a_share_of_its_best(fake: FakeProbes) -> None:
    one = Limits(1)
    assert one.canary() == 1.0
    assert fake.asked[-1][:2] == ("read", 1 << 19)  # half of the second cache
    fake.rate["read"] = 40.0
    assert one.canary() == pytest.approx(0.8)
    fake.rate["read"] = 80.0
    assert one.canary() == 1.0
    fake.rate["read"] = 60.0
    assert one.canary() == pytest.approx(0.75)


def test_multiply_adds_are_those_of_now(fake: FakeProbes) -> None:
    one = Limits(1)
    assert one.fma("f32") == 1000.0
    fake.rate["fma"] = 500.0
    assert one.multiply_adds(10**6, "f16") == 2000.0
    assert one.fma("f32") == 1000.0


@pytest.mark.parametrize(
    ("canaries", "patience", "asked", "share"),
    [
        ([1.0, 1.0], 1.0, 2, 1.0),
        ([0.5, 0.5, 1.0, 1.0], 10.0, 4, 1.0),  # it waits
        ([0.5, 0.5, 1.0], 1.5, 3, 0.5),  # the first uses the patience up
        ([0.5, 0.5], 0.0, 2, 0.0),
    ],
)
def test_measurements_wait_for_calm(
    canaries: list[float],
    patience: float,
    asked: int,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each canary takes a second."""
    clock, left = Clock(), list(canaries)

    class Scripted(Limits):
        def canary(self) -> float:
            clock.spend(1.0)
            return left.pop(0)

    monkeypatch.setattr(limits, "perf_counter", clock)
    calm = Calm(Scripted(1), patience)
    calm.wait()
    clock.spend(RECENT)
    calm.wait()
    assert len(canaries) - len(left) == asked
    assert calm.share == share


def test_a_calm_moment_lasts_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = Clock(), []

    class Counted(Limits):
        def canary(self) -> float:
            asked.append(clock())
            return 1.0

    monkeypatch.setattr(limits, "perf_counter", clock)
    calm = Calm(Counted(1), 1.0)
    for seconds in (0.0, 0.6 * RECENT, 0.6 * RECENT, 0.6 * RECENT):
        clock.spend(seconds)
        calm.wait()
    assert asked == pytest.approx([0.0, 1.2 * RECENT])
    assert calm.share == 1.0


def test_table_names_every_limit(fake: FakeProbes) -> None:
    told: list[str] = []
    table = Limits(1, progress=told.append).table()
    memory = [
        f"{n} {level}" for n in ("read", "copy", "in place") for level in ("L1", "L2", "DRAM")
    ]
    fresh = ["fresh copy huge", "fresh copy 4K"]
    assert [*table] == [*memory, *fresh, "fma f32", "fma f64", "fma bf16", "fma int8"]
    assert len(told) == len(fake.asked)
    assert table["fresh copy 4K"] == 1.0
    assert table["fma bf16"] == 2000.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Limits(0), "threads must be at least 1 but got 0"),
        (lambda: Limits(1, "sse9"), "isa must be one of .*portable but got 'sse9'"),
        (lambda: Limits(1).read(0), "bytes must be at least 1 but got 0"),
        (lambda: Limits(1).fma("f8"), "dtype must be one of .* but got 'f8'"),
    ],
)
def test_limits_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_grid_fits_the_memory() -> None:
    grid = limits._grid()
    assert grid[0] == 32 << 10
    assert grid[-1] <= 512 << 20
    assert all(1.3 < b / a < 1.5 for a, b in pairwise(grid))
    assert {1 << 20, 64 << 20} <= {*grid}


def test_matrix_unit_is_told_by_the_system() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    expected = "amx_tile" in cpuinfo.read_text() if cpuinfo.exists() else not SYSFS.exists()
    assert has_matrix_unit() == expected


# --- info -----------------------------------------------------------------------------------------

FIELDS = {
    *("class", "cpu", "family", "isa", "isas", "threads", "caches", "thp", "governor", "os"),
    *("python", "torch", "torch build", "compiler", "fusedops", "date"),
}


def test_fingerprint_has_every_field() -> None:
    found = info.fingerprint()
    assert {*found} - {"commit"} == FIELDS
    assert all(value and value == " ".join(value.split()) for value in found.values())
    assert found["torch build"] == torch.version.git_version
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", found["class"])
    assert found["class"].endswith(f"-{torch.get_num_threads()}t-{fusedops.isa.current()}")


@pytest.mark.source
def test_fingerprint_has_the_commit_of_a_checkout() -> None:
    if not (ROOT / ".git").exists():
        assert "commit" not in info.fingerprint()
        return
    head = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    assert head.startswith(info.fingerprint()["commit"].removesuffix("-dirty"))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("AMD EPYC", "amd-epyc"),
        ("AMD EPYC 9R45 96-Core Processor", "amd-epyc-9r45"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "intel-xeon-platinum-8488c"),
        ("Apple M1 Pro", "apple-m1-pro"),
    ],
)
def test_class_is_short(name: str, short: str) -> None:
    assert info._short(name) == short


def test_info_names_everything(monkeypatch: pytest.MonkeyPatch, fake: FakeProbes) -> None:
    fake.rate["read"] = 50e9
    told: list[str] = []
    lines = info.text(told.append).splitlines()
    rows = {line[:18].strip(): line[18:].strip() for line in lines}
    assert len(rows) == len(lines)
    assert all(rows.values())
    assert {"fusedops", "compiler", "python", "torch", "torch libraries", "system"} <= {*rows}
    assert {"cpu", "cores", "threads", "caches", "huge pages", "class", "limits"} <= {*rows}
    assert {"isa compiled", "isa supported", "isa in use"} <= {*rows}
    assert rows["isa compiled"] == " ".join(fusedops.isa.compiled())
    assert rows["read DRAM"].split()[:2] == ["50", "GB/s"]
    assert _C.fma_unit("int8") in rows["fma int8"]
    assert rows["not verified"] == info.UNSEEN
    assert re.fullmatch("no report of .*Metal.*arm64.* has been seen", info.UNSEEN)
    assert any("1 thread" in name for name in told)


# Of any device that torch copies on, the CPU too.
def test_limit_of_a_device_is_its_copy() -> None:
    device = limits.DeviceLimits("cpu", bytes=1 << 20)
    rate = device.copy
    assert rate > 1e6
    limit = device.for_work(3000, 1000, 10**12, "f32", Regime(work="train"), matmul=True)
    assert limit.seconds == pytest.approx(2 * 4000 / rate)
    assert limit.reason.startswith("its bytes at ")
    assert device.table() == {"copy DRAM": rate}
