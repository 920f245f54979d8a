"""``fusedops.verify``: asks a kernel, judges what it answers, and reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fusedops.testing import Call
from fusedops.verification import checks, observe
from fusedops.verification.judge import Judge, plain
from fusedops.verification.perturb import spread, vjp
from fusedops.verification.report import CheckRow, DtypeRow, Finding, Report
from fusedops.verification.targets import guessed_op, is_isolated, resolve
from fusedops.verification.task import EFFORTS, Case, Task, one_thread, op_task, reference_task
from fusedops.verification.worker import Child, Lost

__all__ = ["PROMISES", "verify"]

# Guarantees that a kernel need not give; promised, a note becomes a failure.
PROMISES = ("own-kernel", "thread-invariant", "differentiable", "deterministic")

# In the order of the table, with what it takes for a check to run.
_CHECKS = {
    "process": "the kernel runs in this process",
    "task": "no output has two elements",
    "refused": "",
    "types": "no call succeeded",
    "values": "no call succeeded",
    "rms": "for matmuls, and where the bound is not derived by hand",
    "inputs": "no call succeeded",
    "aliasing": "no call succeeded",
    "reuse": "no call succeeded",
    "fresh": "no call succeeded",
    "deterministic": "no call succeeded",
    "threads": "one thread only",
    "gradients": "not differentiable",
    "own-kernel": "its operations could not be watched",
    "state": "",
    "guard": "for kernels in a file or module, which run in a process of their own",
}


def verify(
    fn: Callable[..., Any] | str,
    reference: Callable[..., Any] | str | None = None,
    *,
    op: str | None = None,
    inputs: str | tuple[Any, ...] | Callable[[torch.Generator], tuple[Any, ...]] = "standard",
    dtypes: Iterable[str] | None = None,
    samples: str | Sequence[str] | None = None,
    promises: Iterable[str] = (),
    seed: int = 0,
    timeout: float = 60.0,
    memory: float = 4.0,
) -> Report:
    """Whether a kernel computes what it should, on inputs made to find out; docs/verify.md.

    Args:
        fn: a callable, or text that names one: ``kernel.py:function``, ``package.module:function``
            (these run in a process of their own), ``torch.ops.ns.name``, ``rung:rope/cpp_fused``.
        reference: what it has to agree with, as a callable or text. Not with ``op``.
        op: the op of ``fusedops.testing.SPECS`` that it computes, with its signature. A rung knows.
        inputs: with an op "quick", "standard" or "full"; with a reference a tuple of example
            arguments, whose numbers are redrawn, or a function of a generator that makes one.
        dtypes: of ``fusedops.testing.DTYPES``; by default all of the op's, or the inputs' own.
        samples: a glob, or several, that narrows the samples of the op.
        promises: of ``PROMISES``, what this kernel guarantees beyond being right.
        seed: another seed draws other numbers.
        timeout: seconds a request may take in a process of its own.
        memory: GiB that such a process may add to what it has when it has loaded.

    Returns:
        The report: ``passed``, ``failures``, ``notes``, ``to_json()``, and as text a table.

    Raises:
        ValueError: the arguments make no task; what the kernel itself does wrong is in the report.
    """
    promised = frozenset(promises)
    if not promised <= {*PROMISES}:
        raise ValueError(f"promises must be of {', '.join(PROMISES)} but got {sorted(promised)}")
    task, against = _task(fn, reference, op, inputs, dtypes, samples, seed)
    session = _Session(task, promised)
    kept = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        if isinstance(fn, str) and is_isolated(fn):
            session.run_child(fn, timeout, memory)
        else:
            session.run(_Here(resolve(fn)))
    finally:
        torch.set_num_threads(kept[0])
        torch.set_default_dtype(kept[1])
        torch.set_grad_enabled(kept[2])
    return session.report(_name(fn), against, seed)


def _task(
    fn: Any, reference: Any, op: str | None, inputs: Any, dtypes: Any, samples: Any, seed: int
) -> tuple[Task, str]:
    if reference is not None:
        if op is not None or isinstance(inputs, str) or samples is not None:
            raise ValueError("a reference comes with inputs (a tuple or a function), without op")
        return reference_task(resolve(reference), inputs, dtypes, seed), _name(reference)
    op = op or guessed_op(fn)
    if op is None:
        raise ValueError("verify needs op=, or a reference and inputs")
    if inputs not in EFFORTS:
        raise ValueError(f"inputs of an op are {', '.join(EFFORTS)} but got {inputs!r}")
    return op_task(op, inputs, dtypes, samples, seed), op


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    if guessed_op(target) is not None:
        return f"rung:{target.op}/{target.name}"
    return getattr(target, "__qualname__", None) or type(target).__qualname__


class _Kernel(Protocol):
    def ask(self, request: dict[str, Any]) -> dict[str, Any]: ...


class _Here:
    """A kernel in this process."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.kernel = kernel

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return observe.answer(self.kernel, request)


