"""The lanes of AddressSanitizer and ThreadSanitizer see what the emulator's own watch sees."""

from __future__ import annotations

from pathlib import Path

import device
import numpy as np
import pytest
from compiler import compiled
from emulator import EmulatorError, Shaders
from replay import sanitized
from toolchain import MissingToolchainError, sanitizer

try:
    sanitizer("tsan")
except MissingToolchainError as missing:
    pytest.skip(str(missing), allow_module_level=True)

pytestmark = pytest.mark.source

BUGS = Path(__file__).with_name("bugs.metal")

FOUND = {
    ("asan", "bug_store_past_the_end"): "AddressSanitizer: heap-buffer-overflow",
    ("asan", "bug_load_before_the_start"): "AddressSanitizer: heap-buffer-overflow",
    ("tsan", "bug_missing_barrier"): "ThreadSanitizer: data race",
    ("tsan", "bug_missing_second_barrier"): "ThreadSanitizer: data race",
    ("tsan", "bug_simdgroup_barrier"): "ThreadSanitizer: data race",
    ("tsan", "bug_race_of_threadgroups"): "ThreadSanitizer: data race",
    ("asan", "ok_swap"): "",
    ("tsan", "ok_swap"): "",
    ("tsan", "ok_simdgroup_barrier"): "",
    ("tsan", "ok_atomic"): "",
}


@pytest.mark.parametrize(("name", "kernel"), FOUND)
def test_sanitizer(name: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMU_CAPTURE", str(tmp_path))
    y = np.ones(128, np.float32)
    if kernel.startswith("ok_"):
        Shaders(BUGS).run(kernel, [y], [128], [64])
    else:
        with pytest.raises(EmulatorError):
            Shaders(BUGS).run(kernel, [y], [128], [64])
    library = compiled(BUGS, instrumentation=name)
    result = sanitized(name, device.emulator_library(), library, tmp_path)
    report = FOUND[name, kernel]
    if report:
        assert report in result.stderr
        assert "bugs-" in result.stderr
        assert result.returncode != 0
    else:
        assert result.stderr == ""
        assert result.stdout == "1 dispatches of 1 kernels; 0 have too many threads\n"
        assert result.returncode == 0
