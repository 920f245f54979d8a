"""fusedops.autotune: which backend is faster for each class of dense layers, measured here."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fusedops import _C, backend, choice, isa
from fusedops._library import SHORT_NAMES, ops

__all__ = ["Class", "Report", "Result", "add_parser", "autotune", "measure", "run"]

PRODUCTS = ("forward", "input_gradient", "weight_gradient")
# The sizes that stand for each class of _C.choice_bounds().
ROWS = (1, 3, 8, 32, 128, 384, 1024, 2048)
FEATURES = (32, 128, 512, 2048, 4096)

ROUNDS = 9  # of a class, each backend once
FEWEST = 5  # that may change a choice
GAIN = 1.05  # so much faster at least in the median of the rounds
NOISE = 1.02  # and in three quarters of them
HOPELESS = 0.5  # so slow in one round: no more of it
SAMPLE = 200e-6  # seconds of one timing at least


@dataclass(frozen=True)
class Class:
    """One class of shapes, by the sizes from which it reaches: rows, out and in features."""

    product: str
    dtype: str
    m: int
    n: int
    k: int

    def shape(self) -> tuple[int, int, int]:
        """The sizes that are measured for it."""
        rows, features = _C.choice_bounds()
        n, k = (FEATURES[features.index(size)] for size in (self.n, self.k))
        return ROWS[rows.index(self.m)], n, k

    def __str__(self) -> str:
        """For a reader: the product, the dtype and the ranges."""
        rows, features = _C.choice_bounds()
        ranges = (
            f"{name} {_range(size, bounds)}"
            for name, size, bounds in (
                ("rows", self.m, rows),
                ("out", self.n, features),
                ("in", self.k, features),
            )
        )
        return f"{self.product.replace('_', ' ')} {self.dtype}, {', '.join(ranges)}"


# How long one call takes under a backend, in seconds.
Timer = Callable[[str], float]


@dataclass(frozen=True)
class Result:
    """What was found for one class; seconds: the median of each backend that was measured."""

    of: Class
    default: str
    chosen: str
    seconds: dict[str, float]
    gain: float  # median over the rounds of the default's time by the chosen one's

    def stored(self) -> dict[str, Any]:
        """As the file has it."""
        c = self.of
        return {
            "product": c.product,
            "dtype": c.dtype,
            "m": c.m,
            "n": c.n,
            "k": c.k,
            "backend": self.chosen,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Report:
    """What :func:`fusedops.autotune` did. As text: a summary, then each choice that changed."""

    key: dict[str, Any]
    results: tuple[Result, ...]
    total: int  # classes, measured or not
    seconds: float
    path: Path | None = None
    problem: str = field(default="", compare=False)  # why nothing was stored

    @property
    def changed(self) -> tuple[Result, ...]:
        """The classes that another backend than the default serves better."""
        return tuple(r for r in self.results if r.chosen != r.default)

    def __str__(self) -> str:
        """The summary, then one line for each class that moved away from the default."""
        where = "not stored" if self.path is None else f"stored in {self.path}"
        lines = [
            f"{self.key['cpu']}, {self.key['isa']}, {self.key['threads']} threads: measured "
            f"{len(self.results)} of {self.total} classes in {self.seconds:.1f} s; "
            f"{len(self.changed)} moved away from the default; "
            + where
            + (f" ({self.problem})" if self.problem else "")
        ]
        for r in sorted(self.changed, key=lambda r: -r.gain):
            lines.append(
                f"  {r.of}: {r.chosen} {_duration(r.seconds[r.chosen])}, "
                f"{r.default} {_duration(r.seconds[r.default])}, gain {r.gain:.2f}"
            )
        return "\n".join(lines)


def autotune(
    *,
    seconds: float = 60.0,
    dtypes: Sequence[str | torch.dtype] = ("f32", "bf16", "f16"),
    products: Sequence[str] = PRODUCTS,
    rounded: bool = False,
    store: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure which backend computes dense layers faster on this machine, and go by it from now on.

    For ``linear``, ``gelu_linear`` and their gradients on plain weights; :mod:`fusedops.backend`
    names the backends. A class of shapes moves away from the default only for a gain beyond noise:
    the backends take turns, and another one must be faster by 5% in the median of the rounds and by
    2% in three quarters of them. Small classes come first; those that the time does not
    reach keep their default, or what was stored for them before.

    The choices are those of the CPU model, the ISA and the number of threads in use, and of the
    versions of torch and fusedops. They are stored in the user's cache folder (docs/autotune.md)
    and found again at the next import.

    Not while another thread runs an op.

    Args:
        seconds: about how long to measure.
        dtypes: of "f32", "f16", "bf16", "f64", or torch's.
        products: of "forward", "input_gradient" and "weight_gradient".
        rounded: whether a forward product in 16 bits may also be PyTorch's own, ``aten_direct``,
            which rounds the product before bias and activation: less accurate, faster where a
            processor has matrix units for bfloat16. Nothing is stored then, whatever ``store``
            says: the choices hold in this process, where they were asked for by name.
        store: whether to write the file.
        progress: told each class before it is measured.

    Returns:
        What was measured, chosen and gained; ``print`` it.

    Raises:
        RuntimeError: ``[autotune] requirement but got value``. A file that cannot be written is a
            warning: the choices hold in this process.
    """
    if not seconds > 0:
        raise RuntimeError(f"[autotune] seconds must be a number above 0 but got {seconds!r}")
    named = [str(SHORT_NAMES.get(d, d) if isinstance(d, torch.dtype) else d) for d in dtypes]
    for what, got, known in (
        ("dtypes", named, tuple(SHORT_NAMES.values())),
        ("products", products, PRODUCTS),
    ):
        wrong = [one for one in got if one not in known]
        if wrong:
            raise RuntimeError(
                f"[autotune] {what} must be among {', '.join(known)} but got {wrong[0]!r}"
            )
    if _C.deterministic():
        raise RuntimeError("[autotune] deterministic mode must be off but got on")
    if backend.current() != "auto":  # FUSEDOPS_BACKEND or use: no choice would hold
        raise RuntimeError(f"[autotune] backend must be auto but got {backend.current()}")
    key = choice.key(isa.current(), _C.threads())
    classes = _classes(named, products)
    begin = time.perf_counter()
    results = measure(classes, begin + seconds, rounded=rounded, progress=progress)
    took = time.perf_counter() - begin
    stored = [result.stored() for result in results]
    path, problem = None, ""
    if rounded:
        problem = "rounded choices hold in this process only"
    elif store:
        try:
            path = choice.store(key, stored)
            choice.install(path)
        except OSError as error:
            problem = error.strerror or str(error)
            warnings.warn(
                f"[autotune] the choices could not be stored: {problem}; they hold in this process",
                stacklevel=2,
            )
    if path is None:
        rows = [choice.row_of(one) for one in stored]
        before = _C.choices(key["isa"], key["threads"])
        _C.install_choices(key["isa"], key["threads"], before + rows)
        choice.sources[key["isa"], key["threads"]] = None
    return Report(key, results, len(classes), took, path, problem)


