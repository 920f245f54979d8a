"""What a kernel is verified on: an op of the registry, or any reference and inputs."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fusedops import reference as formulas
from fusedops.testing import DISTRIBUTIONS, DTYPES, SPECS, Call, OpSpec, Sample
from fusedops.testing.inputs import fill, generator
from fusedops.verification.judge import plain
from fusedops.verification.perturb import Spread, spread

__all__ = ["EFFORTS", "Case", "Task", "one_thread", "op_task", "reference_task"]

EFFORTS = ("quick", "standard", "full")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For making and judging small tensors: waking a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """One call: a sample filled with the numbers of a distribution and a seed."""

    sample: Sample
    dtype: str
    distribution: str = "normal"
    seed: int = 0
    dtypes: Mapping[str, torch.dtype] = field(default_factory=lambda: DTYPES, repr=False)

    def __str__(self) -> str:
        seed = f" seed {self.seed}" if self.seed else ""
        return f"{self.sample.name} {self.dtype} {self.distribution}{seed}"

    def call(self, seed: int = 0) -> Call:
        """The call, in memory of its own; seed moves on from the case's."""
        with one_thread():
            dtype = self.dtypes[self.dtype]
            return self.sample.build(dtype, self.distribution, self.seed + seed)


@dataclass(frozen=True)
class Task:
    """The cases, and the op they are cases of. derived: whether the op's bound is derived by hand.

    cases: for values. gradients: for backward. probes: for what is asked once per dtype.
    """

    spec: OpSpec
    cases: tuple[Case, ...]
    gradients: tuple[Case, ...]
    probes: tuple[Case, ...]
    derived: bool

    @cached_property
    def codes(self) -> list[tuple[str, int, str]]:
        """File, line and name of the functions that a kernel of one's own does not run."""
        if self.derived:
            found = [f for _, f in inspect.getmembers(formulas, inspect.isfunction)]
        else:
            found = [inspect.unwrap(getattr(self.spec.reference, "formula", self.spec.reference))]
        codes = [f.__code__ for f in found if hasattr(f, "__code__")]
        return [
            (c.co_filename, c.co_firstlineno, c.co_name)
            for c in codes
            if not self.derived or c.co_filename == formulas.__file__
        ]

    def spread(self, call: Call) -> Spread:
        """Of the reference's values, for a task whose bound is not derived by hand."""
        return _value_spread(self.spec, call)


def op_task(
    op: str,
    effort: str,
    dtypes: Iterable[str] | None,
    samples: str | Sequence[str] | None,
    seed: int,
) -> Task:
    """An op of ``fusedops.testing.SPECS``; samples: a glob, or several."""
    if op not in SPECS:
        raise ValueError(f"op must be one of {', '.join(SPECS)} but got {op!r}")
    spec = SPECS[op]
    globs = ["*"] if samples is None else [samples] if isinstance(samples, str) else [*samples]
    chosen = [s for s in spec.samples if any(fnmatch.fnmatchcase(s.name, g) for g in globs)]
    if not chosen:
        raise ValueError(f"no sample of {op} is called {' or '.join(globs)}")
    probes = [s for s in chosen if s.name in spec.probes] or chosen[:1]
    names = _dtype_names(spec.dtypes, dtypes, effort)
    if effort == "quick":
        chosen = [s for i, s in enumerate(chosen) if s in probes or i % 4 == 0]
    seeds = range(seed, seed + 3) if effort == "full" else (seed,)
    cases, gradients = [], []
    for index, s in enumerate(chosen):
        for name in names:
            crossed = effort == "full" or s in (probes[:1] if effort == "quick" else probes)
            for distribution in DISTRIBUTIONS if crossed else ("normal",):
                cases += [Case(s, name, distribution, n) for n in seeds]
        # Backward in one dtype after the other: a shape takes the same path in all of them.
        some = names if effort == "full" or s in probes else [names[index % len(names)]]
        if effort != "quick" or s in probes:
            gradients += [Case(s, name, seed=seed) for name in some]
    first = tuple(Case(s, name, seed=seed) for name in names for s in probes[:1])
    return Task(spec, tuple(cases), tuple(gradients), first, derived=True)


