"""A Redis or Valkey server of a test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


@contextmanager
def redis_process() -> Iterator[tuple[str, int]]:
    """(URL, process id) of a server on a Unix socket that keeps nothing on disk. Without a binary: skipped, in CI an error."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        if os.environ.get("CI"):
            raise RuntimeError("CI must have redis-server or valkey-server on PATH")
        pytest.skip("neither redis-server nor valkey-server is on PATH: the shared cache and job store are NOT tested")
    # A Unix socket's path must be short.
    with TemporaryDirectory(prefix="tl-") as folder:
        socket = Path(folder) / "s"
        options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no", "--dir", folder]
        process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 10
            while not socket.exists():
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.02)
            yield f"unix://{socket}", process.pid
        finally:
            process.kill()
            process.wait(10)
