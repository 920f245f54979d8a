"""Where the library runs: devices, modes, threads, processes, instruction sets, a bare import."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_refused, python
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fusedops
from fusedops import _C, _library
from fusedops.__main__ import main
from fusedops.testing import assert_same_bits

ops = torch.ops.fusedops


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    turns = 6.0 * torch.rand(shape)
    return turns.cos(), turns.sin()


# --- one call of everything -----------------------------------------------------------------------

# By name: a call of a public function on x [2, 3, 5, 8] and what it needs besides.
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] = {
    "rope": lambda x, cos, sin, w: fusedops.rope(x, cos, sin),
    "rope-out": lambda x, cos, sin, w: fusedops.rope(x, cos, sin, out=torch.empty_like(x)),
    "rope_": lambda x, cos, sin, w: fusedops.rope_(x.clone(), cos, sin),
    "rope_qk": lambda x, cos, sin, w: fusedops.rope_qk(x, x[:, :1], cos, sin),
    "rope_qk_": lambda x, cos, sin, w: fusedops.rope_qk_(x.clone(), x[:, :1].clone(), cos, sin),
    "gelu": lambda x, cos, sin, w: fusedops.gelu(x),
    "linear": lambda x, cos, sin, w: fusedops.linear(x, w),
    "gelu_linear": lambda x, cos, sin, w: fusedops.gelu_linear(x, w, w[:, 0]),
    "gelu_linear-out": lambda x, cos, sin, w: fusedops.gelu_linear(
        x, w, out=x.new_empty(2, 3, 5, 6)
    ),
}
each_call = pytest.mark.parametrize("call", CALLS)
each_recorded = pytest.mark.parametrize("call", [name for name in CALLS if "out" not in name])


def arguments(device: str = "cpu") -> tuple[Tensor, ...]:
    """x, cos, sin and a weight."""
    tensors = torch.randn(2, 3, 5, 8), *angles(16, 4), torch.randn(6, 8)
    return tuple(t.to(device) for t in tensors)


def results(call: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    result = CALLS[call](*tensors)
    return result if isinstance(result, tuple) else (result,)


# --- devices --------------------------------------------------------------------------------------


@each_call
def test_meta_device(call: str) -> None:
    expected = results(call, *arguments())
    for shape, like in zip(results(call, *arguments("meta")), expected, strict=True):
        assert shape.is_meta
        assert (shape.shape, shape.dtype, shape.stride()) == (like.shape, like.dtype, like.stride())


@each_recorded
def test_training_on_the_meta_device(call: str) -> None:
    x, *rest = arguments("meta")
    x.requires_grad_()
    sum(t.sum() for t in results(call, x * 1, *rest)).backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def on_the_cpu() -> list[Tensor]:
    """The arguments, whatever the default device is."""
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = (2, 3, 5, 8), (16, 4), (16, 4), (6, 8)
    return [torch.randn(s, device="cpu", generator=generator) for s in shapes]


# Tensors that a function makes for itself must follow its inputs, not the default.
@each_call
def test_default_device(call: str, default_device: None) -> None:
    assert {t.device.type for t in results(call, *on_the_cpu())} == {"cpu"}


@each_recorded
def test_training_beside_the_default_device(call: str, default_device: None) -> None:
    x, *rest = on_the_cpu()
    x.requires_grad_()
    sum(t.sum() for t in results(call, x * 1, *rest)).backward()
    assert x.grad is not None
    assert x.grad.device.type == "cpu"


def test_module_on_the_default_device(default_device: None) -> None:
    module = fusedops.nn.GELULinear(8, 6)
    assert module.weight.is_meta
    assert module(torch.randn(2, 8)).is_meta


# What a device without kernels runs; _op_dk sends CPU tensors there.
FALLBACK = torch._C.DispatchKey.CompositeExplicitAutograd
DEVICES = ["CUDA", "MPS", "XPU", "HPU", "PrivateUse1"]


def fallback_calls() -> dict[str, tuple[Any, ...]]:
    x, cos, sin, w = arguments()
    rest = cos, sin, torch.arange(5), 2, False, True, True
    k = x[:, :1].clone()
    linear = x, w, w[:, 0]
    z, grad = torch.randn(2, 2, 3, 5, 6)
    quantized = x, *fusedops.quantize_weight(w, torch.int8), w[:, 0]
    return {
        "rope": (x, *rest),
        "rope_nograd": (x, *rest),
        "rope_unfused": (x, *rest),
        "rope_": (x.clone(), *rest),
        "rope__nograd": (x.clone(), *rest),
        "rope_out": (x, *rest, torch.empty_like(x)),
        "rope_out_nograd": (x, *rest, torch.empty_like(x)),
        "rope_qk": (x, k, *rest),
        "rope_qk_nograd": (x, k, *rest),
        "rope_qk_": (x.clone(), k, *rest),
        "rope_qk__nograd": (x.clone(), k, *rest),
        "rope_qk_check": (x, k, *rest),
        "gelu": (x, "tanh"),
        "gelu_nograd": (x, "quick"),
        "gelu_backward": (x.sin(), x, "none"),
        "gelu_backward_nograd": (x.sin(), x, "tanh"),
        "linear": linear,
        "linear_nograd": linear,
        "gelu_linear": (*linear, "none"),
        "gelu_linear_nograd": (*linear, "tanh"),
        "gelu_linear_preact": (*linear, "quick"),
        "gelu_linear_preact_nograd": (*linear, "none"),
        "gelu_linear_out": (*linear, "none", torch.empty(2, 3, 5, 6)),
        "gelu_linear_out_nograd": (*linear, "tanh", torch.empty(2, 3, 5, 6)),
        "gelu_linear_quantized": (*quantized, "none", False),
        "gelu_linear_quantized_nograd": (*quantized, "tanh", True),
        "gelu_linear_dz": (grad, z, "none"),
        "gelu_linear_dz_nograd": (grad, z, "tanh"),
        "gelu_linear_backward": (grad, x, w, z, "quick", True),
        "gelu_linear_backward_nograd": (grad, None, w, z, "none", False),
        "linear_backward": (grad, x, w, True),
        "linear_backward_nograd": (grad, x, None, True),
        "linear_activation": (*linear, "silu"),
        "linear_activation_nograd": (*linear, "relu"),
        "linear_activation_preact": (*linear, "relu2"),
        "linear_activation_preact_nograd": (*linear, "gelu"),
        "linear_activation_backward": (grad, x, w, z, "relu2", True),
        "linear_activation_backward_nograd": (grad, x, None, z, "silu", False),
        "activation_backward": (x.sin(), x, "silu"),
        "activation_backward_nograd": (x.sin(), x, "relu2"),
    }


each_op = pytest.mark.parametrize("op", fallback_calls())


def test_every_op_is_called() -> None:
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    ours = {op for namespace, _, op in names if namespace == "fusedops"}
    # Of packed weights test_packed.py says that they are of the CPU alone.
    assert {*fallback_calls()} == {op for op in ours if "pack" not in op}


@each_op
@pytest.mark.parametrize("device", DEVICES)
def test_fallback_serves_every_device(device: str, op: str) -> None:
    served = torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fusedops::{op}", device)
    assert served


@each_op
@pytest.mark.filterwarnings("ignore:fusedops has no")
def test_fallback_gives_the_same_result(op: str) -> None:
    torch.manual_seed(0)
    given = fallback_calls()[op]
    torch.manual_seed(0)
    twins = fallback_calls()[op]
    actual = getattr(ops, op).default._op_dk(FALLBACK, *given)
    expected = getattr(ops, op)(*twins)
    torch.testing.assert_close(actual, expected)
    written, expected = ([t for t in call if isinstance(t, Tensor)] for call in (given, twins))
    torch.testing.assert_close(written, expected)


@pytest.fixture
def _unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_warned", set())


@pytest.mark.usefixtures("_unwarned")
def test_fallback_warns_once_for_each_op() -> None:
    calls = fallback_calls()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for op in (
            "rope",
            "rope_nograd",
            "rope",
            "gelu_linear_preact",
            "gelu_linear_nograd",
            "gelu",
        ):
            getattr(ops, op).default._op_dk(FALLBACK, *calls[op])
    assert [str(w.message) for w in caught] == [
        f"fusedops has no {op} kernel for cpu: PyTorch operations run instead"
        for op in ("rope", "gelu_linear", "gelu")
    ]
    assert {w.category for w in caught} == {UserWarning}


@pytest.mark.parametrize(
    ("op", "name"),
    [("rope_nograd", "rope"), ("rope_qk_", "rope_qk_"), ("gelu_linear_out", "gelu_linear")],
)
def test_strict_mode_raises(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPS_STRICT", "1")
    message = (
        rf"^\[{name}\] device must be one with a kernel \(cpu\) under FUSEDOPS_STRICT=1 "
        "but got cpu$"
    )
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op).default._op_dk(FALLBACK, *fallback_calls()[op])


@each_call
def test_strict_mode_leaves_the_cpu_alone(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPS_STRICT", "1")
    assert results(call, *arguments())


# --- modes ----------------------------------------------------------------------------------------


@each_call
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("inside", [False, True])
def test_without_grad(call: str, mode: Any, inside: bool) -> None:
    torch.manual_seed(0)
    expected = results(call, *arguments())
    torch.manual_seed(0)
    given = arguments()
    given[0].requires_grad_()
    with mode():
        torch.manual_seed(0)
        actual = results(call, *(arguments() if inside else given))
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)
        assert not one.requires_grad
        assert one.is_inference() is (mode is torch.inference_mode)


# An inference tensor may be read where autograd is on.
@each_call
def test_inference_tensors_outside(call: str) -> None:
    with torch.inference_mode():
        given = arguments()
    assert all(t.isfinite().all() for t in results(call, *given))


BAD_ON_META: dict[str, tuple[Callable[[], Any], str]] = {
    "linear": (lambda: fusedops.linear(meta(3, 4), meta(5, 7)), "K = 7 but got shape [3, 4]"),
    "gelu": (lambda: fusedops.gelu(meta(3), approximate="erf"), "approximate must be"),
    "gelu_linear": (lambda: fusedops.gelu_linear(meta(3, 4), meta(5)), "weight must have 2"),
    "rope": (lambda: fusedops.rope(meta(1, 2, 100, 8), meta(16, 4), meta(16, 4)), "at least"),
    "rope_": (
        lambda: fusedops.rope_(meta(4, 8), meta(16, 4), meta(16, 4)),
        "[rope_] x must have 3",
    ),
    "rope_qk": (
        lambda: fusedops.rope_qk(meta(1, 5, 8), meta(4, 8), meta(16, 4), meta(16, 4)),
        "[rope_qk] k must have 3 or 4 dimensions",
    ),
    "out": (
        lambda: fusedops.rope(meta(1, 5, 8), meta(16, 4), meta(16, 4), out=meta(1, 5, 6)),
        "[rope] out must have x's shape",
    ),
}


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize("case", BAD_ON_META)
def test_the_meta_device_checks(case: str) -> None:
    call, message = BAD_ON_META[case]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()


# --- memory ---------------------------------------------------------------------------------------


class _Mallinfo2(ctypes.Structure):
    """Of glibc: what malloc has given out is uordblks."""

    _fields_ = (
        ("before", ctypes.c_size_t * 7),
        ("uordblks", ctypes.c_size_t),
        ("behind", ctypes.c_size_t * 2),
    )


def allocated() -> int:
    """Bytes given out by malloc and not freed."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo2
    gc.collect()
    return int(libc.mallinfo2().uordblks)


