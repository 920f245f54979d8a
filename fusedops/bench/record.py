"""What a benchmark run is made of and how it is kept: cases, rows, and the record of them."""

from __future__ import annotations

import json
import os
import stat
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "DEVICES",
    "SCHEMA",
    "STEPS",
    "Case",
    "Limit",
    "Quantiles",
    "Record",
    "Regime",
    "Result",
    "Row",
    "TargetError",
    "Writer",
    "from_json",
    "load",
    "to_json",
]

SCHEMA = 1  # of the JSON; a reader refuses any other


@dataclass(frozen=True)
class Quantiles:
    """Median, 20th and 80th percentile."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(values), fifths[3])


STEPS = 50  # of a decode loop
DEVICES = ("mps",)  # what Case.isa names beside instruction sets


@dataclass(frozen=True)
class Regime:
    """What is timed. Only rows of one regime are ever compared.

    work: the forward pass; forward and backward; or a loop of STEPS decode steps, each at the next
    offset, inside torch.compile (but for eager's). output: allocated by each call, written into a
    warm tensor given to each call, or written over the input. cache: as the last call left the
    caches, or with everything evicted between two calls.
    """

    work: Literal["forward", "train", "loop"] = "forward"
    output: Literal["fresh", "given", "in_place"] = "fresh"
    cache: Literal["warm", "cold"] = "warm"

    @classmethod
    def parse(cls, text: str) -> Regime:
        """Of words joined by "+", in any order; what is not said is forward, fresh, warm.

        Raises:
            ValueError: a word that is none, or two of one kind.
        """
        chosen: dict[str, str] = {}
        for word in text.split("+") if text else ():
            kind = _WORDS.get(word)
            if kind is None:
                raise ValueError(
                    f"[bench] regime must be words of {', '.join(_WORDS)} joined by + "
                    f"but got {text!r}"
                )
            if kind in chosen:
                raise ValueError(
                    f"[bench] regime must have one word for its {kind} but got {text!r}"
                )
            chosen[kind] = word
        return cls(**chosen)  # type: ignore[arg-type]

    @property
    def passes(self) -> int:
        """How often the bytes of a forward pass move."""
        return {"forward": 1, "train": 2, "loop": STEPS}[self.work]

    def __str__(self) -> str:
        """What parse reads: the words that are not the usual ones, or "forward"."""
        usual = Regime()
        words = [
            w for w, kind in _WORDS.items() if getattr(self, kind) == w != getattr(usual, kind)
        ]
        return "+".join(words) or "forward"


_WORDS = {
    "forward": "work",
    "train": "work",
    "loop": "work",
    "fresh": "output",
    "given": "output",
    "in_place": "output",
    "warm": "cache",
    "cold": "cache",
}


@dataclass(frozen=True)
class Case:
    """One shape of one op in one dtype and regime; its candidates are timed against each other."""

    op: str  # a name in fusedops.testing.SPECS
    shape: str  # the name of a bench sample of that spec, or what sweep made
    dtype: str  # a name in fusedops.testing.DTYPES
    regime: Regime
    threads: int
    isa: str  # or a name in DEVICES, where the candidates run there


@dataclass(frozen=True)
class Limit:
    """The least time that this machine's memory and vector units allow, and which of them."""

    seconds: float
    reason: str


@dataclass(frozen=True)
class Row:
    """What one candidate did in a case.

    times_faster: than each other candidate, by the ratios within each round; an interval that
    meets [1 / (1 + noise), 1 + noise] is "no difference". error: the worst element's error in
    units of its bound. fault: why the row is refused, in one line; a refused row is no baseline.
    note: what a reader has to know, such as the factor of a scaled slice.
    """

    candidate: str
    seconds: Quantiles
    rounds: int
    first: float  # the very first call, compilation included
    of_limit: float
    error: float
    times_faster: dict[str, Quantiles]
    fault: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    """The rows of a case, what did not run and why, and what they are measured against."""

    case: Case
    size: (
        str  # what a table calls the case: "rope [1, 32, 2048, 128]", "gelu_linear 2048x1024->4096"
    )
    bytes: int
    flops: int
    limit: Limit
    noise: float  # relative; below it nothing is a difference
    rows: tuple[Row, ...]
    absent: dict[str, str] = field(default_factory=dict)  # candidate: reason
    calm: float | None = None  # share of measurements begun with the machine at its best


@dataclass(frozen=True)
class Record:
    """A run, as JSON keeps it. partial: it was interrupted, and holds what was measured."""

    machine: dict[str, str]  # the fingerprint
    limits: dict[str, float]
    command: str
    results: tuple[Result, ...] = ()
    partial: bool = False


# --- JSON -----------------------------------------------------------------------------------------


def to_json(record: Record) -> str:
    """Keys sorted, floats of 4 digits, one result a line: a new run's diff shows what changed."""
    head = _plain({**asdict(record), "schema": SCHEMA})
    results = head.pop("results")
    lines = [json.dumps(head, sort_keys=True, indent=0)[:-2] + ',\n"results": [']
    lines.append(",\n".join(json.dumps(r, sort_keys=True) for r in results))
    lines.append("]\n}\n")
    return "\n".join(line for line in lines if line)


def from_json(text: str) -> Record:
    """The record.

    Raises:
        ValueError: the text is no record, or one of another schema.
    """
    try:
        data = json.loads(text)
        schema = data["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"[bench] a record must be JSON with a schema but got {error}") from error
    if schema != SCHEMA:
        raise ValueError(f"[bench] a record must have schema {SCHEMA} but got {schema!r}")
    try:
        return Record(
            machine=data["machine"],
            limits={name: float(value) for name, value in data["limits"].items()},
            command=data["command"],
            results=tuple(_result(result) for result in data["results"]),
            partial=data["partial"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"[bench] a record must be whole but got {error!r}") from error


def load(path: str | Path) -> Record:
    """The record in a file.

    Raises:
        ValueError: it cannot be read, or is no record; the message names the file.
    """
    try:
        return from_json(Path(path).read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: {reason}") from error


def _plain(value: Any) -> Any:
    """For JSON, which has no infinity and no NaN: those become the words that float() reads."""
    if isinstance(value, float):
        rounded = float(f"{value:.4g}")
        return rounded if abs(rounded) < float("inf") else str(rounded)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _result(data: dict[str, Any]) -> Result:
    case = dict(data["case"])
    return Result(
        **{
            **data,
            "case": Case(**{**case, "regime": Regime(**case["regime"])}),
            "limit": Limit(float(data["limit"]["seconds"]), data["limit"]["reason"]),
            "noise": float(data["noise"]),
            "rows": tuple(_row(row) for row in data["rows"]),
        }
    )


def _row(data: dict[str, Any]) -> Row:
    numbers = {name: float(data[name]) for name in ("first", "of_limit", "error")}
    ratios = {name: _quantiles(q) for name, q in data["times_faster"].items()}
    return Row(
        **{**data, **numbers, "seconds": _quantiles(data["seconds"]), "times_faster": ratios}
    )


def _quantiles(data: dict[str, Any]) -> Quantiles:
    return Quantiles(**{name: float(value) for name, value in data.items()})


# --- files ----------------------------------------------------------------------------------------


class TargetError(RuntimeError):
    """A target that cannot be written, in one line."""


class Writer:
    """Keeps a file up to date with a run; the file holds the last record saved or the one before.

    Whether it can be written is found out at once, before anything is measured. A device or a pipe
    is written when the run is over. Where saving fails later, the record goes to a temporary file.

    Args:
        path: of the file, "-" for standard output, or None to save nothing.

    Raises:
        TargetError: it cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.failed: str | None = None  # what went wrong with the target, once it did
        self._final: Record | None = None
        self._special = path is not None and _is_special(path)
        if path is None or path == "-":
            return
        try:
            if self._special:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            else:
                self._check(os.path.realpath(path))
        except OSError as error:
            raise TargetError(f"{path} cannot be written: {error.strerror}") from error

    @property
    def is_stdout(self) -> bool:
        """Whether the record is all that standard output may receive."""
        return self.path in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")

    def save(self, record: Record) -> None:
        """Replace what the file holds; failing that, say so on stderr and go on elsewhere."""
        if self.path is None or self._special:
            return
        self._try(record)

    def finish(self, record: Record) -> None:
        """The last save of a run, and the only one where the target is a device or a pipe."""
        if self.path is not None:
            self._try(record)

    def _try(self, record: Record) -> None:
        assert self.path is not None
        text = to_json(record)
        try:
            if self.path == "-":
                sys.stdout.write(text)
                sys.stdout.flush()
            elif self._special:
                with open(self.path, "w") as file:
                    file.write(text)
            else:
                _replace(os.path.realpath(self.path), text)
        except OSError as error:
            self._fall_back(text, error)

    def _fall_back(self, text: str, error: OSError) -> None:
        target = self.path
        try:
            handle, name = tempfile.mkstemp(prefix="fusedops-bench-", suffix=".json")
            with os.fdopen(handle, "w") as file:
                file.write(text)
            where = f"the record is kept in {name}"
            self.path, self._special = name, False
        except OSError:
            sys.stderr.write(text)
            where = "nor can a temporary file: the record is printed above"
        message = f"{target} cannot be written: {error.strerror}; {where}"
        self.failed = message
        sys.stderr.write(f"fusedops bench: error: {message}\n")

    @staticmethod
    def _check(path: str) -> None:
        if os.path.isdir(path):
            raise IsADirectoryError(21, "it is a directory")
        if os.path.exists(path):
            open(path, "a").close()
        # What replaces the file is written beside it first.
        handle, name = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".fusedops-bench-")
        os.close(handle)
        os.unlink(name)


def _is_special(path: str) -> bool:
    """Not a file that another could be put in the place of."""
    if path == "-" or os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _replace(path: str, text: str) -> None:
    """Write all of text or leave the file as it is."""
    handle, name = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".fusedops-bench-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mode = os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o666 & ~_umask()
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