def measure(
    classes: Iterable[Class],
    deadline: float,
    *,
    rounded: bool = False,
    timer: Callable[[Class], Timer] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Result, ...]:
    """The faster backend of each class, until the deadline of the clock."""
    defaults = {
        Class(*row[:5]): row[5]
        for row in _C.default_choices(isa.current(), accelerate=_C.accelerate())
    }
    timer = timer or _timer
    results: list[Result] = []
    for one in classes:
        if clock() >= deadline:
            break
        progress(str(one))
        results.append(_compare(one, defaults[one], timer(one), rounded))
    return tuple(results)


def _compare(one: Class, default: str, sample: Timer, rounded: bool) -> Result:
    """Rounds of the default and each rival in turn; a rival that is far behind is left out."""
    rivals = [name for name in _candidates(one, rounded) if name != default]
    taken: dict[str, list[float]] = {name: [] for name in (default, *rivals)}
    for number in range(ROUNDS + 1):
        turn = [default, *rivals]
        times = {name: sample(name) for name in (turn if number % 2 else turn[::-1])}
        if number == 0:
            continue  # a warm-up
        for name, seconds in times.items():
            taken[name].append(seconds)
        ratios = {name: _ratios(taken, default, name) for name in rivals}
        rivals = [
            name
            for name in rivals
            if ratios[name][-1] > HOPELESS and (number < 3 or max(ratios[name]) > 1)
        ]
        if not rivals:
            break
    gains = {
        name: statistics.median(_ratios(taken, default, name))
        for name in rivals
        if _is_beyond_noise(_ratios(taken, default, name))
    }
    chosen = max(gains, key=lambda name: gains[name], default=default)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return Result(one, default, chosen, medians, gains.get(chosen, 1.0))