@pytest.fixture
def quick_collector() -> Iterator[None]:
    """Garbage collection that looks at what is made from now on alone."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def refused() -> None:
    x, cos, sin, _ = arguments()
    with pytest.raises(RuntimeError, match="rotary_dim"):
        fusedops.rope(x[..., :4], cos, sin)


def trained(call: str) -> None:
    x, *rest = arguments()
    sum(t.sum() for t in results(call, x.requires_grad_() * 1, *rest)).backward()


LEFT_BEHIND: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: results(name, *arguments()) for name in CALLS},
    **{
        f"{name}-trained": lambda name=name: trained(name)
        for name in ("rope", "rope_", "gelu_linear")
    },
    "positions": lambda: fusedops.rope(*arguments()[:3], torch.arange(5)),
    "table-strided": lambda: fusedops.rope(*arguments()[:1], *(t.t() for t in angles(4, 16))),
    "gelu-strided": lambda: fusedops.gelu(arguments()[0][..., ::2]),
    "linear-strided": lambda: fusedops.linear(
        arguments()[0].transpose(2, 3), torch.randn(6, 10)[:, ::2]
    ),
    "refused": refused,
    "numpy": lambda: _C.gelu_linear(array(3, 4), array(5, 4)),
}


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs mallinfo2 of glibc 2.33"
)
@pytest.mark.parametrize("call", LEFT_BEHIND)
def test_calls_leave_no_memory_behind(call: str, quick_collector: None) -> None:
    run, calls = LEFT_BEHIND[call], 80
    held = []
    for _ in range(4):
        held.append(allocated())
        for _ in range(calls):
            run()
    held.append(allocated())
    # Caches that fill are no leak: that one grows in every round.
    assert min(after - before for before, after in pairwise(held)) < 16 * calls


# --- threads and processes ------------------------------------------------------------------------

# Enough work for two threads of torch's pool.
LARGE: dict[str, Callable[[Tensor], Tensor]] = {
    "rope": lambda x: fusedops.rope(x, *_TABLE, interleaved=True),
    "rope-strided": lambda x: fusedops.rope(x[..., ::2], *(t[:, :16] for t in _TABLE)),
    "rope_": lambda x: fusedops.rope_(x.clone(), *_TABLE),
    "gelu": lambda x: fusedops.gelu(x),
    "gelu_backward": lambda x: ops.gelu_backward(x, x, "tanh"),
    "gelu_linear": lambda x: fusedops.gelu_linear(x.view(-1, 256), x.view(-1, 256)[:300]),
    "gelu_linear-few": lambda x: fusedops.gelu_linear(x.view(-1, 1024)[:3], x.view(-1, 1024)),
    "gelu_linear-some": lambda x: fusedops.gelu_linear(x.view(-1, 1024)[:60], x.view(-1, 1024)),
    "rope_unfused": lambda x: ops.rope_unfused(x, *_TABLE, None, 0, False, False, False),
}
_TABLE = angles(64, 32)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("call", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3])
def test_threads_do_not_change_a_bit(
    call: str, dtype: torch.dtype, count: int, isa: str, threads: Callable[[int], None]
) -> None:
    x = torch.randn(8, 8, 64, 64).to(dtype)
    threads(1)
    assert _C.threads() == 1
    alone = LARGE[call](x)
    threads(count)
    assert _C.threads() == count
    assert_same_bits(LARGE[call](x), alone)


@pytest.mark.parametrize("workers", [2, 5])
def test_python_threads_at_once(workers: int) -> None:
    x = torch.randn(8, 8, 64, 64)
    expected = {name: call(x) for name, call in LARGE.items()}
    together = threading.Barrier(workers)

    def run(_: int) -> dict[str, Tensor]:
        together.wait()
        return {name: call(x) for _ in range(3) for name, call in LARGE.items()}

    with ThreadPoolExecutor(workers) as pool:
        for actual in pool.map(run, range(workers)):
            for name, result in actual.items():
                assert_same_bits(result, expected[name])


def test_training_in_python_threads() -> None:
    model = nn.Sequential(fusedops.nn.GELULinear(16, 32), nn.Linear(32, 1))
    batches = torch.randn(6, 9, 16)

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x).sum(), [*model.parameters()])

    expected = [gradients(x) for x in batches]
    with ThreadPoolExecutor(3) as pool:
        for actual, wanted in zip(pool.map(gradients, batches), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


class _Turned(Dataset[Tensor]):
    """Items made by the kernels, in whatever process asks."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        x = torch.full((8, 8, 64, 64), 0.1 * (index + 1))
        return LARGE["gelu_linear"](LARGE["rope"](x))[:3]


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers() -> None:
    items = _Turned()
    expected = [items[i] for i in range(len(items))]  # the parent's threads exist before the fork
    loader = DataLoader(items, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for actual, wanted in zip(loader, expected, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.slow
def test_spawned_worker() -> None:
    done = python(
        """
        import concurrent.futures, multiprocessing, torch, fusedops
        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            x, w = torch.randn(4, 8), torch.randn(3, 8)
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                result = pool.submit(fusedops.gelu_linear, x, w).result()
                assert torch.equal(result, fusedops.gelu_linear(x, w))
            print("equal")
        """
    )
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


# --- the instruction set --------------------------------------------------------------------------


def test_supported_are_compiled_best_first() -> None:
    compiled, supported = fusedops.isa.compiled(), fusedops.isa.supported()
    assert compiled[-1] == supported[-1] == "portable"
    assert [name for name in compiled if name in supported] == [*supported]
    assert fusedops.isa.current() in supported


def test_use_as_a_call_and_as_a_context() -> None:
    best, worst = fusedops.isa.supported()[0], fusedops.isa.supported()[-1]
    before = fusedops.isa.current()
    fusedops.isa.use(worst)
    assert fusedops.isa.current() == worst
    with fusedops.isa.use(best):
        assert fusedops.isa.current() == best
        with fusedops.isa.use(worst), pytest.raises(ZeroDivisionError):
            _ = 1 / 0
        assert fusedops.isa.current() == best
    assert fusedops.isa.current() == worst
    fusedops.isa.use(before)
    assert fusedops.isa.current() == before


def test_context_is_left_by_an_error() -> None:
    before = fusedops.isa.current()
    with pytest.raises(ZeroDivisionError), fusedops.isa.use("portable"):
        _ = 1 / 0
    assert fusedops.isa.current() == before


def test_use_is_for_all_threads() -> None:
    with fusedops.isa.use("portable"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(fusedops.isa.current).result() == "portable"


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", "avx2 "])
def test_unknown_name_is_refused(name: str) -> None:
    before = fusedops.isa.current()
    names = ", ".join(fusedops.isa.compiled())
    message = rf"^\[isa\] name must be one of {names} but got {name}$"
    with pytest.raises(RuntimeError, match=message):
        fusedops.isa.use(name)
    assert fusedops.isa.current() == before


@pytest.mark.skipif(
    fusedops.isa.compiled() == fusedops.isa.supported(),
    reason="needs a CPU that lacks an instruction set of the build",
)
def test_unsupported_name_is_refused() -> None:
    name = next(n for n in fusedops.isa.compiled() if n not in fusedops.isa.supported())
    with pytest.raises(RuntimeError, match=rf"^\[isa\] this CPU must support .* but got {name}$"):
        fusedops.isa.use(name)


SHOW = "import fusedops; print(fusedops.isa.current())"


@pytest.mark.parametrize("name", [pytest.param("", marks=pytest.mark.slow), "portable"])
def test_environment_chooses(name: str) -> None:
    done = python(SHOW, FUSEDOPS_ISA=name)
    expected = name or fusedops.isa.supported()[0]
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected}\n", "")


@pytest.mark.slow
def test_environment_with_an_unknown_name_is_refused() -> None:
    done = python(SHOW, FUSEDOPS_ISA="sse9")
    assert done.returncode == 1
    names = ", ".join(fusedops.isa.compiled())
    expected = f"RuntimeError: [isa] name must be one of {names} but got sse9"
    assert done.stderr.splitlines()[-1] == expected


# --- import and command line ----------------------------------------------------------------------


def test_import_is_silent_light_and_starts_nothing(tmp_path: Path) -> None:
    done = python(
        """
        import os, sys, threading, torch
        tasks = lambda: len(os.listdir("/proc/self/task")) if os.path.isdir("/proc") else 0
        before, running, modules = tasks(), threading.active_count(), set(sys.modules)
        import fusedops
        assert (tasks(), threading.active_count()) == (before, running)
        added = {name for name in set(sys.modules) - modules if name.split(".")[0] != "fusedops"}
        assert not added, added
        """,
        HOME=str(tmp_path),
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_submodules_load_on_use() -> None:
    done = python(
        """
        import sys, fusedops
        names = "bench", "ladder", "nn", "reference", "testing", "verification"
        print([n for n in names if f"fusedops.{n}" in sys.modules])
        print(fusedops.verify.__name__, *[getattr(fusedops, n).__name__ for n in names[:-1]])
        print({"verify", *names[:-1]} <= set(dir(fusedops)))
        fusedops.nonsense
        """
    )
    assert done.stdout.splitlines() == [
        "['reference']",
        "verify fusedops.bench fusedops.ladder fusedops.nn fusedops.reference fusedops.testing",
        "True",
    ]
    last = "AttributeError: module 'fusedops' has no attribute 'nonsense'"
    assert done.stderr.splitlines()[-1] == last


@pytest.mark.slow
def test_extension_may_be_imported_first() -> None:
    done = python("import fusedops._C as c; print(c.isa_current())")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in fusedops.isa.supported()


# Without the package, which loads torch, the file itself says what it lacks.
@pytest.mark.skipif(sys.platform == "win32", reason="needs a loader that reads ELF or Mach-O")
def test_extension_without_torch_says_why() -> None:
    done = python(
        f"""
        from importlib.machinery import ExtensionFileLoader
        from importlib.util import module_from_spec, spec_from_file_location
        spec = spec_from_file_location("_C", {_C.__file__!r})
        spec.loader.exec_module(module_from_spec(spec))
        """
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "libtorch" in last


def test_extension_is_named_for_its_python() -> None:
    assert any(_C.__file__.endswith(suffix) for suffix in EXTENSION_SUFFIXES)


@pytest.mark.slow
def test_info_command() -> None:
    done = python(
        """
        import runpy, sys
        sys.argv = ["fusedops", "info"]
        runpy.run_module("fusedops", run_name="__main__")
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line[:18].strip(): line[18:].strip() for line in done.stdout.splitlines()}
    assert rows["fusedops"] == fusedops.__version__
    assert rows["torch"] == torch.__version__
    assert rows["isa in use"] == fusedops.isa.supported()[0]
    assert all(rows.values())
    assert {"isa compiled", "threads", "compiler", "last cache", "cpu"} <= {*rows}


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "more"]])
def test_unknown_command_explains_itself(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: fusedops ")


# --- NumPy entry points ---------------------------------------------------------------------------

each_float = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def array(*shape: int, dtype: Any = np.float32) -> Any:
    return torch.randn(shape).numpy().astype(dtype)


@each_float
@pytest.mark.parametrize("interleaved", [False, True])
def test_numpy_rope(dtype: Any, interleaved: bool, isa: str) -> None:
    x, cos, sin = array(2, 3, 5, 10, dtype=dtype), *(t.numpy().astype(dtype) for t in angles(7, 4))
    expected = fusedops.rope(*map(torch.from_numpy, (x, cos, sin)), interleaved=interleaved)
    assert_same_bits(torch.from_numpy(_C.rope(x, cos, sin, interleaved)), expected)


@each_float
@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_numpy_gelu(dtype: Any, approximate: str, isa: str) -> None:
    x = array(3, 17, dtype=dtype)
    expected = fusedops.gelu(torch.from_numpy(x), approximate=approximate)
    assert_same_bits(torch.from_numpy(_C.gelu(x, approximate)), expected)


@each_float
@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
@pytest.mark.parametrize("bias", [False, True])
def test_numpy_gelu_linear(dtype: Any, approximate: str, bias: bool, isa: str) -> None:
    x, w = array(9, 17, dtype=dtype), array(13, 17, dtype=dtype)
    b = array(13, dtype=dtype) if bias else None
    tensors = [None if t is None else torch.from_numpy(t) for t in (x, w, b)]
    expected = fusedops.gelu_linear(*tensors, approximate=approximate)  # type: ignore[arg-type]
    assert_same_bits(torch.from_numpy(_C.gelu_linear(x, w, b, approximate)), expected)


TABLES = "[rope] cos and sin must have one shape [positions, rotary_dim / 2] but got other shapes"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: _C.rope(array(3, 5, 8), array(7, 4), array(7, 4)),
            "[rope] x must have 4 dimensions [B, H, S, D] but got 3",
        ),
        (
            lambda: _C.rope(array(2, 3, 5, 8), array(7, 4), array(6, 4)),
            TABLES,
        ),
        (
            lambda: _C.rope(array(2, 3, 5, 8), array(4), array(4)),
            TABLES,
        ),
        (
            lambda: _C.rope(array(2, 3, 5, 8), array(4, 4), array(4, 4)),
            "[rope] the table must have at least seq = 5 rows but got 4",
        ),
        (
            lambda: _C.rope(array(2, 3, 5, 8), array(7, 5), array(7, 5)),
            "[rope] rotary_dim must be at most head_dim 8 but got 10",
        ),
        (
            lambda: _C.gelu(array(3), "erf"),
            "[gelu] approximate must be 'none', 'tanh' or 'quick' but got 'erf'",
        ),
        (
            lambda: _C.gelu_linear(array(3, 4), array(5, 3)),
            "[gelu_linear] x must be [M, K] and weight [N, K] but got other shapes",
        ),
        (
            lambda: _C.gelu_linear(array(3, 4), array(5, 4), array(4)),
            "[gelu_linear] bias must be [5] but got another shape",
        ),
        (
            lambda: _C.gelu_linear(array(3, 4), array(5, 4), None, "erf"),
            "[gelu_linear] approximate must be 'none', 'tanh' or 'quick' but got 'erf'",
        ),
    ],
)
def test_numpy_call_is_refused(call: Callable[[], Any], message: str) -> None:
    assert_refused(call, message)


@pytest.mark.parametrize("dtype", [np.float16, np.int64, np.complex64])
@pytest.mark.parametrize(
    "call",
    [
        lambda ones: _C.rope(ones(2, 3, 5, 8), ones(7, 4), ones(7, 4)),
        lambda ones: _C.gelu(ones(5)),
        lambda ones: _C.gelu_linear(ones(3, 4), ones(6, 4)),
    ],
    ids=["rope", "gelu", "gelu_linear"],
)
def test_numpy_of_other_dtypes_is_refused(call: Callable[..., Any], dtype: Any) -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        call(lambda *shape: np.ones(shape, dtype))


# Strides that are not C order are refused, never read as if they were.
@pytest.mark.parametrize(
    "make", [lambda: np.asfortranarray(array(8, 8)), lambda: array(8, 16)[:, ::2]]
)
@pytest.mark.parametrize("call", [_C.gelu, lambda x: _C.gelu_linear(x, x)], ids=["gelu", "linear"])
def test_numpy_of_other_strides_is_refused(
    call: Callable[..., Any], make: Callable[[], Any]
) -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        call(make())
