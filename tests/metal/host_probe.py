"""Every way through the host code of the Metal kernels once, for host_mutants.py.

Run with the host library's path: exits 0 if all results are right, else says what is not. Not a
pytest module, so that a library that is known to be wrong meets nothing else of the session.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]
import device  # noqa: E402

device.load()

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fusedops  # noqa: E402
from fusedops.testing import SPECS, assert_within  # noqa: E402
from fusedops.testing.samples import Call  # noqa: E402

_SAMPLES = {
    "rope": ("d34", "neighbours-partial", "x-strided", "table-f32"),
    "rope_qk": None,
    "gelu": None,
    "linear": ("17", "65-relu", "no-bias-silu", "weight-transposed"),
    "gelu_linear": ("1", "15", "17", "rows-9", "no-bias", "x-offset"),
}


def on_mps(t: Tensor) -> Tensor:
    """The same strides and offset in memory of the device."""
    if t.is_neg():
        return t.resolve_neg().to("mps")
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to("mps")
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def check_samples() -> None:
    """The samples of every op against their bounds."""
    for name, chosen in _SAMPLES.items():
        spec = SPECS[name]
        for sample in spec.samples:
            if chosen is not None and sample.name not in chosen:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                host = sample.build(dtype)
                moved = tuple(None if t is None else on_mps(t) for t in host.args)
                call = Call(moved, host.kwargs)
                results = spec.run(spec.public(), call)
                exact, bounds = spec.oracle(call), spec.error_bound(call, False)
                for y, expected, bound in zip(results, exact, bounds, strict=True):
                    assert_within(y.cpu(), expected, bound)


def check_rope() -> None:
    """Batches, groups of heads, an offset, the opposite angle and back, in place."""
    x = torch.randn(3, 6, 5, 16, device="mps")
    angles = torch.rand(40, 8) * 6
    cos, sin = angles.cos().to("mps"), angles.sin().to("mps")
    turned = fusedops.rope(x, cos, sin, offset=7)
    expected = fusedops.rope(x.cpu(), cos.cpu(), sin.cpu(), offset=7)
    torch.testing.assert_close(turned.cpu(), expected)
    back = fusedops.rope(turned, cos, sin, offset=7, conjugate=True)
    torch.testing.assert_close(back.cpu(), x.cpu())
    fusedops.rope_(x, cos, sin, offset=7)
    torch.testing.assert_close(x.cpu(), expected)


def check_fault() -> None:
    """A position outside the table is told by the next call, and only once."""
    x = torch.randn(1, 2, 3, 8, device="mps")
    table = torch.ones(4, 4, device="mps")
    ids = torch.tensor([0, 9, 1], device="mps")
    fusedops.rope(x, table, table, ids)
    with pytest.raises(RuntimeError, match=r"must be in \[0, 4\) but got the position 9"):
        fusedops.rope(x, table, table)
    fusedops.rope(x, table, table)


def check_layers() -> None:
    """What training keeps and its gradients, for few rows and many, multiplied by either."""
    for rows in (1, 2, 3, 7, 8, 9, 130):
        arguments = [torch.randn(rows, 36), torch.randn(20, 36), torch.randn(20)]
        for save in ("preact", "none"):
            there = [t.to("mps").requires_grad_() for t in arguments]
            here = [t.clone().requires_grad_() for t in arguments]
            for leaves in (there, here):
                fusedops.gelu_linear(*leaves, save=save).square().sum().backward()
            for a, b in zip(there, here, strict=True):
                assert a.grad is not None
                torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-4, atol=1e-3)


def check_long_gelu() -> None:
    """More threads than a group may have, and a tail."""
    x = torch.randn(8195)
    torch.testing.assert_close(fusedops.gelu(x.to("mps")).cpu(), fusedops.gelu(x))


def check_threads() -> None:
    """Many threads launch kernels of one function at the same time."""
    x = torch.randn(2, 3, 4, 8, device="mps")
    table = torch.ones(4, 4, device="mps")
    failures: list[BaseException] = []

    def work(approximate: str) -> None:
        try:
            for _ in range(40):
                fusedops.rope(x, table, table)
                fusedops.gelu(x, approximate=approximate)
        except BaseException as error:
            failures.append(error)

    names = ("none", "tanh", "quick", "none")
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


CHECKS: tuple[Callable[[], None], ...] = (
    check_threads,
    check_rope,
    check_fault,
    check_long_gelu,
    check_layers,
    check_samples,
)

if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    torch.manual_seed(0)
    for check in CHECKS:
        check()
    assert fusedops.mps.is_available()
