"""Load from `h2load`, CPU time and memory of a process tree from /proc."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

H2LOAD_SECONDS = 60


class Load(NamedTuple):
    """What a server is asked, over and over."""

    url: str
    headers: Sequence[str]
    body: bytes


class Times(NamedTuple):
    """Latencies in microseconds."""

    p50: float
    p99: float


def tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from tree(int(child))


def cpu_seconds(pid: int) -> float:
    """On-CPU time of every thread of the tree (first field of schedstat, nanoseconds)."""
    files = (file for each in tree(pid) for file in Path(f"/proc/{each}/task").glob("*/schedstat"))
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def pss_megabytes(pid: int) -> float:
    """Proportional set size of the tree: memory with shared pages counted once."""
    found = (re.search(r"Pss:\s+(\d+) kB", Path(f"/proc/{each}/smaps_rollup").read_text()) for each in tree(pid))
    return sum(int(match[1]) for match in found if match) / 1024


def cpu_per_request(pid: int, load: Load, *, connections: int, requests: int) -> float:
    """Server CPU microseconds per request under closed-loop load."""
    before = cpu_seconds(pid)
    run_h2load(load, connections=connections, requests=requests)
    return (cpu_seconds(pid) - before) / requests * 1e6


def latencies(load: Load, *, requests: int) -> Times:
    """Latencies at one connection, a C client's view."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        run_h2load(load, connections=1, requests=requests, more=[f"--log-file={log}"])
        # Each line: start time, status, microseconds.
        durations = sorted(int(line.split()[2]) for line in log.read_text().splitlines())
    return Times(durations[len(durations) // 2], durations[len(durations) * 99 // 100])


def run_h2load(load: Load, *, connections: int, requests: int, more: Sequence[str] = ()) -> None:
    """Send exactly `requests`; every one must be answered with a 2xx."""
    with tempfile.NamedTemporaryFile() as body:
        body.write(load.body)
        body.flush()
        headers = [part for header in load.headers for part in ("-H", header)]
        counts = ["-c", str(connections), "-t", "1", "-n", str(requests)]
        command = ["h2load", "--h1", *counts, "-d", body.name, *headers, *more, load.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=H2LOAD_SECONDS, check=True)
    match = re.search(r"status codes: (\d+) 2xx", done.stdout)
    if match is None or int(match[1]) != requests:
        raise RuntimeError(f"not every request was answered:\n{done.stdout}")
