"""Faults of a process: it stands still, it is killed, it is restarted. Always by its id, never by a name."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sync.chaos.faults import NeverFired

STOP_SECONDS = 8.0
"""How long a command may take to stop in order before it is killed."""
STATE_SECONDS = 2.0
POLL_SECONDS = 0.01


def state_of(pid: int) -> str:
    """The kernel's letter for the process (proc(5)): R, S, D running or waiting, T stopped, Z dead; "" = there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def alive(pid: int) -> bool:
    return state_of(pid) not in ("", "Z", "X")


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """The process stands still (SIGSTOP) inside the block. Raises NeverFired when it did not, ProcessLookupError."""
    os.kill(pid, signal.SIGSTOP)
    try:
        if not _becomes(lambda: state_of(pid) == "T"):
            raise NeverFired(f"pause: process {pid} did not stop")
        yield
        if state_of(pid) != "T":
            raise NeverFired(f"pause: process {pid} did not stand still for the whole time")
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGCONT)


def kill(pid: int) -> None:
    """kill -9. Raises NeverFired when it was dead before or lives on, ProcessLookupError."""
    if not alive(pid):
        raise NeverFired(f"kill: process {pid} was dead before")
    os.kill(pid, signal.SIGKILL)
    if not _becomes(lambda: not alive(pid)):
        raise NeverFired(f"kill: process {pid} lives on")


class Command:
    """A command that is started here, and can be killed and started again."""

    def __init__(self, arguments: Sequence[str], env: dict[str, str] | None = None) -> None:
        self._arguments = list(arguments)
        self._env = {**os.environ, **(env or {})}
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises OSError."""
        self._child = subprocess.Popen(self._arguments, env=self._env)

    @property
    def pid(self) -> int:
        if self._child is None:
            raise RuntimeError("the command was not started")
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def returncode(self) -> int | None:
        return None if self._child is None else self._child.poll()

    def kill(self) -> None:
        """Raises NeverFired when it had ended by itself."""
        if not self.alive or self._child is None:
            raise NeverFired("kill: the command had ended before")
        self._child.kill()
        self._child.wait(STOP_SECONDS)

    def stop(self) -> None:
        """In order, by force when that takes too long."""
        if self._child is None or not self.alive:
            return
        self._child.send_signal(signal.SIGCONT)
        self._child.terminate()
        try:
            self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(STOP_SECONDS)


def _becomes(check: Callable[[], bool]) -> bool:
    end = time.monotonic() + STATE_SECONDS
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True
