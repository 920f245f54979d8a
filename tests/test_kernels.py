"""The kernels without torch, on every CPU that this machine has or emulates.

One program per architecture (kernels_test.cpp) holds every instruction set. An emulated CPU dies of
an instruction it does not have: a kernel that uses more than was probed cannot pass.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import instructions
import pytest

import fusedops

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "csrc").is_dir():
    pytest.skip("needs the sources: csrc/ is not beside tests/", allow_module_level=True)
pytestmark = [pytest.mark.source, pytest.mark.slow]

TOOLS = ROOT / "build/cross/bin"  # what scripts/cross-tools.sh unpacks
NATIVE = "native"

# CPU models, and the instruction sets that each must report.
MODELS = {
    "aarch64": {
        "cortex-a57": ("neon", "portable"),
        "neoverse-n1": ("neon", "portable"),
        "a64fx": ("neon", "portable"),
        "neoverse-v1": ("neon_bf16", "neon_fhm", "neon", "portable"),
        "neoverse-n2": ("neon_bf16", "neon_fhm", "neon", "portable"),
        "max": ("neon_bf16", "neon_fhm", "neon", "portable"),
    },
    "x86_64": {
        "Nehalem": ("portable",),
        "Haswell": ("avx2", "portable"),
    },
}
# qemu reads all of a vector before it masks it, across the end of a buffer as well.
UNGUARDED = {"Haswell"}
# f32 rope and quantized layers have the same bits everywhere, f32 gelu wherever there is FMA.
ONE_RESULT = {
    "rope": lambda row: True,
    "gelu": lambda row: row != "portable",
    "quantized": lambda row: True,
}


def emulator(machine: str) -> Path | None:
    found = shutil.which(f"qemu-{machine}", path=f"{TOOLS}:{os.environ['PATH']}")
    found = found or shutil.which(f"qemu-{machine}-static")
    return Path(found) if found else None


def compiler(machine: str) -> str | None:
    """The compiler for a machine, None where there is none."""
    if machine == platform.machine():
        return os.environ.get("CXX", "c++")
    return shutil.which(f"{machine}-linux-gnu-g++", path=f"{TOOLS}:{os.environ['PATH']}")


@functools.cache
def program(machine: str) -> str:
    """The path of kernels_test for a machine, built if need be."""
    cross = {} if machine == platform.machine() else {"FUSEDOPS_TARGET": f"linux-{machine}"}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/kernels_test.py"],
        env={**os.environ, **cross, "CXX": str(compiler(machine))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def run(machine: str, model: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    front = [] if model == NATIVE else [str(emulator(machine)), "-cpu", model]
    command = [*front, program(machine), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def needs(machine: str, model: str) -> None:
    """Skip what cannot be built or run here, naming what is missing."""
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    if compiler(machine) is None:
        pytest.skip(f"needs a cross compiler: run scripts/cross-tools.sh build/cross ({machine})")
    if model != NATIVE and emulator(machine) is None:
        pytest.skip(f"needs qemu: run scripts/cross-tools.sh build/cross ({machine})")


def models() -> list[tuple[str, str, tuple[str, ...]]]:
    """(machine, model, instruction sets): this machine, then the emulated ones."""
    here = platform.machine()
    cases = [(here, NATIVE, fusedops.isa.supported())]
    return cases + [(m, model, rows) for m in MODELS for model, rows in MODELS[m].items()]


RESULTS: dict[str, dict[str, str]] = {name: {} for name in ONE_RESULT}


@pytest.mark.parametrize(
    ("machine", "model", "isas"), models(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_kernels(machine: str, model: str, isas: tuple[str, ...]) -> None:
    needs(machine, model)
    # The baseline's code is the same for every model: once for each machine is enough.
    first = model in (NATIVE, *(next(iter(MODELS[m])) for m in MODELS))
    wanted = [row for row in isas if first or row != "portable"]
    done = run(machine, model, *(["unguarded"] if model in UNGUARDED else []), *wanted)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\nexit {done.returncode}"
    assert f"supported: {' '.join(isas)}\nchosen: {isas[0]}\n" in done.stdout
    lines = re.findall(r"^row (\w+): \d+ checks, 0 failures, (.*)$", done.stdout, re.M)
    assert [row for row, _ in lines] == wanted
    for row, hashes in lines:
        for name, value in (pair.split() for pair in hashes.split(", ")):
            if ONE_RESULT[name](row):
                RESULTS[name][f"{row} on {machine} {model}"] = value
    for name, values in RESULTS.items():
        assert len({*values.values()}) <= 1, f"{name} is not the same everywhere: {values}"


@pytest.mark.parametrize(
    ("machine", "model", "row"),
    [
        ("aarch64", "neoverse-n1", "neon_bf16"),
        ("aarch64", "neoverse-n1", "neon_fhm"),
        ("aarch64", "cortex-a57", "neon_fhm"),
        ("x86_64", "Nehalem", "avx2"),
        ("x86_64", "Haswell", "avx512"),
    ],
)
def test_an_instruction_that_the_cpu_lacks_is_fatal(machine: str, model: str, row: str) -> None:
    needs(machine, model)
    done = run(machine, model, "force", row)
    assert -done.returncode == signal.SIGILL or done.returncode == 128 + signal.SIGILL


@pytest.mark.parametrize(
    ("machine", "model", "wanted", "error"),
    [
        ("aarch64", "neoverse-n1", "neon_bf16", "this CPU must support"),
        ("aarch64", "max", "avx2", "name must be one of neon_bf16, neon_fhm, neon, portable"),
        ("x86_64", "Nehalem", "avx2", "this CPU must support"),
    ],
)
def test_environment_cannot_ask_for_more(
    machine: str, model: str, wanted: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(machine, model)
    monkeypatch.setenv("FUSEDOPS_ISA", wanted)
    done = run(machine, model)
    assert done.returncode != 0
    assert f"[isa] {error}" in done.stderr


@pytest.mark.parametrize(("machine", "wanted"), [("aarch64", "neon_fhm"), ("x86_64", "portable")])
def test_environment_lowers(machine: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(machine, "max")
    monkeypatch.setenv("FUSEDOPS_ISA", wanted)
    assert f"chosen: {wanted}\n" in run(machine, "max", "none").stdout


@pytest.mark.parametrize("machine", instructions.MACHINES)
def test_no_loop_takes_more_instructions_than_recorded(machine: str) -> None:
    needs(machine, NATIVE if machine == platform.machine() else "max")
    program(machine)  # compiles the kernels
    rows = {row.loop: row for row in instructions.measure(machine)}
    assert rows
    compilers = {row.compiler for row in rows.values()}
    record = {r.loop: r for r in instructions.read() if r.machine == machine}
    if not compilers <= {row.compiler for row in record.values()}:
        pytest.skip(f"needs a record of {', '.join(compilers)}: make instructions")
    assert {*rows} == {key for key in record if key[1] in compilers}, "run make instructions"
    worse = [row for row in rows.values() if row.each > 1.01 * record[row.loop].each]
    assert worse == [], "more instructions than recorded: tune, or run make instructions"
