"""Runs a kernel through requests and returns what was seen, as plain data. It judges nothing.

A request is a dict: ``kind``, ``args``, ``kwargs`` and what the kind needs; an observation is a
dict of tensors, numbers and strings, so that both travel through a pipe without pickle. The
functions that look at results are taken hold of when this module is imported, before any candidate.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
import timeit
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedops import isa

__all__ = ["answer", "line", "memory", "state"]

_sleep = time.sleep
_clone, _detach, _grad = Tensor.clone, Tensor.detach, torch.autograd.grad
_get_threads, _set_threads = torch.get_num_threads, torch.set_num_threads

# What a benchmark or a check would call; replaced by a candidate, it would lie.
_WATCHED: tuple[tuple[Any, str], ...] = (
    *((time, n) for n in ("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic")),
    *((time, n) for n in ("monotonic_ns", "process_time", "process_time_ns", "sleep")),
    (timeit, "default_timer"),
    *((torch, n) for n in ("allclose", "equal", "isclose", "empty", "empty_like", "isnan")),
    (torch.testing, "assert_close"),
    *((Tensor, n) for n in ("clone", "to", "double", "allclose", "equal", "__eq__")),
    *((torch.cuda, n) for n in ("synchronize", "Event")),
)
_ORIGINALS = tuple(getattr(owner, name) for owner, name in _WATCHED)


def answer(kernel: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """The observation of one request."""
    return _KINDS[request["kind"]](kernel, request)


def memory(args: Sequence[Any]) -> list[Tensor]:
    """All bytes behind the arguments that are tensors, those between the elements included."""
    return [_clone(_storage(t)) for t in _tensors(args)]


def state() -> dict[str, Any]:
    """What a kernel has to leave as it found it; replaced: the names of patched functions."""
    tiny = torch.tensor(1e-40)
    return {
        "number of threads": _get_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "flushing of subnormals": bool((tiny * 1.0 == 0.0).item()),
        "instruction set": isa.current(),
        "FUSEDOPS_ISA": os.environ.get("FUSEDOPS_ISA", ""),
        "replaced": [
            f"{owner.__name__}.{name}"
            for (owner, name), original in zip(_WATCHED, _ORIGINALS, strict=True)
            if getattr(owner, name) is not original
        ],
    }


# --- one call -----------------------------------------------------------------------------------


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


def _storage(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def _range(t: Tensor) -> list[int]:
    storage = t.untyped_storage()
    return [storage.data_ptr(), storage.data_ptr() + storage.nbytes()]


def _is_plain(t: Any) -> bool:
    return type(t) is Tensor and t.device.type == "cpu" and t.layout == torch.strided


def _snapshot(t: Any) -> Any:
    return _clone(_detach(t), memory_format=torch.contiguous_format) if _is_plain(t) else None


def _layout(args: Sequence[Any]) -> list[list[Any]]:
    return [[[*t.shape], [*t.stride()], t.storage_offset()] for t in _tensors(args)]


def line(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _run(
    kernel: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], list[Any]]:
    """The record of one call, and its outputs themselves."""
    record: dict[str, Any] = {"error": None, "outputs": [], "types": [], "devices": [], "at": []}
    try:
        result = kernel(*args, **kwargs)
    except (Exception, SystemExit) as error:
        return {**record, "error": line(error)}, []
    outputs = [*result] if isinstance(result, tuple | list) else [result]
    for y in outputs:
        record["outputs"].append(_snapshot(y))
        record["types"].append(f"{type(y).__module__}.{type(y).__qualname__}")
        record["devices"].append(str(y.device) if isinstance(y, Tensor) else "")
        record["at"].append(_range(y) if _is_plain(y) else [0, 0])
    return record, outputs


_mallopt: Any
try:
    _mallopt = ctypes.CDLL(None).mallopt
except (AttributeError, OSError, TypeError):  # not glibc
    _mallopt = None
_PERTURB, _PATTERN = -6, 0x80  # fresh memory is then full of 0x7f: 3.4e38, in float16 NaN


@contextmanager
def _poisoned(sizes: Sequence[int]) -> Iterator[None]:
    """Inside, memory that is allocated and not written is poison: what a lazy kernel returns.

    glibc fills every fresh block. Elsewhere, freed blocks of the sizes are full of NaN.
    """
    if _mallopt is not None:
        _mallopt(_PERTURB, _PATTERN)
    blocks = [torch.full((n,), 0xFF, dtype=torch.uint8) for n in sizes if n < 1 << 26] * 2
    del blocks
    try:
        yield
    finally:
        if _mallopt is not None:
            _mallopt(_PERTURB, 0)


# --- kinds of requests --------------------------------------------------------------------------


def _value(kernel: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """Two calls on the same inputs, in poisoned memory."""
    args, kwargs = request["args"], request["kwargs"]
    with _poisoned([t.untyped_storage().nbytes() for t in _tensors(args)]):
        first, held = _run(kernel, args, kwargs)
    if first["error"] is not None:
        return {"first": first}
    with _poisoned([end - begin for begin, end in first["at"]]):
        second, _ = _run(kernel, args, kwargs)
    return {
        "first": first,
        "second": second,
        "later": [_snapshot(y) for y in held],
        "inputs_at": [_range(t) for t in _tensors(args)],
        "memory": memory(args),
        "layout": _layout(args),
    }


def _sequence(kernel: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """One call after the other, every output kept; all outputs looked at once more at the end."""
    records, kept = [], []
    for args in request["calls"]:
        record, outputs = _run(kernel, args, request["kwargs"])
        records.append(record)
        kept.append(outputs)
    _sleep(0.05)
    return {"records": records, "later": [[_snapshot(y) for y in outputs] for outputs in kept]}


def _rewrite(kernel: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """Calls on the same tensors, whose memory changes in between without PyTorch's knowledge."""
    args, kwargs = request["args"], request["kwargs"]
    records = [_run(kernel, args, kwargs)[0]]
    for index, new in request["contents"]:
        size = new.untyped_storage().nbytes()
        ctypes.memmove(
            args[index].untyped_storage().data_ptr(), new.untyped_storage().data_ptr(), size
        )
        records.append(_run(kernel, args, kwargs)[0])
    return {"records": records}


