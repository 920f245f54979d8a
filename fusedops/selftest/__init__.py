"""``python -m fusedops selftest``: whether the ops are right, and how fast, on the user's device.

matrix: what is run, and what the rule of ``fusedops.verification`` says of it. report: the text
for an issue. speed: the timings, as a record of ``fusedops bench``. cli: the command.

>>> from fusedops.selftest import repeat
>>> print(repeat("rope", "d34", "f32", "normal", device="mps"))  # one case again: None, or a fault
"""

from __future__ import annotations

from fusedops.selftest.matrix import Part, repeat, run

__all__ = ["Part", "repeat", "run"]
