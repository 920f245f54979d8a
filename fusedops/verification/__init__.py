"""Whether a kernel is right: ``fusedops.verify``, and the rule it goes by.

judge: the rule for outputs. perturb: the rule where no bound is derived by hand. task: the cases.
observe: runs a kernel and tells what was seen; worker: the same in a process of its own. checks:
what an observation says. session: all of it in order. report: the verdict. cli: the command.
"""

from __future__ import annotations

from fusedops.verification.judge import Verdict, judge
from fusedops.verification.report import Finding, Report
from fusedops.verification.session import PROMISES, verify

__all__ = ["PROMISES", "Finding", "Report", "Verdict", "judge", "verify"]
