"""What this build and this machine are: ``python -m fusedops info``, and a record's fingerprint."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import fusedops
from fusedops import _C, choice
from fusedops._machine import cpu_family, cpu_name, output
from fusedops.bench.limits import Limits, has_matrix_unit

__all__ = ["cpu_name", "fingerprint", "text"]

# True on every machine, also on one that runs the code in question.
UNSEEN = (
    "no report of a run of fusedops' Metal, MPS, CoreML or arm64 (neon) code on real hardware "
    "has been seen"
)


def text(progress: Callable[[str], None] = lambda name: None) -> str:
    """Name and value, one a line: the build, the machine, and its limits as measured now.

    Args:
        progress: told the name of each measurement before it runs; all take a few seconds.
    """
    machine = fingerprint()
    rows = [
        ("fusedops", machine["fusedops"]),
        ("commit", machine.get("commit", "not in a checkout")),
        ("compiler", machine["compiler"]),
        ("python", machine["python"]),
        ("torch", machine["torch"]),
        ("torch build", machine["torch build"]),
        ("torch libraries", _torch_libraries()),
        ("system", machine["os"]),
        ("cpu", f"{machine['cpu']} ({machine['family']})"),
        ("cores", f"{_count(len(_cpus()), 'CPU')} for this process"),
        ("threads", machine["threads"]),
        ("matrix unit", "yes" if has_matrix_unit() else "no"),
        ("isa compiled", " ".join(fusedops.isa.compiled())),
        ("isa supported", machine["isas"]),
        ("isa in use", machine["isa"]),
        *_backends(),
        ("caches", machine["caches"]),
        ("last cache", _size(_C.last_cache_bytes())),
        ("huge pages", machine["thp"]),
        ("governor", machine["governor"]),
        ("class", machine["class"]),
        *_limits(progress),
        ("not verified", UNSEEN),
    ]
    return "".join(f"{name:<18} {value}\n" for name, value in rows)


def fingerprint() -> dict[str, str]:
    """What a figure depends on, one line each; "commit" only where the package is in a checkout."""
    family = cpu_family()
    isa, threads = fusedops.isa.current(), torch.get_num_threads()
    numbers = re.match(r"family (\d+)", family)
    parts = (_short(cpu_name()), f"fam{numbers[1]}" if numbers else "", f"{threads}t", isa)
    found = {
        "class": "-".join(part for part in parts if part),
        "cpu": cpu_name(),
        "family": family,
        "isa": isa,
        "isas": " ".join(fusedops.isa.supported()),
        "threads": str(threads),
        "caches": _caches(),
        "thp": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "governor": _chosen(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch build": str(torch.version.git_version),
        "compiler": _C.compiler(),
        "fusedops": fusedops.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    return {name: " ".join(value.split()) for name, value in found.items() if value}


def _limits(progress: Callable[[str], None]) -> list[tuple[str, str]]:
    """A line per limit, a column per number of threads."""
    columns = []
    for threads in sorted({1, torch.get_num_threads()}):

        def told(name: str, count: int = threads) -> None:
            progress(f"{name}, {_count(count, 'thread')}")

        columns.append((threads, Limits(threads, progress=told).table()))
    rows = [("limits", "".join(f"{_count(threads, 'thread'):>14}" for threads, _ in columns))]
    for name in columns[0][1]:
        cells = "".join(f"{_rate(name, rates[name]):>14}" for _, rates in columns)
        what = f"  {_C.fma_unit(name.removeprefix('fma '))}" if name.startswith("fma ") else ""
        rows.append((name, cells + what))
    return rows


def _backends() -> list[tuple[str, str]]:
    """Who multiplies in dense layers, and who says so."""
    forced = fusedops.backend.current()
    if forced != "auto":
        return [("backend", f"{forced}, forced upon all calls")]
    isa, threads = fusedops.isa.current(), torch.get_num_threads()
    said = "by the default table"
    if (isa, threads) in choice.sources:
        source = choice.sources[isa, threads]
        said = f"as stored in {source}" if source else "as measured in this process, not stored"
    rows = [("backend", said)]
    table = _C.choices(isa, threads)
    for product in dict.fromkeys(row[0] for row in table):
        counts = Counter(row[5] for row in table if row[0] == product)
        shares = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        rows.append((product.replace("_", " "), f"{shares} of {counts.total()} classes of shapes"))
    return rows


def _rate(name: str, rate: float) -> str:
    unit = "Gop/s" if name.startswith("fma ") else "GB/s"
    return f"{rate / 1e9:.3g} {unit}" if rate < 100e9 else f"{rate / 1e9:.0f} {unit}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _size(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


def _caches() -> str:
    described = []
    for level, kind, size, sharers in _C.cache_bytes():
        shared = f" shared by {_count(sharers, 'CPU')}" if sharers > 1 else ""
        described.append(f"L{level} {kind} {_size(size)}{shared}")
    return ", ".join(described) or "not told"


def _cpus() -> set[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _short(name: str) -> str:
    """A processor's name in lower case, without what every name has."""
    name = re.sub(r"\(\w+\)|@.*|\b(cpu|processor|\d+-core)\b", " ", name, flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def _chosen(path: Path) -> str:
    """A setting of the system; of several in a line the one in brackets."""
    if not path.exists():
        return "not told"
    line = path.read_text().strip()
    bracketed = re.search(r"\[(\w+)\]", line)
    return bracketed[1] if bracketed else line


def _torch_libraries() -> str:
    """BLAS, oneDNN and the thread pool of this torch."""
    show, parallel = torch.__config__.show(), torch.__config__.parallel_info()
    patterns = (
        (r"BLAS_INFO=(\w+)", show, "BLAS {}"),
        (r"MKL-DNN v([\d.]+)", show, "oneDNN {}"),
        (r"parallel backend: (.+)", parallel, "{}"),
        (r"CPU capability usage: (\w+)", show, "{}"),
    )
    found = ((re.search(pattern, where), form) for pattern, where, form in patterns)
    return ", ".join(form.format(match[1].strip()) for match, form in found if match) or "not told"


def _commit() -> str:
    """The commit of the checkout that this package lies in, "-dirty" with changes; else empty."""
    root = Path(fusedops.__file__).resolve().parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return ""
    commit = output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = output("git", "-C", str(root), "status", "--porcelain")
    return f"{commit}-dirty" if commit and changed else commit
