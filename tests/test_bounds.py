"""No kernel touches memory outside its tensors: guarded.py, in one process for each ISA."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fusedops

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs mmap and mprotect of POSIX"),
]


def guarded(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, Path(__file__).with_name("guarded.py"), *arguments],
        env={
            **os.environ,
            "FUSEDOPS_ISA": isa,
            "PYTHONPATH": str(Path(fusedops.__file__).parent.parent),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_stay_inside_their_tensors(isa: str) -> None:
    done = guarded(isa=isa)
    last = done.stdout.splitlines()[-1:]
    assert (done.returncode, last) == (0, ["done"]), done.stderr


# The harness sees what it is there to see.
@pytest.mark.parametrize("side", ["start", "end"])
def test_an_access_outside_ends_the_process(side: str) -> None:
    done = guarded(side, isa="portable")
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
    assert done.stdout == ""
