"""The kill table: which harness rejects which mutant, verify beside the rules of other projects."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fusedops
from fusedops import reference
from fusedops.testing import SPECS
from fusedops.verification import Report, verify
from fusedops.verification.mutants import MUTANTS, Candidate, Mutant, asks, contained
from fusedops.verification.rules import RULES, Rule

__all__ = ["Row", "cell", "document", "honest", "main", "rows", "table", "verdict"]

KILLED, PASSED, BY_CHANCE, NOT_ASKED, NO_TEST, NOT_RUN = (
    "killed",
    "passed",
    "by chance",
    "not asked",
    "-",
    "not run",
)

_INTRODUCTION = """\
# Mutants

A harness is as good as what it rejects. `fusedops.verification.mutants` holds kernels with one
planted fault each: mistakes that a kernel can be shipped with, and cheats that serve a harness and
not a user. `fusedops.verify` must reject every one of them, and must take what is right: our
kernels, PyTorch's own, and what `torch.compile` makes of it. Beside it stands what the acceptance
rules of other projects do with the same kernels; they are re-stated from the files named below,
with their inputs, their tolerance and their order of calls, on CPU tensors.

This page is printed by

    python -m fusedops verify --mutants

* killed: rejected. passed: accepted.
* not asked: the project's test of the op never uses what the fault is in (another dtype, an option,
  a bias, a gradient), so that it cannot tell.
* by chance: the fault is memory that was never written; what it holds is luck.
* -: the project has no test that such an op could be put to. not run: `torch.compile` takes seconds
  for each of their shapes.

Liger, HF rotary and quack test both of their dtypes: they accept what both columns accept. Shapes
are theirs with fewer heads and rows. KernelBench, `kernels benchmark` and BackendBench test any op
by one rule; where they come without a task for an op, the rule is put to usual inputs of it, and
KernelBench's linear layer is that of its task 86 of level 2. The rules look at outputs alone:
KernelBench also searches a kernel's source for suspicious words, which is not re-stated here.
"""


def verdict(mutant: Mutant, *, inputs: str = "standard") -> Report:
    """The report of verify on a fresh candidate; quick: one sample and one dtype that show it."""
    chosen: dict[str, Any] = {}
    if inputs == "quick":
        spec = SPECS[mutant.op]
        chosen = {
            "samples": mutant.samples or spec.probes[:1],
            "dtypes": mutant.dtypes[:1] or "f32",
        }
    with contained():
        # Small tensors: more threads than the fault needs cost more than they bring.
        torch.set_num_threads(2 if "threads" in mutant.killed_by else 1)
        return verify(
            mutant.make(), op=mutant.op, inputs=inputs, promises=mutant.promises, **chosen
        )


def cell(mutant: Mutant, rule: Rule) -> str:
    """What rule does with mutant."""
    if mutant.op not in rule.judges:
        return NO_TEST
    if mutant.dtypes and rule.dtype not in mutant.dtypes:
        return NOT_ASKED
    if mutant.by_chance:
        return BY_CHANCE
    seen: set[str] = set()
    with contained():
        accepted = rule.accepts(_listening(mutant.make(), mutant.op, seen), mutant.op)
    if accepted and not seen.issuperset(mutant.needs):
        return NOT_ASKED
    return PASSED if accepted else KILLED


@dataclass(frozen=True)
class Row:
    """What the harnesses do with one kernel. good: verify does what it must, by the right check."""

    kernel: str
    fault: str
    verify: str
    others: tuple[str, ...]
    good: bool


def rows(
    *, inputs: str = "standard", progress: Callable[[str], None] = lambda name: None
) -> Iterator[Row]:
    """One for each mutant, then one for each honest kernel; progress hears of each in advance."""
    for mutant in MUTANTS:
        progress(f"{mutant.op} {mutant.name}")
        failed = verdict(mutant, inputs=inputs).failed()
        # The checks that must object stand for all that did: others may depend on the machine.
        checks = ", ".join(sorted(mutant.killed_by & failed or failed))
        mine = f"{KILLED}: {checks}" if failed else PASSED
        others = [cell(mutant, rule) for rule in RULES]
        good = mutant.killed_by <= failed
        yield Row(f"`{mutant.name}` ({mutant.op})", mutant.description, mine, tuple(others), good)
    for op, name, candidate in honest():
        progress(f"{op} {name}")
        yield _honest_row(op, name, candidate, inputs)


def table(*, inputs: str = "standard") -> str:
    """The table in Markdown: mutants, honest kernels, totals."""
    return _table(list(rows(inputs=inputs)))


def document(found: Sequence[Row]) -> str:
    """docs/mutants.md."""
    sources = [f"* {rule.name}: {rule.text}. {rule.source}." for rule in RULES]
    return "\n".join([_INTRODUCTION, _table(found), "", "## The rules", "", *sources, ""])


def honest() -> Iterator[tuple[str, str, Candidate]]:
    """(op, name, candidate) of kernels without a fault."""
    for op in dict.fromkeys(mutant.op for mutant in MUTANTS):
        yield op, "fusedops", getattr(fusedops, op)
        yield op, "eager", getattr(reference, op)
    for op in ("rope", "gelu_linear"):
        yield op, "compile", fusedops.ladder.get(op, "compile")


def main(progress: bool = True, inputs: str = "standard") -> int:
    """Print docs/mutants.md; 0 if verify killed every mutant and took what is right, else 1."""

    def show(name: str) -> None:
        if progress and sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{name}")
            sys.stderr.flush()

    found = list(rows(inputs=inputs, progress=show))
    show("")
    sys.stdout.write(document(found))
    bad = [row for row in found if not row.good]
    for row in bad:
        sys.stderr.write(f"verify: {row.kernel}, fault {row.fault}: {row.verify}\n")
    return 1 if bad else 0


def _honest_row(op: str, name: str, candidate: Candidate, inputs: str) -> Row:
    """A compiled kernel takes seconds for each shape: it runs on one of them, for verify alone."""
    compiled = name == "compile"
    chosen: dict[str, Any] = {"samples": SPECS[op].probes[:1], "dtypes": "f32"} if compiled else {}
    report = verify(candidate, op=op, inputs=inputs, **chosen)
    words = {None: NO_TEST, True: PASSED, False: KILLED}
    others = [NOT_RUN if compiled else words[rule.accepts(candidate, op)] for rule in RULES]
    mine = PASSED if report.passed else f"{KILLED}: {', '.join(sorted(report.failed()))}"
    return Row(f"{name} ({op})", "none", mine, tuple(others), report.passed)


def _table(found: Sequence[Row]) -> str:
    head = ["kernel", "fault", "verify", *(rule.name for rule in RULES)]
    cells = [[row.kernel, row.fault, row.verify, *row.others] for row in found]
    faulty = [line for line, row in zip(cells, found, strict=True) if row.fault != "none"]
    total = ["killed, of those asked about", "", *map(_total, [*zip(*faulty, strict=True)][2:])]
    lines = [head, ["---"] * len(head), *cells, total]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listening(candidate: Candidate, op: str, seen: set[str]) -> Candidate:
    """The candidate, noting in seen what its calls ask."""

    @functools.wraps(candidate)
    def listen(*args: Any, **options: Any) -> Any:
        seen.update(asks(op, args, options))
        return candidate(*args, **options)

    return listen


def _total(column: Sequence[str]) -> str:
    killed = sum(text.startswith(KILLED) for text in column)
    return f"{killed} of {killed + column.count(PASSED)}"
