"""A kernel in a process of its own: a crash, a hang or a full memory is then a finding.

The parent asks through pipes: eight bytes of length, then torch.save of plain data, read with
``weights_only``. Only ``observe`` runs in the child; the oracle and the judge stay in the parent,
out of the candidate's reach.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["Child", "Lost", "main"]

_COMMAND = "import sys; from fusedops.verification.worker import main; main(*sys.argv[1:])"
_START = 120.0  # seconds to import torch and the candidate, which may compile


class Lost(Exception):
    """The process is gone; text says how."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Child:
    """The parent's side. before, after: the state of the child around the candidate's import."""

    def __init__(self, target: str, timeout: float, memory: float) -> None:
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (os.getcwd(), root, os.environ.get("PYTHONPATH")) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, target, str(memory), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            self.before = self._receive(_START)
            self.after = self._receive(max(_START, timeout))
            if "failed" in self.after:
                raise Lost(self.after["failed"])
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The observation; Lost when the process is."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            _write(self._process.stdin, request)
        return self._receive(self._timeout)

    def _receive(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        length = int.from_bytes(self._bytes(8, deadline), "little")
        if length > 1 << 34:
            raise Lost("wrote into the pipe of its process")
        payload = self._bytes(length, deadline)
        try:
            message = torch.load(io.BytesIO(payload), weights_only=True)
        except Exception:
            raise Lost("wrote into the pipe of its process") from None
        assert isinstance(message, dict)
        return message

    def _bytes(self, count: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, parts = self._process.stdout.fileno(), []
        while count > 0:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise Lost("hung: no answer in time, stopped")
            part = os.read(descriptor, min(count, 1 << 20))
            if not part:
                raise Lost(self._end())
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _end(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL): out of memory"
        if code < 0:
            return f"crashed: {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"ended its process with exit code {code}" + (f": {lines[-1]}" if lines else "")


def _write(stream: IO[bytes], message: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    stream.write(len(buffer.getbuffer()).to_bytes(8, "little"))
    stream.write(buffer.getbuffer())
    stream.flush()


def _read(stream: IO[bytes]) -> dict[str, Any] | None:
    head = stream.read(8)
    if len(head) < 8:
        return None
    data = stream.read(int.from_bytes(head, "little"))
    message: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    return message


def _limit_memory(gib: float) -> None:
    """To what the process has now and gib more."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGESIZE") + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(target: str, gib: str, threads: str) -> None:
    """The child's side: loads the target, then answers until the pipe is closed."""
    # What the candidate prints goes to stderr; the pipes are out of its way.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from fusedops.verification import observe
    from fusedops.verification.targets import resolve

    torch.set_num_threads(int(threads))
    _write(answers, observe.state())
    try:
        kernel = resolve(target)
    except (Exception, SystemExit) as error:
        _write(answers, {"failed": f"could not be loaded: {observe.line(error)}"})
        return
    _limit_memory(float(gib))
    _write(answers, observe.state())
    while (request := _read(requests)) is not None:
        _write(answers, observe.answer(kernel, request))
