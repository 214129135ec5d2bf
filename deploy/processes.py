"""Starting and stopping the processes of one deployment, each with its own log file, each ended by its own id."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

STOP_SECONDS = 8.0
"""How long a process may take to stop in order before it is killed."""
POLL_SECONDS = 0.02
LOG_TAIL = 15


class DeployError(Exception):
    """Something did not start, or not in time. The message says what, and shows the end of its log."""


class Process:
    """One child. `name` labels it in messages; its standard error goes to `log`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        talk: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._out: IO[bytes] = log.open("ab")
        pipe = subprocess.PIPE if talk else None
        self._child = subprocess.Popen(
            command,
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or self._out,
            stderr=self._out,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._child.poll()

    def ask(self, line: bytes) -> bytes:
        """Write one line to its standard input, read one line back. For processes started with `talk`."""
        assert self._child.stdin is not None and self._child.stdout is not None
        answer = b""
        with suppress(BrokenPipeError):
            self._child.stdin.write(line + b"\n")
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        if not answer:
            raise DeployError(f"{self.name} ended\n{self.tail()}")
        return answer

    def pause(self) -> None:
        self._child.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._child.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self._child.kill()
        self._child.wait(STOP_SECONDS)
        self._close()

    def stop(self) -> None:
        """End it in order, and by force when it does not."""
        if self.alive:
            self.resume()
            self._child.terminate()
            try:
                self._child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait(STOP_SECONDS)
        self._close()

    def hang_up(self) -> None:
        """Tell it to reread its configuration."""
        self._child.send_signal(signal.SIGHUP)

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        return "\n".join(f"    {line}" for line in [f"end of {self.log}:", *lines])

    def _close(self) -> None:
        for stream in (self._child.stdin, self._child.stdout, self._out):
            if stream is not None:
                with suppress(OSError):  # what was meant for a process that is dead cannot be delivered
                    stream.close()


def tierline(*arguments: str) -> list[str]:
    """The command line that runs `tierline` with this very interpreter."""
    return [sys.executable, "-m", "tierline", *arguments]


def wait_until(what: str, check: Callable[[], bool], timeout: float, process: Process | None = None) -> None:
    """Return once `check()` is true. Raises DeployError after `timeout` seconds, or when `process` ends."""
    end = time.monotonic() + timeout
    while not check():
        if process is not None and not process.alive:
            raise DeployError(f"{process.name} ended before: {what}\n{process.tail()}")
        if time.monotonic() > end:
            raise DeployError(f"not within {timeout:g} s: {what}" + (f"\n{process.tail()}" if process else ""))
        time.sleep(POLL_SECONDS)


def announced(process: Process, path: Path, timeout: float = 60.0) -> Mapping[str, object]:
    """What `process` announced in `path` (its URL and more). A file left by an earlier run is not taken for it."""
    found: dict[str, object] = {}

    def read() -> bool:
        try:
            found.update(json.loads(path.read_text()))
        except (FileNotFoundError, ValueError):
            return False
        return found.get("pid") == process.pid

    wait_until(f"{process.name} is up", read, timeout, process)
    return found


def free_port() -> int:
    """A loopback TCP port that was free a moment ago, for programs that cannot choose one themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
