"""Rounds interleave, the noise is known, and two runs of a noisy machine never contradict."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from bench_fakes import Clock

from fusedops.bench import timing
from fusedops.bench.record import Quantiles
from fusedops.bench.timing import TWIN, Candidate, Timed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "_now", clock)
    return clock


def spender(clock: Clock, log: list[str], name: str, seconds: float) -> Callable[[], str]:
    def run() -> str:
        log.append(name)
        clock.spend(seconds)
        return name

    return run


def candidates(clock: Clock, log: list[str], **seconds: float) -> dict[str, Candidate]:
    return {name: Candidate(spender(clock, log, name, s)) for name, s in seconds.items()}


# --- rounds ---------------------------------------------------------------------------------------


def test_every_round_has_every_candidate_in_another_order(clock: Clock) -> None:
    log: list[str] = []
    timed = timing.interleaved(candidates(clock, log, a=0.01, b=0.02, c=0.03), seconds=0.0, least=4)
    rounds = ["".join(log[-12:][i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["abc", "cba", "bca", "acb"]
    assert [len(t.seconds) for t in timed.values()] == [4, 4, 4]


def test_nobody_always_follows_the_same_candidate() -> None:
    rounds = [timing.order("abcd", i) for i in range(8)]
    followed = {
        b: {a for order in rounds for a, x in itertools.pairwise(order) if x == b} for b in "abcd"
    }
    assert all(len(before) == 2 for before in followed.values())
    assert {order[0] for order in rounds} == set("abcd")


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 7), (0.3, 10), (1e9, 100)])
def test_rounds_fill_the_time_within_limits(clock: Clock, seconds: float, rounds: int) -> None:
    timed = timing.interleaved(candidates(clock, [], a=0.01, b=0.02), seconds=seconds + 1e-9)
    assert len(timed["a"].seconds) == rounds


def test_twin_is_timed_in_every_round(clock: Clock) -> None:
    log: list[str] = []
    timed = timing.interleaved(candidates(clock, log, a=0.01, b=0.02), twin="a", seconds=0.0)
    assert list(timed) == ["a", "b", f"a{TWIN}"]
    assert log[-3:].count("a") == 2
    assert len(timed[f"a{TWIN}"].seconds) == 7


def test_short_calls_are_repeated_equally_often(clock: Clock) -> None:
    log: list[str] = []
    timed = timing.interleaved(candidates(clock, log, a=1e-5, b=4e-5), seconds=1.0, most=7)
    assert log.count("a") - log.count("b") == 0
    assert log.count("a") > 7 * 100
    assert timed["a"].seconds == pytest.approx([1e-5] * 7)
    assert timed["b"].seconds == pytest.approx([4e-5] * 7)


def test_slow_candidate_keeps_the_others_from_being_repeated(clock: Clock) -> None:
    log: list[str] = []
    timing.interleaved(candidates(clock, log, a=1e-6, slow=1.0), seconds=0.5)
    assert log.count("slow") < 12


def test_nothing_untimed_is_counted(clock: Clock) -> None:
    events: list[str] = []

    def spend(what: str) -> None:
        events.append(what)
        clock.spend(1.0)

    timed = timing.interleaved(
        {"a": Candidate(spender(clock, events, "call", 0.25), prepare=partial(spend, "prepare"))},
        seconds=0.0,
        new_round=lambda i, last: spend("round"),
        evict=partial(spend, "evict"),
        calm=partial(spend, "calm"),
        keep=lambda name, output: spend("keep"),
    )
    assert timed["a"].seconds == [0.25] * 7
    assert events[-6:] == ["round", "calm", "prepare", "evict", "call", "keep"]


def test_batch_of_its_own_is_timed_as_a_whole(clock: Clock) -> None:
    log: list[str] = []
    runs = tuple(spender(clock, log, name, 0.5) for name in "xyz")
    timed = timing.interleaved({"a": Candidate(runs[0], batch=runs)}, seconds=0.0)
    assert log[-3:] == ["x", "y", "z"]
    assert timed["a"].seconds == [0.5] * 7
    assert timed["a"].output == "z"


def test_probe_tells_its_own_time(clock: Clock) -> None:
    timed = timing.interleaved({"a": Candidate(lambda: None, seconds=lambda: 3.0)}, seconds=0.0)
    assert timed["a"].seconds == [3.0] * 7


def test_first_call_is_apart_and_warm_up_ends_when_calls_agree(clock: Clock) -> None:
    durations = iter([9.0, 3.0, 1.0])
    run = Candidate(lambda: clock.spend(next(durations, 1.0)))
    timed = timing.interleaved({"a": run}, seconds=0.0)
    assert timed["a"].first == 9.0
    assert timed["a"].seconds == [1.0] * 7


def test_no_garbage_is_collected_in_a_round(clock: Clock) -> None:
    enabled: list[bool] = []

    def run() -> None:
        enabled.append(gc.isenabled())
        clock.spend(1.0)

    timing.interleaved({"a": Candidate(run)}, seconds=0.0)
    assert not any(enabled[-7:])
    assert gc.isenabled()


def test_candidate_that_fails_is_left_out(clock: Clock) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    failed: dict[str, str] = {}
    timed = timing.interleaved(
        {"bad": Candidate(fail), **candidates(clock, [], good=0.1)},
        twin="bad",
        seconds=0.0,
        on_error=lambda name, error: failed.update({name: str(error)}),
    )
    assert list(timed) == ["good"]
    assert failed == {"bad": "no"}


def test_evictor_reads_twice_the_cache() -> None:
    timing.evictor(1 << 20)()  # raises if the sum is not what was written


# --- verdicts -------------------------------------------------------------------------------------


def test_ratio_is_taken_within_a_round() -> None:
    slow, fast = Timed(0.0, [2.0, 20.0, 2.0]), Timed(0.0, [1.0, 10.0, 1.0])
    assert timing.ratios([fast], slow) == Quantiles(2.0, 2.0, 2.0)
    assert timing.ratios([fast], slow, scale=2.0) == Quantiles(1.0, 1.0, 1.0)
    assert timing.ratios([fast, slow], slow).median == 1.5


def test_noise_is_how_far_a_candidate_is_from_itself() -> None:
    one = Timed(0.0, [1.0] * 5)
    assert timing.noise(one, Timed(0.0, [1.0] * 5), 0.05) == 0.05
    assert timing.noise(one, Timed(0.0, [1.5] * 5), 0.05) == pytest.approx(0.5)
    assert timing.noise(one, Timed(0.0, [0.5] * 5), 0.05) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("low", "high", "noise", "expected"),
    [
        (1.06, 1.2, 0.05, "faster"),
        (1.04, 1.2, 0.05, "no difference"),
        (1.06, 1.2, 0.10, "no difference"),
        (0.5, 0.94, 0.05, "slower"),
        (0.5, 0.96, 0.05, "no difference"),
        (0.5, 2.0, 0.05, "no difference"),
    ],
)
def test_difference_needs_the_whole_interval(
    low: float, high: float, noise: float, expected: str
) -> None:
    assert timing.verdict(Quantiles(low, (low + high) / 2, high), noise) == expected


def run_of_noisy_machine(random: Any, ratio: float) -> str:
    """Ours against one that takes ``ratio`` times as long, as a quick run sees them."""
    rounds = int(random.integers(7, 40))
    sigma = random.choice([0.005, 0.02, 0.05, 0.1, 0.3])
    bias = random.uniform(0.96, 1.04)  # of this process: where its memory happens to lie
    times = np.exp(sigma * random.standard_normal((3, rounds)))
    slow = random.random() < 0.5  # another process takes the machine for a while
    start, length = random.integers(0, rounds), random.integers(1, rounds)
    times[:, start : start + length] *= 2.0 if slow else 1.0
    times[2] *= ratio * bias
    ours, again, other = (Timed(0.0, list(map(float, row))) for row in times)
    noise = timing.noise(ours, again, 0.10)
    return timing.verdict(timing.ratios([ours, again], other), noise)


@pytest.mark.parametrize("runs", [800, pytest.param(20000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ratio", [0.9, 0.97, 1.0, 1.03, 1.1])
def test_two_quick_runs_never_contradict(ratio: float, runs: int) -> None:
    random = np.random.default_rng(int(1000 * ratio))
    for _ in range(runs):
        said = {run_of_noisy_machine(random, ratio) for _ in range(2)}
        assert said != {"faster", "slower"}


def test_a_clear_difference_is_still_seen() -> None:
    random = np.random.default_rng(0)
    said = [run_of_noisy_machine(random, 2.0) for _ in range(300)]
    assert said.count("faster") > 200
    assert said.count("slower") == 0


# A device that returns at once and works on: the clock runs until it is done, and starts when what
# others queued is.
@pytest.mark.parametrize("calls", [1, 3])
def test_the_clock_waits_for_a_device(clock: Clock, calls: int) -> None:
    queue = [7.0]  # somebody else's

    def finish() -> None:
        clock.spend(sum(queue))
        queue.clear()

    def queued() -> None:
        queue.append(2.0)

    candidate = Candidate(queued, batch=(queued,) * calls, synchronize=finish)
    timed = timing.interleaved({"a": candidate}, seconds=0.0)
    assert timed["a"].first == 2.0
    assert timed["a"].seconds == [2.0] * 7
    assert queue == []
