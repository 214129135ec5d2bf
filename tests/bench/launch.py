"""Servers as processes of their own: ours by its real command, with tokens, limits and metrics on, and any other."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO, NamedTuple

from asking import Question, WrongAnswer, binary, check, load_of
from grpc import RpcError
from measure import Load, tree
from networks import Network

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
STOP_SECONDS = 10.0
LOG_TAIL = 2_000
ACCESS = """
keys = "keys"
open_loopback = false
max_in_flight = 4096
default_deadline_ms = 10000
[tenants.bench]
models = ["*"]
rate = 1e6
burst = 1000000
concurrency = 100000
"""
"""Every check is made, none refuses: what they cost is part of the figures."""


class NotStarted(Exception):
    """A server did not come up; the message ends with its last words."""


FAILURES = (NotStarted, RuntimeError, WrongAnswer, HTTPException, RpcError, OSError, subprocess.SubprocessError)
"""Of one server, or of what is measured with it: the run goes on without."""


class Running(NamedTuple):
    """`cold_seconds`: from the process's start to its first correct answer."""

    pid: int
    cold_seconds: float


@contextmanager
def started(
    command: Sequence[str | Path],
    ready: Callable[[], object],
    *,
    env: Mapping[str, str] | None = None,
    seconds: float = START_SECONDS,
) -> Iterator[Running]:
    """A server in a session of its own, from its first correct answer (`ready` returns) to the end of the block."""
    with tempfile.TemporaryFile() as log:
        begun = time.monotonic()
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**_environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait(process, ready, begun + seconds, log)
            yield Running(process.pid, time.monotonic() - begun)
        finally:
            _stop(process)


def stop_in_order() -> None:
    """Let SIGTERM end this program as Ctrl-C does: what it started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _environment() -> dict[str, str]:
    """This process's, but servers may keep what Python compiles: an installed one starts from compiled files, as those of
    the others' packages are."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _wait(process: subprocess.Popen[bytes], ready: Callable[[], object], ends: float, log: IO[bytes]) -> None:
    while True:
        try:
            ready()
        except (OSError, HTTPException, WrongAnswer, RpcError) as error:
            if process.poll() is None and time.monotonic() < ends:
                time.sleep(0.005)
                continue
            log.seek(0)
            words = log.read().decode(errors="replace")[-LOG_TAIL:]
            raise NotStarted(f"{error!r}\n{words}") from error
        else:
            return


def _stop(process: subprocess.Popen[bytes]) -> None:
    everyone = tree(process.pid)
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    left = everyone & tree(process.pid)
    for pid in left - {process.pid}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


# --- ours ----------------------------------------------------------------------------------------------------------------


class Tierline(NamedTuple):
    """A running `tierline serve`."""

    running: Running
    http: int
    grpc: int
    unix: Path
    token: str

    @property
    def pid(self) -> int:
        return self.running.pid

    def load(
        self,
        make: Callable[[Network], Question],
        network: Network,
        *,
        over_unix: bool = False,
        deadline_ms: int = 10_000,
    ) -> Load:
        """A load with this server's token and a deadline, checked without the deadline."""
        question = make(network).with_headers(f"authorization: Bearer {self.token}")
        deadline = f"grpc-timeout: {deadline_ms}m" if question.http2 else f"tierline-deadline-ms: {deadline_ms}"
        port = self.grpc if question.http2 else self.http
        load = load_of(question, network, port, self.unix if over_unix else None)
        return load._replace(headers=(*load.headers, deadline))


class Desk:
    """Where access files, keys, sockets and verdicts of one run lie."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self.access = folder / "access.toml"
        self.access.write_text(ACCESS)
        self.token = _token(folder)

    @contextmanager
    def serve(
        self, models: Path, first: Network, *options: str, guarded: bool = True, verdicts: str = "verdicts"
    ) -> Iterator[Tierline]:
        """`tierline serve` on free ports, gRPC and Unix socket included. `guarded`: tokens, limits and metrics."""
        self._count += 1
        ports = [free_port() for _ in range(3)]
        unix = self._folder / f"s{self._count}"
        command = [sys.executable, "-m", "tierline", "serve", models, "--http-port", str(ports[0])]
        command += ["--grpc-port", str(ports[1]), "--unix", unix, "--verdicts", self._folder / verdicts]
        if guarded:
            command += ["--access", self.access, "--metrics-port", str(ports[2])]
        question = binary(first).with_headers(f"authorization: Bearer {self.token}")
        with started([*command, *options], lambda: check(question, first, ports[0])) as running:
            yield Tierline(running, ports[0], ports[1], unix, self.token)


def _token(folder: Path) -> str:
    tool = [sys.executable, "-m", "tierline", "token"]
    pair = folder / "pair"
    subprocess.run([*tool, "new-key", str(pair)], cwd=ROOT, check=True, capture_output=True)
    (folder / "keys").mkdir()
    for public in pair.glob("*.pem"):
        shutil.copy(public, folder / "keys")
    (private,) = pair.glob("*.key")
    command = [*tool, "issue", "--key", str(private), "--client", "bench", "--tenant", "bench"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
