"""The files that keep what :func:`fusedops.autotune` found: where, how, and what to believe.

One file for each key, replaced as a whole: of two processes that write at once the last one wins,
and no reader sees half a file. ``load`` runs at import. What it cannot use it leaves alone and says
so in one line, once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fusedops
from fusedops import _C, _machine

__all__ = ["folder", "install", "key", "load", "path_of", "row_of", "sources", "store"]

_FORMAT = 1
_MOST_BYTES = 1 << 20
_PRODUCTS = ("forward", "input_gradient", "weight_gradient")
_DTYPES = ("f32", "f16", "bf16", "f64")
_KEY = ("cpu", "isa", "threads", "torch", "fusedops")

Row = tuple[str, str, int, int, int, str]  # product, dtype, m, n, k, backend

# By ISA and number of threads: the file that the choices in use come from; None: they were measured
# in this process and are in no file.
sources: dict[tuple[str, int], Path | None] = {}
_warned = False


def folder() -> Path | None:
    """Below FUSEDOPS_CACHE_DIR, else the user's cache folder; None where there is no home."""
    named = os.environ.get("FUSEDOPS_CACHE_DIR")
    if named:
        return Path(named) / "autotune"
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # as the XDG specification says
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        caches = os.path.join(home, "Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(caches) / "fusedops" / "autotune"


def key(isa: str, threads: int) -> dict[str, Any]:
    """What choices depend on."""
    return {
        "cpu": f"{_machine.cpu_name()} ({_machine.cpu_family()})",
        "isa": isa,
        "threads": threads,
        "torch": str(torch.__version__),
        "fusedops": fusedops.__version__,
    }


def path_of(key: dict[str, Any]) -> Path | None:
    """The file of a key."""
    where = folder()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return where and where / f"{key['isa']}-{key['threads']}t-{digest}.json"


def store(key: dict[str, Any], choices: Sequence[dict[str, Any]]) -> Path:
    """Write the choices of a key, those that were stored before and are not measured anew kept.

    Raises:
        OSError: the file cannot be written.
    """
    path = path_of(key)
    if path is None:
        raise FileNotFoundError("no home folder, and FUSEDOPS_CACHE_DIR is not set")
    kept = {}
    with contextlib.suppress(OSError, ValueError):  # else there is nothing that could be kept
        kept = {_place(row): row for row in _read(path)[1]}
    kept.update((_place(row), row) for row in choices)
    rows = ",\n".join(json.dumps(row) for _, row in sorted(kept.items()))
    text = f'{{"format": {_FORMAT},\n"key": {json.dumps(key)},\n"choices": [\n{rows}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.parent / f".{path.stem}-{os.urandom(8).hex()}"
    # Not mkstemp, whose files are their owner's alone: the umask says who may read a shared folder.
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def install(path: Path) -> None:
    """Go by a file's choices.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not one that ``store`` wrote.
    """
    found, choices = _read(path)
    _C.install_choices(found["isa"], found["threads"], [row_of(one) for one in choices])
    sources[found["isa"], found["threads"]] = path


def load() -> None:
    """Install the stored choices of this machine, if any; FUSEDOPS_AUTOTUNE=0 ignores them."""
    where = folder()
    if os.environ.get("FUSEDOPS_AUTOTUNE") == "0" or where is None:
        return
    try:
        paths = sorted(Path(entry.path) for entry in os.scandir(where) if _is_named(entry.name))
    except FileNotFoundError:
        return
    except OSError as error:
        return _ignore(f"{where} ({error.strerror})")
    own = key("", 0)
    others = []
    for path in paths:
        try:
            found, _ = _read(path)
            other = [name for name in ("cpu", "torch", "fusedops") if found[name] != own[name]]
            if other:
                others.append((path, other[0], found[other[0]]))
            elif found["isa"] in _C.isa_compiled():
                install(path)
        except OSError as error:
            _ignore(f"{path} ({error.strerror})")
        except ValueError as error:
            _ignore(f"{path} ({error})")
    if others and not sources:
        path, name, value = others[0]
        _ignore(f"{path} (it is for {name} {value}, here it is {own[name]})")


def _is_named(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


def _ignore(what: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        line = (
            f"fusedops ignores {what}: fusedops.autotune() writes a new one, FUSEDOPS_AUTOTUNE=0 "
            "keeps this quiet"
        )
        try:
            warnings.warn(line, stacklevel=2)
        except UserWarning as error:  # warnings are errors here; a cache is no reason not to import
            warnings.showwarning(error, UserWarning, __file__, 0, line="")


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The key and the choices of a file, every value checked."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait for a writer
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no regular file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            text = file.read(_MOST_BYTES + 1)
    finally:
        os.close(handle)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT}")
    found, choices = content.get("key"), content.get("choices")
    if not isinstance(found, dict) or set(found) != set(_KEY):
        raise ValueError("its key does not name " + ", ".join(_KEY))
    if not all(isinstance(found[name], int if name == "threads" else str) for name in _KEY):
        raise ValueError("its key has values of other types")
    if not 0 < found["threads"] < 1 << 16:
        raise ValueError("its number of threads cannot be")
    own = path_of(found)
    if own is None or own.name != path.name:
        raise ValueError("its name is not that of its key")
    if not isinstance(choices, list):
        raise ValueError("it has no list of choices")
    for choice in choices:
        _check(choice)
    return found, choices


def _check(choice: Any) -> None:
    rows, features = _C.choice_bounds()
    allowed = {
        "product": _PRODUCTS,
        "dtype": _DTYPES,
        "m": rows,
        "n": features,
        "k": features,
        "backend": _C.backend_names(),
    }
    if not isinstance(choice, dict) or set(choice) != {*allowed, "seconds"}:
        raise ValueError("a choice does not name " + ", ".join((*allowed, "seconds")))
    for name, values in allowed.items():
        value = choice[name]
        if type(value) is not type(values[0]) or value not in values:
            raise ValueError(f"a choice has {name} {value!r:.40}")
    if (choice["product"], choice["backend"]) == ("forward", "aten_direct"):
        raise ValueError("a choice has a result rounded twice")  # by name only, in a process
    seconds = choice["seconds"]
    if not isinstance(seconds, dict) or not all(
        isinstance(t, float) and math.isfinite(t) and t > 0 for t in seconds.values()
    ):
        raise ValueError("a choice has other seconds than a number above 0 for each backend")


def row_of(choice: dict[str, Any]) -> Row:
    """A stored choice as ``_C.install_choices`` takes it."""
    return (*_place(choice), choice["backend"])


def _place(choice: dict[str, Any]) -> tuple[str, str, int, int, int]:
    return (choice["product"], choice["dtype"], choice["m"], choice["n"], choice["k"])