def _ratios(taken: dict[str, list[float]], default: str, name: str) -> list[float]:
    return [a / b for a, b in zip(taken[default], taken[name], strict=False)]


def _is_beyond_noise(ratios: list[float]) -> bool:
    ordered = sorted(ratios)
    return (
        len(ordered) >= FEWEST
        and statistics.median(ordered) >= GAIN
        and ordered[len(ordered) // 4] >= NOISE
    )


def _candidates(one: Class, rounded: bool) -> tuple[str, ...]:
    """The backends that may compute it within the stated bounds, or by name."""
    once = one.product != "forward"  # no epilogue: however it is computed, rounded once
    if one.dtype in ("f16", "bf16") and (rounded or once):
        return ("engine", "aten", "aten_direct")
    return ("engine", "aten")


def _classes(dtypes: Sequence[str], products: Sequence[str]) -> list[Class]:
    """Those to measure, small ones and the forward product first."""
    rows, features = _C.choice_bounds()
    every = [
        Class(product, dtype, m, n, k)
        for product in products
        for dtype in dtypes
        for m in rows
        for n in features
        for k in features
    ]

    def cost(one: Class) -> int:
        m, n, k = one.shape()
        return (m + 8) * n * k * (1 if one.product == "forward" else 4)

    return sorted(every, key=cost)


def _timer(one: Class) -> Timer:
    """Times the op itself on random tensors."""
    m, n, k = one.shape()
    dtype = next(t for t, name in SHORT_NAMES.items() if name == one.dtype)
    g = torch.Generator("cpu").manual_seed(1)  # the caller's numbers stay as they were
    x, w, b, grad = (
        torch.randn(shape, generator=g, device="cpu", dtype=torch.float32).to(dtype)
        if wanted
        else None
        for shape, wanted in (
            ((m, k), one.product != "input_gradient"),
            ((n, k), one.product != "weight_gradient"),
            ((n,), one.product == "forward"),
            ((m, n), one.product != "forward"),
        )
    )
    loops: dict[str, int] = {}

    def call() -> None:
        if one.product == "forward":
            ops.gelu_linear_nograd(x, w, b, "none")
        else:
            ops.linear_backward_nograd(grad, x, w, False)

    def sample(name: str) -> float:
        with backend.use(name):
            count = loops.get(name, 1)
            begin = time.perf_counter()
            for _ in range(count):
                call()
            took = (time.perf_counter() - begin) / count
        loops[name] = max(1, int(SAMPLE / took))
        return took

    return sample


def add_parser(commands: Any) -> None:
    """``fusedops autotune``, as a subparser."""
    parser = commands.add_parser(
        "autotune", help="measure which backend computes dense layers faster here, and keep it"
    )
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="to measure (default: %(default)g)")
    add("--dtype", default="f32,bf16,f16", help="of f32,bf16,f16,f64 (default: %(default)s)")
    add("--product", default=",".join(PRODUCTS), help="of them (default: %(default)s)")
    add(
        "--rounded",
        action="store_true",
        help="try PyTorch's own 16-bit product, which rounds before bias and activation, as well; "
        "stores nothing",
    )
    add("--dry-run", action="store_true", help="store nothing")


def run(options: argparse.Namespace) -> int:
    """Do what the options say; returns the exit code."""
    told = sys.stderr.isatty()

    def progress(line: str) -> None:
        if told:
            sys.stderr.write(f"\r{line[:79]:<79}")

    try:
        report = autotune(
            seconds=options.seconds,
            dtypes=options.dtype.split(","),
            products=options.product.split(","),
            rounded=options.rounded,
            store=not options.dry_run,
            progress=progress,
        )
    except RuntimeError as error:
        sys.stderr.write(f"fusedops autotune: error: {str(error).removeprefix('[autotune] ')}\n")
        return 2
    if told:
        sys.stderr.write(f"\r{'':<79}\r")
    sys.stdout.write(f"{report}\n")
    return 0


def _range(size: int, bounds: list[int]) -> str:
    after = bounds.index(size) + 1
    if after == len(bounds):
        return f"from {size}"
    return str(size) if bounds[after] == size + 1 else f"{size} to {bounds[after] - 1}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
