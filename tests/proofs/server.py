"""A real `tierline serve` process for the proofs: started on free ports, watched from outside, stopped."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0
STOP_SECONDS = 30.0
SETTLE_SECONDS = 15.0
"""How long descriptors may take to go back to their level: a refused client is let go after two seconds."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Server:
    """`addresses`: "http", "grpc", "unix" and "metrics" -> where, as host:port or a path."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log
        self.addresses: dict[str, str] = {}

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def http(self) -> tuple[str, int]:
        host, _, port = self.addresses["http"].rpartition(":")
        return host, int(port)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def resident(self) -> int:
        """Bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE

    def resident_settled(self, seconds: float = 4.0) -> int:
        """Bytes: the lowest of readings over `seconds`, in which freed memory is given back."""
        lowest = self.resident()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.1)
            lowest = min(lowest, self.resident())
        return lowest

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def descriptors_settled(self, level: int) -> int:
        """Open descriptors, once they are back at `level` or have had the time for it."""
        end = time.monotonic() + SETTLE_SECONDS
        while (found := self.descriptors()) > level and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def complaints(self) -> list[str]:
        """Lines of the server's log that tell of something nobody expected; what grpc says of broken wire data is not."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if " ERROR tierline" in line or " ERROR asyncio" in line]


@contextmanager
def serving(folder: Path, *options: str, log: Path | None = None) -> Iterator[Server]:
    """Serve `folder` with every transport open; its log goes to `log`, by default beside the folder."""
    path = log or folder.with_suffix(".log")
    command = [sys.executable, "-m", "tierline", "serve", str(folder)]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", *options]
    with path.open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    server = Server(process, path)
    try:
        _read_addresses(server, 4 if "--unix" in options else 3)
        yield server
    finally:
        if server.is_alive():
            process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)
        assert process.stdout is not None
        process.stdout.close()


def _read_addresses(server: Server, count: int) -> None:
    stdout = server.process.stdout
    assert stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        assert selector.select(START_SECONDS), "the server printed nothing"
    while len(server.addresses) < count:
        line = stdout.readline()
        assert line, f"the server ended with code {server.process.wait(STOP_SECONDS)}: {server.log.read_text()}"
        what, _, url = line.strip().partition(" at ")
        kind, _, where = url.partition("://")
        server.addresses["metrics" if what == "metrics" else kind] = where.removesuffix("/metrics")