class _Session:
    """One kernel and one task: findings, and how often each check ran."""

    def __init__(self, task: Task, promised: frozenset[str]) -> None:
        self.task, self.promised = task, promised
        self.failures: list[Finding] = []
        self.notes: list[Finding] = []
        self.runs: Counter[str] = Counter()
        self.rows: dict[str, list[tuple[float, float, float | None]]] = {}
        self.asked, self.lost = ("import", ""), False

    # --- keeping book ---------------------------------------------------------------------------

    def check(
        self,
        name: str,
        case: object,
        texts: Iterable[str],
        kind: Literal["kernel", "refused", "process", "task"] = "kernel",
    ) -> bool:
        """Count a run of a check; whether it found nothing."""
        self.runs[name] += 1
        found = [Finding(name, kind, text, str(case)) for text in texts]
        self.failures += found
        return not found

    def note(self, name: str, case: object, text: str) -> None:
        """A finding that is no failure, each text once."""
        if all((n.check, n.text) != (name, text) for n in self.notes):
            self.notes.append(Finding(name, "note", text, str(case)))

    def promise(self, promise: str, name: str, case: object, texts: Iterable[str]) -> None:
        """A failure where promised, else a note."""
        if promise in self.promised:
            self.check(name, case, texts)
            return
        self.runs[name] += 1
        for text in texts:
            self.note(name, case, text)

    def report(self, target: str, against: str, seed: int) -> Report:
        """Of what has run so far."""
        failed = Counter(f.check for f in self.failures)
        rows = [
            CheckRow(
                c, self.runs[c], failed[c], "the process was lost before" if self.lost else why
            )
            for c, why in _CHECKS.items()
        ]
        return Report(
            target, against, seed, self.failures, self.notes, [*map(self._dtype, self.rows)], rows
        )

    def _dtype(self, name: str) -> DtypeRow:
        errors, ulps, ratios = zip(*self.rows[name], strict=True)
        known = [r for r in ratios if r is not None]
        mean = math.sqrt(sum(r * r for r in known) / len(known)) if known else None
        return DtypeRow(name, len(errors), max(errors), max(ulps), mean)

    # --- asking ---------------------------------------------------------------------------------

    def ask(self, kernel: _Kernel, request: dict[str, Any], case: object = "") -> dict[str, Any]:
        """The observation; case is what a loss of the process is reported with."""
        self.asked = request["kind"], str(case)
        return kernel.ask(request)

    def run_child(self, target: str, timeout: float, memory: float) -> None:
        """In a process of its own, whose loss is a finding."""
        try:
            with Child(target, timeout, memory) as child:
                self.check("state", "", checks.state_kept(child.before, child.after, "on import"))
                self.run(child)
                for probe in self.task.probes:
                    self.guarded(child, probe)
        except Lost as lost:
            kind, case = self.asked
            check, what = (
                ("guard", "touched memory outside its inputs: ")
                if kind == "guarded"
                else ("process", "")
            )
            self.lost = True
            self.check(check, case or kind, [what + lost.text], "process")
        else:
            self.check("process", "", [])

    def run(self, kernel: _Kernel) -> None:
        """Everything but the guard pages."""
        before = self.ask(kernel, {"kind": "state"})
        for case in self.task.cases:
            self.values(kernel, case)
        for case in self.task.gradients:
            self.gradients(kernel, case)
        for case in self.task.probes:
            self.sequence(kernel, case)
            self.rewrite(kernel, case)
            self.threads(kernel, case)
        self.rms(kernel)
        for case in self.task.probes[:1]:
            self.operations(kernel, case)
        after = self.ask(kernel, {"kind": "state"})
        self.check("state", "", checks.state_kept(before, after, "by a call"))
        for probe in self.task.probes[:1]:  # last, so that no oracle is in memory before
            with one_thread():
                self.check("task", probe, checks.liveness(self.task.spec, probe.call()), "task")

    def accepted(self, record: dict[str, Any], case: object) -> bool:
        """Whether a call returned plain tensors; a finding if not."""
        error = record["error"]
        if error is not None and checks.out_of_memory(error):
            return self.check("process", case, [f"ran out of memory: {error}"], "process")
        if not self.check("refused", case, [f"raised {error}"] if error else [], "refused"):
            return False
        return self.check("types", case, checks.types(record))

    def right(self, record: dict[str, Any], call: Call, case: Case, check: str, when: str) -> bool:
        """Whether the values of a record are right."""
        with one_thread():
            verdict = Judge(self.task.spec, call)(record["outputs"])
        return self.check(check, case, [f"{when}: {verdict.fault}"] if verdict.fault else [])

    def values(self, kernel: _Kernel, case: Case) -> None:
        call, sent = case.call(), case.call()
        seen = self.ask(kernel, _request("value", sent), case)
        first = seen["first"]
        if not self.accepted(first, case):
            return
        with one_thread():
            judge = Judge(self.task.spec, call)
            normal = case.distribution in ("normal", "given")
            verdict = judge(first["outputs"], rms=normal)
            self.check("values", case, [verdict.fault] if verdict.fault else [])
            row = verdict.error, verdict.ulp, verdict.rms_ratio
            self.rows.setdefault(case.dtype, []).append(row)
            if not self.task.derived and normal and verdict.fault is None:
                self.check("rms", case, self.all_together(call, first["outputs"]))
            self.check("deterministic", case, checks.deterministic(first, seen["second"]))
            self.check(
                "inputs", case, checks.inputs_kept(call.args, seen["memory"], seen["layout"])
            )
            self.check("aliasing", case, checks.aliasing(first, seen["inputs_at"], "input"))
            self.check("reuse", case, checks.kept(first, seen["later"], "by a second run"))

    def all_together(self, call: Call, outputs: Sequence[Tensor]) -> Iterator[str]:
        """The RMS rule of ``perturb`` on values."""
        found = self.task.spread(call)
        for i, y in enumerate(outputs):
            ratio, limit = found.ratio(i, y), found.allowed_ratio(i)
            if ratio > limit:
                yield f"output {i}: RMS error {ratio:.3g} units, allowed {limit:.3g}"

    def sequence(self, kernel: _Kernel, case: Case, count: int = 40) -> None:
        """Forty calls on new numbers: some judged, the last among them; all outputs kept."""
        calls = [case.call(seed) for seed in range(count)]
        request = _request("sequence", calls[0])
        seen = self.ask(kernel, {**request, "calls": [c.args for c in calls]}, case)
        records = seen["records"]
        if not all(self.accepted(record, case) for record in records):
            return
        for n in (0, 1, 2, count // 2, count - 1):
            call = case.call(n)
            self.right(records[n], call, case, "fresh", f"call {n + 1} of {count} on new numbers")
        earlier: list[list[int]] = []
        for n, (record, later) in enumerate(zip(records, seen["later"], strict=True)):
            self.check("aliasing", case, checks.aliasing(record, earlier, "earlier output"))
            when = "by a later call" if n + 1 < count else "while nothing ran"
            self.check("reuse", case, checks.kept(record, later, when))
            earlier += record["at"]

    def rewrite(self, kernel: _Kernel, case: Case) -> None:
        """New contents in the same tensors, written behind PyTorch's back."""
        call, new = case.call(), case.call(1)
        contents: list[tuple[int, Any]] = []
        calls = [case.call()]
        for index, arg in enumerate(new.args):
            if isinstance(arg, Tensor) and arg.numel() and arg.is_floating_point():
                t = arg if not _equal(arg, call.args[index]) else _scaled(arg)
                contents.append((index, t))
                calls.append(_replaced(calls[-1], index, t))
        if call.tensors[0].numel():
            middle = _middle_changed(calls[-1])
            contents.append((0, middle.args[0]))
            calls.append(middle)
        seen = self.ask(kernel, {**_request("rewrite", call), "contents": contents}, case)
        for n, (record, expected) in enumerate(zip(seen["records"], calls, strict=True)):
            if not self.accepted(record, case):
                return
            if n == 0:
                continue
            last = n == len(contents) and call.tensors[0].numel() > 0
            what = "one element of x" if last else f"argument {contents[n - 1][0]}"
            when = f"same tensors, {what} overwritten in memory"
            self.right(record, expected, case, "fresh", when)

    def threads(self, kernel: _Kernel, case: Case) -> None:
        """One thread against all."""
        most = torch.get_num_threads()
        if most == 1:
            return
        call = case.call()
        seen = self.ask(kernel, {**_request("threads", call), "counts": [1, most]}, case)
        one, many = seen["records"]
        if self.accepted(one, case) and self.accepted(many, case):
            pairs = zip(one["outputs"], many["outputs"], strict=True)
            texts = [text for a, b in pairs if (text := checks.same_bits(a, b)) is not None]
            found = [f"1 thread and {most} threads: {text}" for text in texts]
            self.promise("thread-invariant", "threads", case, found)

    def gradients(self, kernel: _Kernel, case: Case) -> None:
        """Backward from random cotangents."""
        call = case.call()
        request = {**_request("gradients", case.call()), "seed": case.seed}
        seen = self.ask(kernel, request, case)
        if not self.accepted(seen["record"], case):
            return
        self.right(seen["record"], call, case, "values", "while autograd records")
        lacking = [i for i, recorded in enumerate(seen["recorded"]) if not recorded]
        if lacking or seen["error"]:
            text = f"output {lacking[0]} does not require grad" if lacking else seen["error"]
            self.promise("differentiable", "gradients", case, [f"not differentiable: {text}"])
            return
        with one_thread():
            self.check("gradients", case, self.wrong_gradients(call, seen))
            given = (*call.args, *seen["cotangents"])
            self.check("inputs", case, checks.inputs_kept(given, seen["memory"]))
            self.check("reuse", case, checks.kept(seen["record"], seen["later"], "by backward"))

    def wrong_gradients(self, call: Call, seen: dict[str, Any]) -> Iterator[str]:
        """What is wrong with the gradients seen."""
        spec, cotangents = self.task.spec, seen["cotangents"]
        count = len(cotangents)

        def backward(function: Callable[..., Any]) -> Callable[[Call], tuple[Tensor, ...]]:
            return lambda c: vjp(function, type(c)(c.args[:-count], c.kwargs), c.tensors[-count:])

        whole = type(call)((*call.args, *cotangents), call.kwargs)
        found = spread(backward(plain(spec)), backward(spec.reference), whole)
        yield from checks.missing_gradients(seen["gradients"], found.exact)
        for index, gradient in enumerate(seen["gradients"]):
            if gradient is not None:
                text = checks.gradient(index, gradient, cotangents, found)
                if text is not None:
                    yield text

    def rms(self, kernel: _Kernel) -> None:
        """A matmul: the RMS error over several seeds, at most 1.05 times PyTorch's own."""
        if self.task.spec.home not in ("linear", "gelu_linear"):
            return
        normal = {(c.sample.name, c.dtype): c for c in self.task.gradients}
        for case in normal.values():
            if case.dtype != "f64" and (case.sample.name in _rms_samples(self.task)):
                self.check("rms", case, self.matmul_rms(kernel, case))

    def matmul_rms(self, kernel: _Kernel, case: Case) -> Iterator[str]:
        """Against PyTorch's own, and against what rounding the exact result costs."""
        total, ours, theirs, least = 0, 0.0, 0.0, 0.0
        for seed in range(20):
            call = case.call(100 + seed)
            record = self.ask(kernel, _request("value", case.call(100 + seed)), case)["first"]
            if record["error"] is not None or any(y is None for y in record["outputs"]):
                return  # said elsewhere
            with one_thread():
                judge = Judge(self.task.spec, call)
                for y, own, exact in zip(record["outputs"], judge.own, judge.expected, strict=True):
                    if y.shape != exact.shape:
                        return
                    total += exact.numel()
                    ours += _squares(y, exact)
                    theirs += _squares(own, exact)
                    least += _squares(exact.to(own.dtype), exact)
            if total > 8000 and seed >= 2:
                break
        if total == 0:
            return
        # Of n squares the sum varies by about sqrt(2 n): three times that beside the 5%.
        limit = 1.05 * (1.0 + 3.0 / math.sqrt(2.0 * total)) * math.sqrt(max(theirs, least))
        if math.sqrt(ours) > limit:
            yield (
                f"RMS error {math.sqrt(ours / total):.3g} over {total} elements, "
                f"{math.sqrt(ours / max(theirs, least)):.3g} times PyTorch's own, allowed 1.05"
            )

    def operations(self, kernel: _Kernel, case: Case) -> None:
        """Whether the kernel is one of its own."""
        spec, call = self.task.spec, case.call()
        request = {**_request("operations", call), "codes": self.task.codes}
        seen = self.ask(kernel, request, case)
        if seen["record"]["error"] is not None:
            return
        own = observe.answer(plain(spec), {**_request("operations", case.call()), "codes": []})
        found = checks.operations(seen, own["operations"])
        self.promise("own-kernel", "own-kernel", case, found)

    def guarded(self, kernel: _Kernel, case: Case) -> None:
        """Inputs at guard pages: an access outside them ends the process."""
        seen = self.ask(kernel, _request("guarded", case.call()), case)
        for record, side in zip(seen["records"], ("ends at", "starts behind"), strict=True):
            if self.accepted(record, case):
                self.right(record, case.call(), case, "guard", f"memory {side} a guard page")


def _request(kind: str, call: Call) -> dict[str, Any]:
    return {"kind": kind, "args": [*call.args], "kwargs": dict(call.kwargs)}


def _replaced(call: Call, index: int, t: Tensor) -> Call:
    args = [*call.args]
    args[index] = t
    return type(call)(tuple(args), call.kwargs)


def _equal(a: Tensor, b: Any) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _storage_copy(t: Tensor) -> Tensor:
    """The same in memory of its own, what lies between the elements included."""
    storage = t.untyped_storage().clone()  # type: ignore[no-untyped-call]
    copy = torch.empty(0, dtype=t.dtype).set_(storage, t.storage_offset(), t.shape, t.stride())
    return torch._neg_view(copy) if t.is_neg() else copy


def _scaled(t: Tensor) -> Tensor:
    """Other numbers: half of t."""
    copy = _storage_copy(t)
    torch.empty(0, dtype=t.dtype).set_(copy.untyped_storage()).mul_(0.5)
    return copy


def _middle_changed(call: Call) -> Call:
    """One element in the middle of the first argument is another number."""
    x = call.args[0]
    assert x is not None
    copy = _storage_copy(x)
    where = tuple(n // 2 for n in copy.shape)
    copy[where] = 3.0 - copy[where]
    return _replaced(call, 0, copy)


def _rms_samples(task: Task) -> set[str]:
    """The probes, and the sample with the most outputs."""
    samples = {c.sample.name: c.sample for c in task.gradients}
    largest = max(samples.values(), key=lambda s: s.bytes_written(torch.float32))
    return {largest.name, *(n for n in task.spec.probes if n in samples)}


def _squares(y: Tensor, exact: Tensor) -> float:
    return (y.to(torch.float64) - exact).square().sum().item()
