"""Fixtures of every test, and the line that says which lanes really ran."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).with_name("metal")))
import lane

lane.prepare()
# What somebody's autotune stored is no part of what is tested; before the import that reads it.
os.environ.setdefault("FUSEDOPS_AUTOTUNE", "0")

import fusedops  # noqa: E402

lane.start()

# Where an installed wheel is tested there is no scripts/ to import.
collect_ignore = (
    [] if Path(__file__).parents[1].joinpath("scripts").is_dir() else ["test_wheels.py"]
)
# Minutes each: where there are two processes, both begin with one.
_LONGEST = ("test_mutants.py", "test_kernels.py")
_LANES: dict[str, set[str]] = {"isa": set(), "dtype": set()}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _device() -> Iterator[None]:
    if lane.DEVICE == "cpu":  # naming the default makes it a mode that sees every call
        yield
        return
    torch.set_default_device(lane.DEVICE)
    yield
    torch.set_default_device(None)


def _isas() -> list[str]:
    """The instruction sets of this machine, or those of them that FUSEDOPS_TEST_ISA names."""
    if lane.DEVICE != "cpu":  # which of the CPU's is in use makes no difference
        return [fusedops.isa.current()]
    only = os.environ.get("FUSEDOPS_TEST_ISA", "")
    chosen = only.split(",") if only else [*fusedops.isa.supported()]
    for name in chosen:
        with fusedops.isa.use(name):
            pass  # an error for what this machine does not have
    return chosen


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, in force for the test and undone after it."""
    name: str = request.param
    before = fusedops.isa.current()
    with fusedops.isa.use(name):
        assert fusedops.isa.current() == name
        yield name
        assert fusedops.isa.current() == name, "the test changed the instruction set"
    assert fusedops.isa.current() == before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What needs more than the device has is skipped."""
    try:
        return (yield)
    except Exception as error:
        if reason := lane.missing(error):
            pytest.skip(reason)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport]:
    """Say in the report which lanes a test is parametrised over."""
    report: pytest.TestReport = yield
    if call.when == "call" and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
        params = {kind: item.callspec.params.get(kind) for kind in _LANES}
        report.lanes = {kind: name for kind, name in params.items() if isinstance(name, str)}
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count a lane as run when a test of it has passed, in whatever process it ran."""
    for kind, name in getattr(report, "lanes", {}).items():
        if report.passed:
            _LANES[kind].add(name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write ``fusedops lanes: isa=... dtypes=...``, which CI compares with what must have run."""
    isas = [name for name in fusedops.isa.supported() if name in _LANES["isa"]]
    dtypes = [name for name in fusedops.testing.DTYPES if name in _LANES["dtype"]]
    terminalreporter.write_line(
        f"fusedops lanes: isa={','.join(isas) or 'none'} dtypes={','.join(dtypes) or 'none'}"
    )
