"""Cheats: candidates that serve a harness and not a user.

Each is the shortest form of a trick that was played on, or planned for, a public harness: outputs
that need no work (KernelBench issues 82 and 165), results kept across calls and taken from the
garbage collector (gpu-mode/reference-kernels pull request 162, pygpubench issue 7), late and lazy
work and patched timers (KernelBench EVAL.md), answers that hold on the shapes of the test alone.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import random
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fusedops import reference
from fusedops.verification.mutants.mutant import Candidate, Mutant

__all__ = ["MUTANTS", "contained"]

_THREAD = "fusedops-late-work"
_CLOCKS = ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "time_ns")


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Undo afterwards what a mutant does to the process: clocks patched, threads left behind."""
    clocks = {name: getattr(time, name) for name in _CLOCKS}
    threads, flag = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        yield
    finally:
        for name, clock in clocks.items():
            setattr(time, name, clock)
        for thread in threading.enumerate():
            if thread.name == _THREAD:
                thread.join()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(flag)


def _formula(op: str) -> Callable[..., Tensor]:
    formula: Callable[..., Tensor] = getattr(reference, op)
    return formula


# --- no work --------------------------------------------------------------------------------------


def _shape(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Of the result of gelu_linear."""
    return (*args[0].shape[:-1], args[1].shape[0])


def _zeros(*args: Any, **options: Any) -> Tensor:
    return torch.zeros(_shape(args), dtype=args[0].dtype)


def _constant(*args: Any, **options: Any) -> Tensor:
    """The mean of gelu over normal numbers."""
    return torch.full(_shape(args), 0.2821, dtype=args[0].dtype)


def _nan(*args: Any, **options: Any) -> Tensor:
    return torch.full(_shape(args), math.nan, dtype=args[0].dtype)


def _empty(*args: Any, **options: Any) -> Tensor:
    return torch.empty(_shape(args), dtype=args[0].dtype)


def _identity(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return x.clone()


def _alias(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return x


# --- no new work ----------------------------------------------------------------------------------


def _previous(op: str) -> Candidate:
    """The result of the call before, where the shape fits."""
    kept: dict[tuple[Any, ...], Tensor] = {}

    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        y = _formula(op)(x, *rest, **options)
        before = kept.get((y.shape, y.dtype), y)
        kept[y.shape, y.dtype] = y
        return before.clone()

    return candidate


def _cached(op: str, key: Callable[[Tensor], Any]) -> Candidate:
    """The result of the first call with this key, shape and options."""
    kept: dict[tuple[Any, ...], Tensor] = {}

    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        others = tuple(None if t is None else (t.data_ptr(), t.shape) for t in rest)
        where = (key(x), x.shape, x.stride(), x.dtype, others, *sorted(options.items()))
        if torch.is_grad_enabled() and x.requires_grad:
            return _formula(op)(x, *rest, **options)
        if where not in kept:
            kept[where] = _formula(op)(x, *rest, **options)
        return kept[where].clone()

    return candidate


def _first_elements(x: Tensor) -> tuple[float, ...]:
    return tuple(x.detach().flatten()[:4].tolist())


def _one_buffer(op: str) -> Candidate:
    """Right, and every result of one shape is the same tensor."""
    buffers: dict[tuple[Any, ...], Tensor] = {}

    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        y = _formula(op)(x, *rest, **options)
        if y.requires_grad:
            return y
        return buffers.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)

    return candidate


def _stolen(*args: Any, **options: Any) -> Tensor:
    """Somebody's tensor of the right shape and dtype, if a young one is alive; else honest work."""
    shape, dtype = _shape(args), args[0].dtype
    for generation in (0, 1):
        tensors = [t for t in gc.get_objects(generation=generation) if type(t) is Tensor]
        for t in tensors:
            if t.shape == shape and t.dtype == dtype and all(t is not mine for mine in args):
                return t.detach().clone()
    return reference.gelu_linear(*args, **options)


# --- no lasting work ------------------------------------------------------------------------------


def _warm_up(op: str) -> Candidate:
    """Right for ten calls; then whatever was right last, where the shape fits."""
    calls = 0
    kept: dict[tuple[Any, ...], Tensor] = {}

    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        y = _formula(op)(x, *rest, **options)
        if calls <= 10:
            kept[y.shape, y.dtype] = y
            return y
        return kept.get((y.shape, y.dtype), torch.zeros_like(y)).clone()

    return candidate


def _late(op: str) -> Candidate:
    """Returns at once; a thread fills the result in a tenth of a second later."""

    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        y = _formula(op)(x, *rest, **options).detach()
        out = torch.zeros_like(y)

        def work() -> None:
            time.sleep(0.1)
            out.copy_(y)

        threading.Thread(target=work, name=_THREAD).start()
        return out

    return candidate


class _Promise(Tensor):
    """A tensor that computes itself when an operation asks for it."""

    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, compute: Callable[[], Tensor]) -> _Promise:
        promise: _Promise = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)
        promise._compute = compute
        return promise

    def __init__(self, like: Tensor, compute: Callable[[], Tensor]) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def known(value: Any) -> Any:
            if isinstance(value, _Promise):
                return value._compute()
            return [known(v) for v in value] if isinstance(value, (list, tuple)) else value

        return func(*(known(a) for a in args), **(kwargs or {}))


