"""What names a kernel: a callable, or text such as ``kernel.py:function`` or ``rung:rope/cpp``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["guessed_op", "is_isolated", "resolve"]


def is_isolated(target: Any) -> bool:
    """Whether target names code to import: it is then run by a process of its own.

    Raises:
        ValueError: the text has no form of a target.
    """
    if not isinstance(target, str) or target.startswith(("torch.ops.", "rung:")):
        return False
    home, _, name = target.rpartition(":")
    if not home or not name:
        raise ValueError(
            f"a target is FILE.py:NAME, MODULE:NAME, torch.ops.NAMESPACE.NAME or rung:OP/RUNG, "
            f"not {target!r}"
        )
    return True


def guessed_op(target: Any) -> str | None:
    """The op of a rung; None for anything else."""
    if isinstance(target, str) and target.startswith("rung:"):
        return target.removeprefix("rung:").partition("/")[0]
    op = getattr(target, "op", None)
    return op if isinstance(op, str) and hasattr(target, "unavailable") else None


def resolve(target: Any, callable_only: bool = True) -> Any:
    """What target names; a class of modules is instantiated without arguments.

    Raises:
        ValueError: the text has no such form, or nothing of that name is there.
    """
    found = _named(target) if isinstance(target, str) else target
    if isinstance(found, type) and issubclass(found, nn.Module):
        found = found()
    if callable_only and not callable(found):
        raise ValueError(f"{target!r} is not callable")
    return found


def _named(text: str) -> Any:
    if text.startswith("rung:"):
        from fusedops import ladder  # pulls in NumPy

        op, _, name = text.removeprefix("rung:").partition("/")
        try:
            return ladder.get(op, name)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    if text.startswith("torch.ops."):
        return _attribute(torch.ops, text.removeprefix("torch.ops."), text)
    is_isolated(text)
    home, _, name = text.rpartition(":")
    return _attribute(_file(Path(home)) if home.endswith(".py") else _module(home), name, text)


def _attribute(owner: Any, path: str, text: str) -> Any:
    try:
        return reduce(getattr, path.split("."), owner)
    except AttributeError as error:
        raise ValueError(f"nothing is called {text!r}: {error}") from None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"no module {name!r}: {error}") from None


def _file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
