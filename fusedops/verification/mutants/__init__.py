"""Implementations with one planted fault each: a harness is as good as what it rejects of them.

>>> from fusedops.verification import mutants
>>> wrong = mutants.get("rope", "off-by-one")
>>> fusedops.verify(wrong.make(), op=wrong.op).passed
False

Run them inside ``contained()``, which undoes what some do to their process.
"""

from __future__ import annotations

from fusedops.verification.mutants import cheats, linear, quantized, rope
from fusedops.verification.mutants.cheats import contained
from fusedops.verification.mutants.mutant import Candidate, Mutant, asks

__all__ = ["MUTANTS", "Candidate", "Mutant", "asks", "contained", "get"]

MUTANTS: tuple[Mutant, ...] = (
    *rope.MUTANTS,
    *linear.MUTANTS,
    *quantized.MUTANTS,
    *cheats.MUTANTS,
)


def get(op: str, name: str) -> Mutant:
    """The mutant of op with that name."""
    named = {mutant.name: mutant for mutant in MUTANTS if mutant.op == op}
    if name not in named:
        raise RuntimeError(
            f"[mutants] a mutant of {op} must be one of {', '.join(named)} but got {name!r}"
        )
    return named[name]
