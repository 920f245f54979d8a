"""A clock, a machine and candidates that do as they are told, for the tests of bench."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fusedops.bench.measure import Entry
from fusedops.bench.record import (
    Case,
    Limit,
    Quantiles,
    Record,
    Regime,
    Result,
    Row,
)
from fusedops.testing import Call, Linear, OpSpec

SAMPLE = Linear("tiny", (3,), 8, 5, approximate="none")
FINGERPRINT = {
    "class": "test",
    "cpu": "a test",
    "threads": "1",
    "fusedops": "0",
    "isa": "portable",
    "torch": "0",
    "date": "today",
}


class Clock:
    """Goes on only when a candidate spends time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


class Limits:
    """A machine whose limit is what the test says."""

    def __init__(self, seconds: float = 1e-9) -> None:
        self.seconds = seconds

    def for_work(self, *work: Any, matmul: bool) -> Limit:
        return Limit(self.seconds, "its operations at the speed of a test")

    def table(self) -> dict[str, float]:
        return {"copy": 1e9}


def entry(
    name: str,
    clock: Clock,
    seconds: float,
    change: Callable[[Sequence[Tensor], Call], Any] = lambda outputs, call: outputs[0],
) -> Entry:
    """Computes the reference, spends its time, and returns what ``change`` makes of the result."""

    def build(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
        def run() -> Any:
            clock.spend(seconds)
            return change(spec.run(spec.reference, call), call)

        return run

    return Entry(name, build)


def case(**changes: Any) -> Case:
    fields = {
        "op": "gelu_linear",
        "shape": SAMPLE.name,
        "dtype": "f32",
        "regime": Regime(),
        "threads": 1,
        "isa": "portable",
    }
    return Case(**{**fields, **changes})


def row(
    candidate: str, seconds: float, times_faster: dict[str, Quantiles] | None = None, **more: Any
) -> Row:
    fields = {"rounds": 7, "first": seconds, "of_limit": 0.5, "error": 0.5}
    return Row(
        candidate=candidate,
        seconds=Quantiles(*(round(seconds * factor, 3) for factor in (0.9, 1.0, 1.1))),
        times_faster=times_faster or {},
        **{**fields, **more},
    )


def result(
    ratio: float = 2.0, noise: float = 0.05, fault: str | None = None, **changes: Any
) -> Result:
    """Ours is that many times faster than eager."""
    ours = row("fusedops", 1.0, {"eager": around(ratio)}, fault=fault)
    eager = row("eager", ratio, {"fusedops": around(1 / ratio)})
    return Result(
        case=case(**changes),
        size="gelu_linear 3x8->5",
        bytes=100,
        flops=200,
        limit=Limit(0.5, "its operations at the speed of a test"),
        noise=noise,
        rows=(ours, eager),
        absent={"jax": "jax not installed: make peers"},
    )


def around(ratio: float) -> Quantiles:
    return Quantiles(*(round(ratio * factor, 3) for factor in (0.98, 1.0, 1.02)))


def record(*results: Result, **changes: Any) -> Record:
    fields = {"machine": FINGERPRINT, "limits": {"copy": 1e9}, "command": "fusedops bench"}
    return Record(**{**fields, "results": results, **changes})
