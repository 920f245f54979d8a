"""``python -m fusedops bench``: reads the options, runs what they ask for, says how it went."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fusedops
from fusedops.bench import bars, calls, compare, info, ladder, measure, report, sweep
from fusedops.bench.limits import Limits
from fusedops.bench.measure import NOISE, QUICK_NOISE, Entry
from fusedops.bench.peers import PEERS, Unsupported, get
from fusedops.bench.record import Case, Regime, Result, Writer, load
from fusedops.bench.session import Session
from fusedops.bench.yardsticks import YARDSTICKS
from fusedops.testing import DTYPES, SPECS, Sample

__all__ = ["add_parser", "run"]

OTHERS = ("ladder", "calls", "limits")
DEFAULT_PEERS = ("eager", "compile")
FORMS_PEERS = ("eager",)  # and of some of them torch.compile: see sweep.forms
FORM_SECONDS = 0.05  # of timing for each of hundreds
# The rounding of quantized activations has no gradient.
_FOR_INFERENCE = ("gelu_linear_quantized",)

# A large shape, a decode step and one between them; of the matmuls none that takes a second.
QUICK: dict[str, tuple[str, ...]] = {
    "rope": ("article/rope", "small/decode", "llama-3-8b/prefill-512"),
    "rope_qk": ("llama-3-8b/prefill-512", "llama-3-8b/decode"),
    "gelu_linear": ("bert-base/128", "bert-large/512", "small/1-rows-1024"),
    "linear": ("bert-base/128", "small/16-rows-1024"),
    "gelu_linear_quantized": (
        *(f"small/1-rows-1024-{stored}" for stored in ("bf16", "int8", "w8a8")),
        "bert-large/512-w8a8",
    ),
    "gelu": ("bert-base/128",),
}


def add_parser(commands: Any) -> None:
    """The command and its options, as a subparser."""
    parser = commands.add_parser(
        "bench",
        help="time the ops against their peers, every result verified",
        description="Times the ops against their peers; every output that is timed is verified. "
        "Exits 1 when a result is refused, a bar falls short, a case regressed or a swept shape "
        "loses; 2 when nothing could be measured or saved; 130 when interrupted.",
    )
    add = parser.add_argument
    add("what", nargs="?", choices=(*SPECS, *OTHERS), help="an op, or one of the other parts")
    add(
        "--shape", default=None, metavar="GLOB", help="of <model>/<phase>, such as 'llama*/decode*'"
    )
    usual = "f32,bf16; with f16 for the ladder, --forms and the --sweep of a matmul"
    add("--dtype", help=f"of f32,bf16,f16,f64 (default: {usual})")
    add(
        "--regime",
        default="",
        help="words joined by +, several by comma: given,train,in_place+cold",
    )
    add("--threads", default="", help="such as 1,2 (default: as many as torch uses)")
    add("--isa", default="", help="such as avx512,avx2 (default: the one in use)")
    usual = "eager,compile; with --forms compile in one form of each shape"
    add("--peers", help=f"names, all or none (default: {usual})")
    add("--subject", default="fusedops", help="the peer in whose place ours stands")
    add("--candidate", metavar="FILE.py:FUNCTION", help="a function of your own as the subject")
    add("--quick", action="store_true", help="few shapes, little time, a wider noise band")
    add("--seconds", type=float, help="of timing per case, without warm-up and verification")
    add("--sweep", type=int, metavar="N", help="N random shapes in each dtype; prints the worst")
    add("--seed", type=int, default=1, help="of --sweep (default: %(default)s)")
    add("--part", default="1/1", metavar="K/N", help="every Nth shape of --sweep from the Kth on")
    add("--forms", nargs="?", const="*", metavar="GLOB", help="models' shapes in every layout")
    add("--bars", nargs="?", const="*", metavar="GLOB", help="check the speed that must hold")
    add("--json", metavar="FILE", help="keep the record there; - is standard output")
    add("--compare", nargs="+", metavar="OLD.json", help="with this run, or OLD.json NEW.json")
    add("--force", action="store_true", help="compare records of different machines")


@dataclass(frozen=True)
class Job:
    """One thing to do, with its title for the progress bar."""

    title: str
    run: Callable[[Callable[[str], None]], Result]


@dataclass(frozen=True)
class Plan:
    """What the options ask for, checked before anything runs."""

    ops: tuple[str, ...]
    dtypes: tuple[str, ...]
    regimes: tuple[Regime, ...]
    threads: tuple[int, ...]
    isas: tuple[str, ...]
    subject: Entry
    peers: tuple[str, ...]
    seconds: float
    noise: float

    @property
    def entries(self) -> list[Entry]:
        """The subject and the peers."""
        return [self.subject, *map(_entry, self.peers)]

    def every(self) -> Iterator[tuple[str, str, Regime, int, str]]:
        """All combinations."""
        for op in self.ops:
            for isa in self.isas:
                for threads in self.threads:
                    for regime in self.regimes:
                        for dtype in self.dtypes:
                            yield op, dtype, regime, threads, isa


def run(options: argparse.Namespace) -> int:
    """Do what the options say; returns the exit code."""
    try:
        olds = [load(path) for path in options.compare or ()]
        if len(olds) > 2:
            raise ValueError("[bench] --compare must be given one record or two but got more")
        if len(olds) == 2:
            return _compared(compare.compare(olds[0], olds[1], options.subject, options.force))
        plan = _plan(options)
        if olds and not options.force:
            compare.same_class(olds[0].machine, info.fingerprint())
        session = Session(_command(options), Writer(options.json), _subject_name(options))
    except (ValueError, RuntimeError) as error:  # TargetError is one
        sys.stderr.write(f"fusedops bench: error: {_one_line(error)}\n")
        return 2
    try:
        code = _execute(options, plan, session)
    except KeyboardInterrupt:
        session.finish(partial=True)
        sys.stderr.write(
            f"fusedops bench: interrupted; {len(session.results)} results are kept, "
            "marked partial\n"
        )
        return 130
    if olds:
        # The machines were compared before anything was measured.
        changes = compare.compare(olds[0], session.record(False), session.subject, force=True)
        session.print(compare.text(changes))
        code = max(code, int(any(change.kind == "regressed" for change in changes)))
    session.finish()
    return 2 if session.writer.failed else code


def _compared(changes: list[compare.Change]) -> int:
    sys.stdout.write(compare.text(changes))
    return int(any(change.kind == "regressed" for change in changes))


def _execute(options: argparse.Namespace, plan: Plan, session: Session) -> int:
    if options.bars is not None:
        return _bars(options.bars, plan, session)
    if options.what == "limits":
        session.begin(len(plan.threads))
        for threads in plan.threads:
            title = f"{threads} thread{'s' * (threads != 1)}"
            session.progress.begin(title)
            limits = Limits(threads, progress=session.progress.status)
            session.print(f"### {title}\n\n{report.limits_table(limits.table())}")
        return 0
    if options.sweep is not None or options.forms is not None:
        return _sweep(list(_shapes(options, plan)), options.peers is None, plan, session)
    jobs = {"ladder": _ladder_jobs, "calls": _calls_jobs}.get(options.what, _op_jobs)
    code = _jobs(list(jobs(options, plan)), session, rivals=options.what != "calls")
    return max(code, _over_kernel(session)) if options.what == "calls" else code


# --- the parts ------------------------------------------------------------------------------------


def _op_jobs(options: argparse.Namespace, plan: Plan) -> Iterator[Job]:
    for op, dtype, regime, threads, isa in plan.every():
        if regime.work == "train" and op in _FOR_INFERENCE:
            continue
        for sample in _samples(op, options):
            case = Case(op, sample.name, dtype, regime, threads, isa)
            run = partial(_measured, plan, case, None, plan.entries, plan.subject.name, False)
            yield Job(_title(case), run)


def _measured(
    plan: Plan,
    case: Case,
    sample: Sample | None,
    entries: Sequence[Entry],
    subject: str,
    recording: bool,
    status: Callable[[str], None],
    patience: float = 0.0,
) -> Result:
    return measure.measure(
        case,
        entries,
        subject=subject,
        sample=sample,
        seconds=plan.seconds,
        patience=patience,
        noise=plan.noise,
        recording=recording,
        status=status,
    )


def _ladder_jobs(options: argparse.Namespace, plan: Plan) -> Iterator[Job]:
    glob = options.shape or "*"
    for threads in plan.threads:
        for isa in plan.isas:
            for one in ladder.cases(threads, isa):
                if one.case.dtype in _given_dtypes(options) and fnmatch(one.case.shape, glob):
                    yield Job(_title(one.case), partial(ladder.run, one, plan.seconds, plan.noise))


def _calls_jobs(options: argparse.Namespace, plan: Plan) -> Iterator[Job]:
    for threads in plan.threads:
        for isa in plan.isas:
            for one in calls.cases(threads, isa):
                yield Job(
                    _title(one.case),
                    partial(
                        _measured, plan, one.case, one.sample, one.entries, calls.SUBJECT, True
                    ),
                )


def _jobs(jobs: list[Job], session: Session, rivals: bool) -> int:
    session.begin(len(jobs))
    for job in jobs:
        session.add(_do(job, session), rivals=rivals)
    session.progress.close()
    if rivals and len(session.results) > 1:
        session.print(report.summary(session.results, session.subject))
    wrong = [text for result in session.results for text in _faults(result, session.subject)]
    if wrong:
        session.print("\n".join(f"FAILED: {text}" for text in wrong))
    return int(bool(wrong))


def _over_kernel(session: Session) -> int:
    """Prints what plans cost beyond their kernels; 1 where it is too much."""
    costs = [cost for result in session.results for cost in calls.over_kernel(result).values()]
    if costs:
        session.print(calls.text(session.results))
    return int(any(cost > calls.OVER_KERNEL for cost in costs))


def _faults(result: Result, subject: str) -> Iterator[str]:
    """What is wrong with the subject; what it cannot do is no fault as long as it says so."""
    for row in result.rows:
        if row.candidate == subject and row.fault is not None:
            yield f"{report.title(result)}: {subject}: {row.fault}"
    reason = result.absent.get(subject, "")
    if reason.startswith(measure.FAILED):
        yield f"{report.title(result)}: {subject}: {reason}"


def _bars(glob: str, plan: Plan, session: Session) -> int:
    subject = plan.subject.name
    every = [name for name in PEERS if name not in report.OURS and PEERS[name].missing() is None]
    groups = bars.grouped(glob, plan.ops, plan.threads[0], plan.isas[0])
    session.begin(len(groups))
    for case, checks in groups.items():
        session.progress.begin(_title(case))
        names = bars.candidates(checks, every, subject)
        own = {subject: plan.subject, measure.LIMIT: measure.limit_now(case)}
        entries = [own.get(name) or _entry(name) for name in names]
        last: list[Result] = []

        def once(case: Case = case, entries: list[Entry] = entries) -> Result:
            first, told = entries[0].name, session.progress.status
            result = _measured(plan, case, None, entries, first, False, told, bars.PATIENCE)
            last[:] = [result]  # noqa: B023 - used before the next turn
            return result

        bars.check(checks, every, subject, once)
        session.add(last[0], table=False)
    session.progress.close()
    done = [one for checks in groups.values() for one in checks]
    session.print(bars.text(done))
    return int(any(one.state != "ok" for one in done))


def _shapes(options: argparse.Namespace, plan: Plan) -> Iterator[sweep.Shape]:
    for op in plan.ops:
        for regime in plan.regimes:
            rest = plan.dtypes, regime, plan.threads[0], plan.isas[0]
            if options.forms is not None:
                yield from sweep.forms(op, options.forms, *rest)
            else:
                part = _part(options.part)
                yield from sweep.shapes(op, options.sweep, options.seed, *rest, part)


def _sweep(todo: list[sweep.Shape], compiling: bool, plan: Plan, session: Session) -> int:
    subject, compiler = plan.subject.name, _entry("compile")
    session.begin(len(todo))
    lost = []
    for shape in todo:
        entries = [*plan.entries, compiler] if compiling and shape.compiled else plan.entries
        run = partial(_measured, plan, shape.case, shape.sample, entries, subject, False)
        result = _do(Job(_title(shape.case), run), session)
        if sweep.loses(result, subject):
            again = run(session.progress.status)
            if sweep.loses(again, subject):
                lost.append(again)
            result = again
        session.add(result, table=False)
    session.progress.close()
    session.print(sweep.text(session.results, lost, subject))
    return int(bool(lost))


def _do(job: Job, session: Session) -> Result:
    session.progress.begin(job.title)
    return job.run(session.progress.status)


# --- options --------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> Plan:
    if options.what not in SPECS and options.sweep is not None:
        raise ValueError("[bench] --sweep must be given an op")
    swept = options.sweep is not None or options.forms is not None
    if options.forms is not None:
        _require_forms(options.what, options.forms)
    if options.sweep is not None and options.sweep < 1:
        raise ValueError(f"[bench] --sweep must be at least 1 but got {options.sweep}")
    _, parts = _part(options.part)
    if parts > (options.sweep or 1):
        raise ValueError(
            f"[bench] --part must have at most as many parts as --sweep has shapes "
            f"but got {options.part}"
        )
    if options.seconds is not None and not 0 <= options.seconds < float("inf"):
        raise ValueError(f"[bench] --seconds must be at least 0 but got {options.seconds:g}")
    ops = (options.what,) if options.what in SPECS else tuple(SPECS)
    plain = options.what not in OTHERS and options.bars is None and not swept
    if plain and not any(True for op in ops for _ in _samples(op, options)):
        raise ValueError(f"[bench] --shape must match a shape but got {options.shape!r}")
    if options.bars is not None and not bars.grouped(options.bars, ops, 1, ""):
        raise ValueError(f"[bench] --bars must match a bar but got {options.bars!r}")
    quick = options.quick or swept
    seconds = options.seconds
    if seconds is None:
        seconds = FORM_SECONDS if options.forms is not None else 0.3 if quick else 1.0
    subject = _subject(options)
    return Plan(
        ops=ops,
        dtypes=_given_dtypes(options),
        regimes=tuple(map(Regime.parse, options.regime.split(","))),
        threads=_threads(options.threads),
        isas=_isas(options.isa),
        subject=subject,
        peers=tuple(name for name in _peers(options) if name != subject.name),
        seconds=seconds,
        noise=QUICK_NOISE if quick else NOISE,
    )


def _require_forms(op: str, glob: str) -> None:
    with_forms = [name for name, spec in SPECS.items() if spec.forms]
    if op not in with_forms:
        raise ValueError(
            f"[bench] --forms must be given an op with layouts ({', '.join(with_forms)}) "
            f"but got {op}"
        )
    if not any(sweep.forms(op, glob, ("f32",), Regime(), 1, "")):
        raise ValueError(f"[bench] --forms must match a shape but got {glob!r}")


def _samples(op: str, options: argparse.Namespace) -> Iterator[Sample]:
    few = options.quick or (options.what is None and options.shape is None)
    for sample in SPECS[op].bench:
        if options.shape is not None:
            if fnmatch(sample.name, options.shape):
                yield sample
        elif not few or sample.name in QUICK.get(op, ()):
            yield sample


def _given_dtypes(options: argparse.Namespace) -> tuple[str, ...]:
    swept = options.sweep is not None and options.what in measure.MATMULS
    every = options.what == "ladder" or options.forms is not None or swept
    text = options.dtype
    if text is None:
        text = "f32,bf16,f16" if every else "f32,bf16"
    return _among("--dtype", text.split(","), DTYPES)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    first, of = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= of:
        raise ValueError(f"[bench] --part must be K/N with K from 1 to N but got {text!r}")
    return first, of


def _threads(text: str) -> tuple[int, ...]:
    if not text:
        return (torch.get_num_threads(),)
    try:
        counts = tuple(int(word) for word in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ValueError(f"[bench] --threads must be whole numbers from 1 on but got {text!r}")
    return counts


def _isas(text: str) -> tuple[str, ...]:
    if not text:
        return (fusedops.isa.current(),)
    return _among("--isa", text.split(","), fusedops.isa.supported())


def _peers(options: argparse.Namespace) -> tuple[str, ...]:
    text = options.peers
    if text is None:
        return DEFAULT_PEERS if options.forms is None else FORMS_PEERS
    if text in ("", "none"):
        return ()
    if text == "all":
        return tuple(name for name in PEERS if name != "fusedops")
    names = tuple(text.split(","))
    get(names)  # names what is unknown
    return names


def _among(option: str, words: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    known = tuple(known)
    for word in words:
        if word not in known:
            raise ValueError(f"[bench] {option} must be among {', '.join(known)} but got {word!r}")
    return tuple(words)


def _entry(name: str) -> Entry:
    if name in YARDSTICKS:
        return YARDSTICKS[name]
    return Entry.of(get([name])[0])


def _subject(options: argparse.Namespace) -> Entry:
    if options.candidate is None:
        return Entry.of(get([options.subject])[0])
    path, _, name = options.candidate.rpartition(":")
    if not path:
        raise ValueError(f"[bench] --candidate must be FILE.py:FUNCTION but got {name!r}")
    function = _load_function(Path(path), name)

    def build(spec: Any, call: Any, regime: Regime) -> Callable[[], Any]:
        if regime.output != "fresh":
            raise Unsupported("a function of a file returns a new tensor")
        return partial(function, *call.args, **call.kwargs)

    return Entry(name, build, unproven=True)


def _subject_name(options: argparse.Namespace) -> str:
    if options.candidate is not None:
        return str(options.candidate.rpartition(":")[2])
    fixed = {"ladder": ladder.SUBJECT, "calls": calls.SUBJECT}
    return str(fixed.get(options.what, options.subject))


def _load_function(path: Path, name: str) -> Callable[..., Any]:
    """The function of that name; whatever its file does when it is imported, the clock is ours."""
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ValueError("it is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:
        raise ValueError(f"[bench] --candidate {path}:{name} does not load: {error}") from error
    if not callable(function):
        raise ValueError(f"[bench] --candidate must name a function but {path}:{name} is none")
    return function  # type: ignore[no-any-return]


def _title(case: Case) -> str:
    return f"{case.op} {case.shape} {case.dtype}"


def _command(options: argparse.Namespace) -> str:
    """As typed, but for the files of this machine."""
    files = {options.json, *(options.compare or ()), "--json", "--compare"}
    return shlex.join(["fusedops", *(word for word in sys.argv[1:] if word not in files)])


def _one_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0].removeprefix("[bench] ")