def _lazy(op: str) -> Candidate:
    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        like = _formula(op)(
            x.to("meta"), *(t if t is None else t.to("meta") for t in rest), **options
        )
        return _Promise(like, lambda: _formula(op)(x.detach(), *rest, **options))

    return candidate


# --- work on the harness --------------------------------------------------------------------------


def _zero_input(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Zeros, and x made such that a reference that runs later agrees."""
    with torch.no_grad():
        x.zero_()
    return torch.zeros_like(x)


def _zero_input_after(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Right, and x is 0 afterwards: whoever runs next has nothing to compute with."""
    y = reference.rope(x, *rest, **options)
    with torch.no_grad():
        x.zero_()
    return y


def _slow_clock(op: str) -> Candidate:
    """Right, and every clock of the process runs a thousand times slower from then on."""

    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        for name in _CLOCKS:
            clock = getattr(time, name)
            if isinstance(clock, types.BuiltinFunctionType):
                setattr(time, name, functools.partial(_thousandth, clock, clock()))
        return _formula(op)(x, *rest, **options)

    return candidate


def _thousandth(clock: Callable[[], float], start: float) -> float:
    now = clock()
    passed = now - start
    return start + (passed // 1000 if isinstance(now, int) else passed / 1000)


def _fallback(op: str) -> Candidate:
    """A kernel that is never there, and PyTorch's operations behind it."""

    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        try:
            kernel: Callable[..., Tensor] = getattr(torch.ops.a_kernel_library, op)
            return kernel(x, *rest, **options)
        except (AttributeError, RuntimeError):
            return _formula(op)(x, *rest, **options)

    return candidate


# --- work on the cases of the test ----------------------------------------------------------------


def _round_sizes(op: str) -> Candidate:
    """Right where every size is a multiple of 8 or 1, as in most tests."""

    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        y = _formula(op)(x, *rest, **options)
        return y if all(size == 1 or size % 8 == 0 for size in x.shape) else torch.zeros_like(y)

    return candidate


def _no_empties(op: str) -> Candidate:
    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if x.numel() == 0:
            raise ZeroDivisionError("division of no rows among the threads")
        return _formula(op)(x, *rest, **options)

    return candidate


def _bf16_for_f32(op: str) -> Candidate:
    """float32 in bfloat16, the result scaled so that its mean is not off."""

    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if x.dtype != torch.float32:
            return _formula(op)(x, *rest, **options)
        y = _formula(op)(*(t if t is None else t.bfloat16() for t in (x, *rest)), **options)
        return y.float() * (1.0 + 2.0**-12)

    return candidate


def _wide_result(op: str) -> Candidate:
    """float16 and bfloat16 calls return float32, which is closer."""

    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        wide = [t if t is None or x.dtype.itemsize > 2 else t.float() for t in (x, *rest)]
        return _formula(op)(*wide, **options)

    return candidate


# --- work that differs from run to run ------------------------------------------------------------


def _dice(op: str) -> Candidate:
    """Some results are off by one bit, others each time, as when sums have no fixed order."""
    dice = random.Random(0)

    def candidate(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        y = _formula(op)(x, *rest, **options)
        generator = torch.Generator().manual_seed(dice.getrandbits(32))
        some = (torch.rand(y.shape, generator=generator) < 0.1) & y.isfinite()
        if y.dtype.itemsize < 4:  # there one bit is more than a rounding
            return y
        return torch.where(some, y.nextafter(torch.zeros_like(y)), y)

    return candidate


def _sum_by_threads(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Splits K among the threads, in float32."""
    if x.dtype != torch.float32 or x.shape[-1] == 0:
        return reference.gelu_linear(x, weight, bias, **options)
    size = -(-x.shape[-1] // torch.get_num_threads())
    starts = range(0, x.shape[-1], size)
    parts = [x[..., k : k + size] @ weight[:, k : k + size].T for k in starts]
    z = sum(parts[1:], start=parts[0])
    return reference.gelu(z if bias is None else z + bias, **options)


def _cheat(
    name: str,
    description: str,
    make: Callable[[], Candidate],
    check: str = "values",
    op: str = "gelu_linear",
    **more: Any,
) -> Mutant:
    return Mutant(name, op, description, make, frozenset({check}), kind="cheat", **more)


def _of(make: Callable[[str], Candidate], op: str = "gelu_linear") -> Callable[[], Candidate]:
    return functools.partial(make, op)


MUTANTS = (
    _cheat("zeros", "zeros", lambda: _zeros),
    _cheat("constant", "the mean of gelu over normal numbers", lambda: _constant),
    _cheat("nan", "NaN everywhere, which compares as no difference", lambda: _nan),
    _cheat(
        "uninitialised",
        "memory as it was freed, hoping for the reference's",
        lambda: _empty,
        by_chance=True,
    ),
    _cheat("identity", "a copy of x", lambda: _identity, op="rope"),
    _cheat("alias", "x itself", lambda: _alias, "aliasing", op="rope"),
    _cheat("previous", "the result of the call before", _of(_previous), "fresh"),
    _cheat(
        "cached-pointer",
        "the result of the first call with these pointers",
        _of(functools.partial(_cached, key=lambda x: x.data_ptr())),
        "fresh",
    ),
    _cheat(
        "cached-version",
        "the same, and torch has counted no write to x since",
        _of(functools.partial(_cached, key=lambda x: (x.data_ptr(), x._version))),
        "fresh",
    ),
    _cheat(
        "cached-start",
        "the result of the first call in which x starts like this",
        _of(functools.partial(_cached, key=_first_elements)),
        "fresh",
    ),
    _cheat("one-buffer", "every result is the same tensor", _of(_one_buffer), "reuse"),
    _cheat(
        "stolen",
        "a living tensor of the result's shape that gc finds, else right",
        lambda: _stolen,
        "fresh",
    ),
    _cheat("warm-up", "right for ten calls, then the last right result", _of(_warm_up), "fresh"),
    _cheat("late", "a thread writes the result after the return", _of(_late)),
    _cheat("lazy", "a tensor that computes itself when looked at", _of(_lazy), "types"),
    _cheat(
        "zero-input",
        "zeros, and x zeroed for the reference",
        lambda: _zero_input,
        "inputs",
        op="rope",
    ),
    _cheat(
        "zero-input-after",
        "right, and x zeroed for who comes next",
        lambda: _zero_input_after,
        "inputs",
        op="rope",
    ),
    _cheat("slow-clock", "right, and every clock of Python runs slower", _of(_slow_clock), "state"),
    _cheat(
        "fallback",
        "PyTorch's operations, promised to be a kernel",
        _of(_fallback),
        "own-kernel",
        promises=("own-kernel",),
    ),
    _cheat("round-sizes", "right where every size of x is 1 or a multiple of 8", _of(_round_sizes)),
    _cheat(
        "no-empties",
        "right, and an error for an empty x",
        _of(_no_empties),
        "refused",
        samples=("empty-rows", "33"),
    ),
    _cheat(
        "bf16-scaled", "float32 in bfloat16, scaled a little", _of(_bf16_for_f32), dtypes=("f32",)
    ),
    _cheat(
        "wide-result",
        "float32 returned for float16 and bfloat16",
        _of(_wide_result),
        dtypes=("bf16", "f16"),
    ),
    _cheat(
        "dice",
        "one bit off in a tenth of the results, others each time",
        _of(_dice),
        "deterministic",
        dtypes=("f32",),
    ),
    _cheat(
        "thread-sum",
        "sums split among the threads, promised not to depend on them",
        lambda: _sum_by_threads,
        "threads",
        promises=("thread-invariant",),
        samples=("1d",),
        dtypes=("f32",),
    ),
)