def reference_task(
    reference: Callable[..., Any],
    inputs: tuple[Any, ...] | Callable[[torch.Generator], tuple[Any, ...]],
    dtypes: Iterable[str] | None,
    seed: int,
) -> Task:
    """Any reference. Example arguments, redrawn from every distribution, or a maker of arguments.

    Raises:
        ValueError: no argument is a floating-point tensor, or dtypes are asked of modules.
    """
    example = inputs(generator("example")) if callable(inputs) else tuple(inputs)
    floating = [a for a in example if isinstance(a, Tensor) and a.is_floating_point()]
    if not floating:
        raise ValueError("inputs must hold a floating-point tensor")
    if isinstance(reference, nn.Module):
        if dtypes is not None:
            raise ValueError("a module has a dtype of its own: convert it, and leave dtypes out")
        reference = _ModuleReference(reference)
    table = dict(DTYPES)
    given = floating[0].dtype
    if dtypes is None:
        names = [next((n for n, d in DTYPES.items() if d == given), str(given))]
        table.setdefault(names[0], given)
    else:
        names = _dtype_names(DTYPES, dtypes, "full")
    sample = _Inputs("inputs", inputs, convert=dtypes is not None)
    spec = OpSpec(
        name="reference",
        home="",
        schemas=(),
        reference=reference,
        error_bound=lambda call, stepwise: _bounds(spec, call),
        samples=(sample,),
        probes=(sample.name,),
        bench=(),
        random=lambda g: sample,
        dtypes=table,
    )
    some = ("given",) if callable(inputs) else ("given", *DISTRIBUTIONS)
    probes = tuple(Case(sample, name, "given", seed, table) for name in names)
    cases = [replace(p, distribution=d) for p in probes for d in some]
    more = [replace(p, seed=seed + 1 + i) for p in probes for i in range(4)]
    gradients = [*probes, *more[:1]] if callable(inputs) else [*probes, *_normal(probes)]
    return Task(
        spec, (*cases, *(more if callable(inputs) else ())), (*gradients,), probes, derived=False
    )


def _normal(probes: Iterable[Case]) -> list[Case]:
    return [replace(p, distribution="normal") for p in probes]


def _dtype_names(
    known: Mapping[str, torch.dtype], wanted: Iterable[str] | None, effort: str
) -> list[str]:
    if wanted is None:
        return [n for n in known if effort != "quick" or n in ("f32", "bf16")]
    names = [*([wanted] if isinstance(wanted, str) else wanted)]
    for name in names:
        if name not in known:
            raise ValueError(f"dtype must be one of {', '.join(known)} but got {name!r}")
    return names


def _value_spread(spec: OpSpec, call: Call) -> Spread:
    with torch.no_grad():
        return spread(
            lambda c: spec.run(plain(spec), c), lambda c: spec.run(spec.reference, c), call
        )


def _bounds(spec: OpSpec, call: Call) -> tuple[Tensor, ...]:
    found = _value_spread(spec, call)
    return tuple(found.bound(i) for i in range(len(found.exact)))


class _ModuleReference:
    """A module as a reference: in float64 a copy with the same weights in float64."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._exact = copy.deepcopy(module).double()
        self.formula = type(module).forward

    def __call__(self, *args: Any) -> Any:
        exact = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        return (self._exact if exact else self._module)(*args)


@dataclass(frozen=True)
class _AnyCall(Call):
    """A call whose arguments may be anything."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(a for a in self.args if isinstance(a, Tensor))

    @property
    def dtype(self) -> torch.dtype:
        return next(t.dtype for t in self.tensors if t.is_floating_point())

    def map(self, function: Callable[[Tensor], Tensor]) -> _AnyCall:
        args: tuple[Any, ...] = tuple(
            function(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in self.args
        )
        return _AnyCall(args, self.kwargs)


@dataclass(frozen=True)
class _Inputs:
    """The arguments that the user gave, as a sample."""

    name: str
    inputs: tuple[Any, ...] | Callable[[torch.Generator], tuple[Any, ...]]
    convert: bool  # to the dtype of the case; otherwise every tensor keeps its own

    @property
    def size(self) -> str:
        return ""

    def build(self, dtype: torch.dtype, distribution: str = "normal", seed: int = 0) -> _AnyCall:
        g = generator(self.name, distribution, dtype, seed)
        if callable(self.inputs):
            args = self.inputs(g)
        else:
            args = tuple(self._redrawn(a, distribution, seed, g) for a in self.inputs)
        call = _AnyCall(args, {})
        return call.map(lambda t: t.to(dtype)) if self.convert else call

    def _redrawn(self, value: Any, distribution: str, seed: int, g: torch.Generator) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point() or (distribution == "given" and seed == 0):
            return value.detach().clone()
        name = "normal" if distribution == "given" else distribution
        numbers = fill(name, tuple(value.shape), value.dtype, g)
        return torch.empty_like(value, requires_grad=False).copy_(numbers)

    def bytes_moved(self, dtype: torch.dtype) -> int:
        return 0

    def bytes_written(self, dtype: torch.dtype) -> int:
        return 0

    def flops(self) -> int:
        return 0
