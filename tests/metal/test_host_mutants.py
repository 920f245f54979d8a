"""Faults planted in the host code of the Metal kernels: the probe must notice each of them.

A copy of csrc/mps and metal is changed, compiled and linked as setup.py does it, and given to
host_probe.py in a process of its own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lane
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build/ninja"
SHARED = [f"core/ops/{name}.o" for name in ("tensor", "rope_call", "linear_call")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(lane.DEVICE != "mps", reason="needs FUSEDOPS_TEST_DEVICE=mps"),
    pytest.mark.skipif(sys.platform == "darwin", reason="needs the emulator's checks"),
]


@dataclass(frozen=True)
class Mutant:
    """A fault: in file (of csrc/mps or metal), `new` in the place of `old`."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant(
        "grid-extent",
        "rope.cpp",
        "static_cast<uint64_t>(a.batch * a.seq)",
        "static_cast<uint64_t>(a.seq)",
    ),
    Mutant("swapped-dims", "rope.cpp", "{{columns, rows, tokens}", "{{rows, columns, tokens}"),
    Mutant("wrong-buffer", "rope.cpp", "turns ? sin : q.turn->x", "turns ? cos : q.turn->x"),
    Mutant("oversized-group", "gelu.cpp", "kGroup = 256", "kGroup = 2048"),
    Mutant("dropped-flag", "rope.cpp", "if (a.conjugate) bits |= metal::kConjugate;", ""),
    Mutant("missing-offset", "rope.cpp", "a.offset, flags_of(a)", "int64_t{0}, flags_of(a)"),
    Mutant(
        "stale-function",
        "launch.cpp",
        "AOTIMetalKernelFunctionHandle f = nullptr;\n",
        "static AOTIMetalKernelFunctionHandle f = nullptr;\n    if (f) return f;\n",
    ),
    Mutant(
        "unlocked-launch",
        "launch.cpp",
        "const std::lock_guard<std::mutex> guard(shaders().block);",
        "",
    ),
    Mutant("unlocked-lookup", "launch.cpp", "const std::lock_guard<std::mutex> guard(lookup);", ""),
    Mutant("bias-dropped", "linear.cpp", "(biased() ? metal::kHasBias : 0u)", "0u"),
    Mutant("bias-index", "gelu_linear.metal", "float(bias[column])", "float(bias[0])"),
    Mutant("tail", "gelu.cpp", "(elements + 3) / 4", "elements / 4"),
    Mutant("lost-argument", "launch.h", "std::memcpy(&bytes, &pod, sizeof pod);", ""),
    Mutant("fault-untold", "rope.cpp", "if (c.position_ids) faults.ask();", ""),
    Mutant("preact-not-kept", "linear.cpp", "(preact ? metal::kKeepPreact : 0u)", "0u"),
    Mutant("bias-gradient", "linear_backward.cpp", "(total ? metal::kSumBias : 0u)", "0u"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The sources, and their objects as they are."""
    base = tmp_path_factory.mktemp("host")
    for part in ("csrc", "metal"):
        shutil.copytree(ROOT / part, base / part)
    return base


def built(folder: Path, mutant: Mutant | None) -> Path:
    """The host library of the sources with the mutant's fault."""
    sys.path.insert(0, str(ROOT))
    import setup

    copy = folder / (mutant.name if mutant else "unchanged")
    for part in ("csrc", "metal"):
        shutil.copytree(folder / part, copy / part)
    if mutant:
        place = "metal" if mutant.file.endswith(".metal") else "csrc/mps"
        path = copy / place / mutant.file
        source = path.read_text()
        assert mutant.old in source, f"{mutant.file} has changed: {mutant.old}"
        path.write_text(source.replace(mutant.old, mutant.new))
    header = copy / "shaders.h"
    header.write_text(setup.shader_header(setup.shader_source(copy / "metal")))
    home = Path(torch.__file__).parent
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    # What the fault is not in is taken as setup.py has compiled it; a header is in everything.
    place = (mutant.file if mutant else "launch.cpp").replace("gelu_linear.metal", "launch.cpp")
    changed = "*.cpp" if place.endswith(".h") else place
    sources = sorted((copy / "csrc/mps").glob(changed))
    names = {source.stem for source in sources}
    others = [p for p in sorted((OBJECTS / "core/mps").glob("*.o")) if p.stem not in names]
    library = copy / "libfusedops_mps.so"
    flags = "-std=c++20 -O0 -fPIC -fvisibility=hidden -w -shared"
    subprocess.run(
        [
            *compiler,
            *flags.split(),
            *(f"-I{copy}", f"-isystem{home}/include"),
            f"-isystem{home}/include/torch/csrc/api/include",
            f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET}ULL",
            *map(str, (*sources, *others)),
            *(str(OBJECTS / name) for name in SHARED),
            *("-o", str(library), f"-L{home}/lib", "-ltorch_cpu"),
        ],
        check=True,
    )
    return library


def probe(library: Path) -> subprocess.CompletedProcess[str]:
    """What host_probe.py says of a library."""
    script = Path(__file__).with_name("host_probe.py")
    environment = {**os.environ, "FUSEDOPS_TEST_DEVICE": "cpu"}
    return subprocess.run(
        [sys.executable, str(script), str(library)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_probe_accepts_what_is_right(folder: Path) -> None:
    done = probe(built(folder, None))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_probe_notices(mutant: Mutant, folder: Path) -> None:
    done = probe(built(folder, mutant))
    assert done.returncode != 0, "nobody noticed"
    assert "Error" in done.stderr, done.stderr  # no crash of the probe itself
