"""The emulator finds each kind of mistake that it claims to find, and nothing where nothing is."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest
from compiler import LANGUAGES, lint
from emulator import EmulatorError, Shaders
from toolchain import MissingToolchainError, clang

try:
    clang()
except MissingToolchainError as missing:
    pytest.skip(str(missing), allow_module_level=True)

pytestmark = pytest.mark.source

HERE = Path(__file__).parent
THREADS = 128
ORDERS = ["0", "1", "2"]


@functools.cache
def bugs() -> Shaders:
    return Shaders(HERE / "bugs.metal")


def numbers(count: int = THREADS) -> np.ndarray:
    return np.arange(count, dtype=np.float32) + 1


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setenv("EMU_ORDER", name)
    return name


ZERO = np.zeros(1, np.uint32)
MISTAKES: dict[str, tuple[str, tuple[np.ndarray | None, ...]]] = {
    "bug_early_return": ("reached by 36 of 64 threads: the others have", (ZERO + 100,)),
    "bug_divergent_barrier": ("two different barriers", ()),
    "bug_uninitialised": ("load of threadgroup memory that no thread has written", ()),
    "bug_missing_barrier": ("race: ", ()),
    "bug_missing_second_barrier": ("race: ", ()),
    "bug_simdgroup_barrier": ("race: ", ()),
    "bug_barrier_of_other_memory": ("race: load of threadgroup memory", ()),
    "bug_race_of_threadgroups": (r"race: \w+ of buffer\(0\) at byte 0", ()),
    "bug_too_much_memory": ("threadgroup memory: 36000 bytes, there are 32768", ()),
    "bug_small_constant": ("4 bytes are bound, the kernel's constant has 16", (ZERO,)),
    "bug_unbound": (r"buffer\(2\) is not bound", ()),
    "bug_store_past_the_end": ("store of 4 bytes outside of every buffer, 0 bytes past the", ()),
    "bug_load_before_the_start": ("load of 4 bytes outside of every buffer, 4 bytes before", ()),
    "bug_misaligned": ("is not aligned to its type", ()),
    "bug_index": (r"index \d+ is out of the bounds of its array", ()),
    "bug_threadgroup_index": (r"index \d+ is out of the bounds of its array", ()),
    "bug_division": ("an integer is divided by zero", (ZERO,)),
    "bug_partial_matrix": ("an operation of the whole simdgroup in divergent control flow", ()),
}


@pytest.mark.parametrize("kernel", MISTAKES)
def test_mistake_is_found(kernel: str, order: str) -> None:
    message, others = MISTAKES[kernel]
    with pytest.raises(EmulatorError) as caught:
        bugs().run(kernel, [numbers(), *others], [THREADS], [64])
    assert re.search(message, str(caught.value))


def test_every_mistake_is_tried() -> None:
    assert {name for name in bugs().names() if name.startswith("bug_")} == set(MISTAKES)


def test_message_says_where() -> None:
    with pytest.raises(EmulatorError, match=r"\[threadgroup \(1, 0, 0\), thread \(63, 0, 0\)\].*"):
        bugs().run("bug_store_past_the_end", [numbers()], [THREADS], [64])


def test_swap(order: str) -> None:
    y = numbers()
    bugs().run("ok_swap", [y], [THREADS], [64])
    np.testing.assert_array_equal(y, numbers().reshape(-1, 64)[:, ::-1].ravel())


def test_group_at_the_edge_of_the_grid_is_smaller(order: str) -> None:
    with pytest.raises(EmulatorError, match="load of threadgroup memory that no thread has"):
        bugs().run("ok_swap", [numbers()], [100], [64])


def test_simdgroup_barrier_orders_a_simdgroup(order: str) -> None:
    y = numbers()
    bugs().run("ok_simdgroup_barrier", [y], [THREADS], [64])
    np.testing.assert_array_equal(y, numbers().reshape(-1, 32)[:, ::-1].ravel())


def test_atomics_do_not_race(order: str) -> None:
    y = np.zeros(1, np.uint32)
    bugs().run("ok_atomic", [y], [1000], [64])
    assert y[0] == 1000


def test_group_of_more_than_1024_threads_is_refused() -> None:
    with pytest.raises(EmulatorError, match="more than 1024 threads"):
        bugs().run("ok_exp", [numbers(2048)], [2048], [2048])


def test_traffic_is_counted(order: str) -> None:
    x, y = numbers(4 * 50), np.zeros(4 * 50, np.float32)
    dispatch = bugs().run("ok_traffic", [x, y], [50], [32])
    np.testing.assert_array_equal(y, 2 * x)
    read, written = dispatch.buffers[0], dispatch.buffers[1]
    assert (read.load_bytes, read.stores, written.loads) == (x.nbytes, 0, 0)
    assert written.store_bytes == y.nbytes
    assert dispatch.grid == (50, 1, 1)
    assert dispatch.group == (32, 1, 1)


def test_fuzz_moves_the_functions_of_mathematics(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.linspace(-3, 3, THREADS, dtype=np.float32)
    exact, fuzzy = x.copy(), x.copy()
    bugs().run("ok_exp", [exact], [THREADS], [64])
    monkeypatch.setenv("EMU_FUZZ_ULP", "4")
    bugs().run("ok_exp", [fuzzy], [THREADS], [64])
    distance = np.abs(exact.view(np.int32) - fuzzy.view(np.int32))
    assert distance.max() == 4
    assert (distance > 0).mean() > 0.5


def test_fuzz_stops_at_zero_and_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.linspace(-103.9, -102.0, THREADS, dtype=np.float32)
    x[-1] = 88.7228
    monkeypatch.setenv("EMU_FUZZ_ULP", "9")
    bugs().run("ok_exp", [x], [THREADS], [64])
    assert not np.isnan(x).any()
    assert (x >= 0).all()


@pytest.mark.parametrize(("dtype", "bits"), [("f32", np.float32), ("f16", np.float16)])
def test_matrices_have_the_layout_of_apple(dtype: str, bits: type, order: str) -> None:
    random = np.random.default_rng(0)
    a, b = (random.integers(-4, 5, (8, 8)).astype(bits) for _ in range(2))
    y = np.zeros((8, 8), np.float32)
    bugs().run(f"ok_matrix_{dtype}", [a, b, y], [32], [32])
    np.testing.assert_array_equal(y, a.astype(np.float32) @ b.astype(np.float32).T)


# What must be in the report; old_language is an error of the old ones only.
LINT = {
    "device_to_thread": "cannot initialize a variable of type 'float *'",
    "threadgroup_to_unqualified": "no matching function for call to 'first'",
    "constant_to_device": "cannot initialize a variable of type",
    "no_erf": "use of undeclared identifier 'erf'",
    "no_double": "metal_has_no_double",
    "old_language": "constexpr if is a C++17 extension",
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", LINT)
def test_lint(name: str, language: str) -> None:
    report = lint(HERE / "lint" / f"{name}.metal", language)
    if name == "old_language" and language == "4.0":
        assert report == ""
    else:
        assert LINT[name] in report


def test_lint_passes_what_is_right() -> None:
    assert [lint(HERE / "lint" / "right.metal", language) for language in LANGUAGES] == [""] * 3
