"""What verify hands back: findings, a row for every check and dtype, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

__all__ = ["CheckRow", "DtypeRow", "Finding", "Report"]


@dataclass(frozen=True)
class Finding:
    """One thing that was seen. case: sample, dtype and distribution; empty where none applies.

    kind: "kernel", the kernel is wrong; "refused", it raised on an input it must take; "process",
    it crashed, hung, ran out of memory or could not be loaded; "task", the inputs cannot tell right
    from wrong; "note", worth knowing and no fault.
    """

    check: str
    kind: Literal["kernel", "refused", "process", "task", "note"]
    text: str
    case: str = ""

    def __str__(self) -> str:
        return f"[{self.check}] {self.case + ': ' if self.case else ''}{self.text}"


@dataclass(frozen=True)
class CheckRow:
    """How often a check ran, and how often it failed; not_run says why it never did."""

    check: str
    runs: int
    failed: int
    not_run: str = ""


@dataclass(frozen=True)
class DtypeRow:
    """Accuracy in one dtype, over all cases whose values were judged.

    error: the worst element in units of what it may err by; ulp: the worst element in ulps;
    rms_ratio: the RMS error over PyTorch's own, None where that is 0.
    """

    dtype: str
    cases: int
    error: float
    ulp: float
    rms_ratio: float | None


@dataclass(frozen=True)
class Report:
    """The verdict on one kernel. ``str`` is a table; ``passed`` is False with any failure."""

    target: str
    against: str
    seed: int
    failures: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    dtypes: list[DtypeRow] = field(default_factory=list)
    checks: list[CheckRow] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing at all was found wrong."""
        return not self.failures

    def failed(self) -> set[str]:
        """The names of the checks that failed."""
        return {finding.check for finding in self.failures}

    def to_json(self) -> str:
        """Everything, for machines: numbers that JSON has no word for are null."""
        return json.dumps({"passed": self.passed, **_plain(asdict(self))}, indent=1, sort_keys=True)

    def __str__(self) -> str:
        parts = [f"{self.target} against {self.against}: {'PASSED' if self.passed else 'REJECTED'}"]
        if self.dtypes:
            head = ("dtype", "cases", "error/allowed", "ulp", "rms/PyTorch's")
            rows = [
                (r.dtype, str(r.cases), _digits(r.error), _digits(r.ulp), _digits(r.rms_ratio))
                for r in self.dtypes
            ]
            parts.append(_table([head, *rows]))
        parts.append(_table([("check", "runs", "verdict"), *map(self._check, self.checks)]))
        parts += [f"note {note}" for note in self.notes]
        return "\n\n".join(parts[:3]) + "".join(f"\n{part}" for part in parts[3:])

    def _check(self, row: CheckRow) -> tuple[str, str, str]:
        if row.failed:
            first = next(f for f in self.failures if f.check == row.check)
            text = f"{first.case + ': ' if first.case else ''}{first.text}"
            more = f" (and {row.failed - 1} more)" if row.failed > 1 else ""
            return row.check, str(row.runs), f"FAILED  {text}{more}"
        return row.check, str(row.runs), "ok" if row.runs else f"not run: {row.not_run}"


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _plain(value: object) -> dict[str, object]:
    """The same with every float that JSON cannot say replaced by None."""
    plain = _finite(value)
    assert isinstance(plain, dict)
    return plain


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
