"""What a run of bench has while it runs: its results so far, where they go, and how far it is."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import torch

from fusedops.bench import info, report
from fusedops.bench.measure import limits_of
from fusedops.bench.record import Record, Result, Writer

__all__ = ["Progress", "Session"]


class Progress:
    """A bar on stderr by tqdm; a line for every step where tqdm is not installed."""

    def __init__(self, total: int) -> None:
        self._title = ""
        self._bar: Any = None
        try:
            tqdm = importlib.import_module("tqdm")
        except ImportError:
            return
        self._bar = tqdm.tqdm(total=total, disable=None, leave=False, unit="case")

    def begin(self, title: str) -> None:
        """A step begins."""
        self._title = title
        if self._bar is None:
            sys.stderr.write(f"{title}\n")
        else:
            self._bar.set_description(title)

    def status(self, text: str) -> None:
        """What the step is doing."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def end(self) -> None:
        """The step is over."""
        if self._bar is not None:
            self._bar.update()

    def write(self, text: str, file: TextIO) -> None:
        """A line between the states of the bar."""
        if self._bar is not None:
            self._bar.clear()
        file.write(text)
        file.flush()

    def close(self) -> None:
        """The run is over."""
        if self._bar is not None:
            self._bar.close()


class Session:
    """Collects the results of a run, prints each, and keeps the target up to date."""

    def __init__(self, command: str, writer: Writer, subject: str = "fusedops") -> None:
        self.command, self.writer, self.subject = command, writer, subject
        self.results: list[Result] = []
        self.progress = Progress(0)
        # Tables go where the record does not.
        self.out = sys.stderr if writer.is_stdout else sys.stdout
        self._machine = info.fingerprint()
        self._limits: Mapping[str, float] = {}

    def begin(self, total: int) -> None:
        """So many cases follow."""
        self.progress.close()
        self.progress = Progress(total)

    def add(self, result: Result, table: bool = True, rivals: bool = True) -> None:
        """One more result: printed, as candidates that are rivals or as ways to call, and saved."""
        self.results.append(result)
        self.progress.end()
        if table:
            self.print(report.case_table(result, self.subject, rivals=rivals))
        self.writer.save(self.record(partial=True))
        if result.bytes > 1 << 26:
            gc.collect()  # large tensors that a compiler keeps in circles

    def print(self, text: str) -> None:
        """A paragraph of the report."""
        self.progress.write(f"{text.rstrip()}\n\n", self.out)

    def finish(self, partial: bool = False) -> None:
        """The last save."""
        self.progress.close()
        if not partial and self.writer.path is not None:
            self._limits = limits_of(torch.get_num_threads()).table()
        self.writer.finish(self.record(partial))

    def record(self, partial: bool) -> Record:
        """What there is so far."""
        return Record(self._machine, dict(self._limits), self.command, tuple(self.results), partial)