def _threads(kernel: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """The same call under several numbers of threads."""
    before, records = _get_threads(), []
    for count in request["counts"]:
        _set_threads(count)
        records.append(_run(kernel, request["args"], request["kwargs"])[0])
    _set_threads(before)
    return {"records": records}


def _gradients(kernel: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """Forward under autograd, then backward from random cotangents."""
    args = [
        _detach(a).requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in request["args"]
    ]
    leaves = [a for a in _tensors(args) if a.requires_grad]
    with torch.enable_grad():
        record, outputs = _run(kernel, args, request["kwargs"])
    seen: dict[str, Any] = {"record": record, "error": None, "gradients": []}
    if record["error"] is not None:
        return seen
    seen["recorded"] = [isinstance(y, Tensor) and y.requires_grad for y in outputs]
    if not all(seen["recorded"]):
        return seen
    g = torch.Generator().manual_seed(request["seed"])
    cotangents = [
        torch.randn(y.shape, dtype=torch.float64, generator=g).to(y.dtype) for y in outputs
    ]
    seen["cotangents"] = [_clone(c) for c in cotangents]
    try:
        found = _grad(outputs, leaves, cotangents, allow_unused=True)
        seen["gradients"] = [_snapshot(g) for g in found]
    except (Exception, SystemExit) as error:
        seen["error"] = line(error)
    seen["memory"] = memory((*request["args"], *cotangents))
    seen["later"] = [_snapshot(y) for y in outputs]
    return seen


class _Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def _uncompiled() -> AbstractContextManager[Any]:
    """Inside, functions of torch.compile run as they were written.

    Under a dispatch mode they do so anyway, but then the compiler takes them for functions that it
    cannot compile, and forgets to set its settings back.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return cast(AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))


def _operations(kernel: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """What PyTorch was asked to do, and whether the reference's own code ran."""
    codes, ran = {tuple(code) for code in request["codes"]}, []

    def profile(frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and (code.co_filename, code.co_firstlineno, code.co_name) in codes:
            ran.append(code.co_name)

    log, before = _Log(), sys.getprofile()
    if before is None:  # a profiler of somebody else's, which may not be put back, goes on instead
        sys.setprofile(profile)
    try:
        with log, _uncompiled():
            record, _ = _run(kernel, request["args"], request["kwargs"])
    finally:
        if before is None:
            sys.setprofile(None)
    return {"record": record, "operations": log.names, "reference": sorted({*ran})}


def _guarded(kernel: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """A call whose inputs end at a page nobody may touch, and one whose inputs start behind one."""
    records = []
    for end in (True, False):
        args = [_beside_guard(a, end) if isinstance(a, Tensor) else a for a in request["args"]]
        records.append(_run(kernel, args, request["kwargs"])[0])
    return {"records": records}


def _beside_guard(t: Tensor, end: bool) -> Tensor:
    """A copy of t with its strides, in memory that is never given back."""
    if t.numel() == 0 or t.is_neg():
        return t
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    room = -(-span * t.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    whole = libc.mmap(
        None, room + 2 * mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0
    )
    begin = whole + mmap.PAGESIZE
    for guard in (whole, begin + room):
        if libc.mprotect(guard, mmap.PAGESIZE, 0) != 0:
            raise MemoryError("no guard page")
    at = begin + room - span * t.element_size() if end else begin
    buffer = (ctypes.c_char * (span * t.element_size())).from_address(at)
    flat = torch.frombuffer(buffer, dtype=t.dtype, count=span)
    return flat.as_strided(t.shape, t.stride()).copy_(t)


def _state(kernel: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    return state()


_KINDS: dict[str, Callable[[Callable[..., Any], dict[str, Any]], dict[str, Any]]] = {
    "value": _value,
    "sequence": _sequence,
    "rewrite": _rewrite,
    "threads": _threads,
    "gradients": _gradients,
    "operations": _operations,
    "guarded": _guarded,
    "state": _state,
}
