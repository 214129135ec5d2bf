"""Load from `h2load`, CPU time and memory of a process tree from /proc, and where processes may run."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

H2LOAD_SECONDS = 120
PILOT_SECONDS = 0.3
MIN_REQUESTS = 200
MIN_DATA_SHARE = 0.9
"""Of the answer's bytes that every answer must bring: over gRPC a failure has status 200 too, but no body."""


class Load(NamedTuple):
    """What a server is asked, over and over. `unix`: through this socket. `http2`: gRPC; else HTTP/1.1. `answer_bytes`: of the
    body of a good answer, 0 = not checked."""

    url: str
    headers: Sequence[str]
    body: bytes
    unix: Path | None = None
    http2: bool = False
    answer_bytes: int = 0


class Times(NamedTuple):
    """Latencies in microseconds."""

    p50: float
    p99: float


class Burst(NamedTuple):
    """A closed loop's outcome. `rate`: answers per second. `server_us`: CPU of the server's tree per request, microseconds.
    `client_share`: of one core, that the load generator used."""

    rate: float
    server_us: float
    client_share: float


# --- where processes run -------------------------------------------------------------------------------------------------


def cores() -> tuple[set[int], set[int]] | None:
    """A core for the server and one for its clients; None where there is one core only."""
    usable = sorted(os.sched_getaffinity(0))
    return ({usable[0]}, {usable[1]}) if len(usable) > 1 else None


@contextmanager
def apart(pid: int, *others: int) -> Iterator[None]:
    """While this lasts a server's tree has one core; this process with whatever it starts, and the trees of `others`, have
    another."""
    split = cores()
    if split is None:
        yield
        return
    everywhere = os.sched_getaffinity(0)
    _pin(pid, split[0])
    for other in others:
        _pin(other, split[1])
    os.sched_setaffinity(0, split[1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, everywhere)
        for each in (pid, *others):
            _pin(each, everywhere)


@contextmanager
def on_server_core() -> Iterator[None]:
    """This thread in the server's place."""
    split = cores()
    everywhere = os.sched_getaffinity(0)
    try:
        if split is not None:
            os.sched_setaffinity(0, split[0])
        yield
    finally:
        os.sched_setaffinity(0, everywhere)


def _pin(pid: int, cpus: set[int]) -> None:
    for each in tree(pid):
        for task in Path(f"/proc/{each}/task").iterdir():
            os.sched_setaffinity(int(task.name), cpus)


# --- processes -----------------------------------------------------------------------------------------------------------


def tree(pid: int) -> set[int]:
    """A process, all below it, and all of its session: a server may have put its workers elsewhere in the tree."""
    return set(_below(pid)) | {each for each in _processes() if _session(each) == pid}


def _below(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in _read(children).split():
            yield from _below(int(child))


def _processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def cpu_seconds(pid: int) -> float:
    """On-CPU time of every thread of the tree (first field of schedstat, nanoseconds)."""
    files = (file for each in tree(pid) for file in Path(f"/proc/{each}/task").glob("*/schedstat"))
    return sum(int((_read(file) or "0").split()[0]) for file in files) / 1e9


def pss_megabytes(pid: int) -> float:
    """Proportional set size of the tree: memory with shared pages counted once."""
    found = (re.search(r"Pss:\s+(\d+) kB", _read(Path(f"/proc/{each}/smaps_rollup"))) for each in tree(pid))
    return sum(int(match[1]) for match in found if match) / 1024


# --- closed loops --------------------------------------------------------------------------------------------------------


def enough(load: Load, *, connections: int, seconds: float) -> int:
    """How many requests take about so long."""
    requests = max(2 * connections, 20)
    for _ in range(2):
        rate = run_h2load(load, connections=connections, requests=requests)
        requests = max(int(rate * PILOT_SECONDS), requests)
    return max(int(rate * seconds), 4 * connections, MIN_REQUESTS)


def burst(pid: int, load: Load, *, connections: int, requests: int) -> Burst:
    """Ask so often over so many connections, one request in flight on each."""
    before, client = cpu_seconds(pid), _children_seconds()
    rate = run_h2load(load, connections=connections, requests=requests)
    spent = (cpu_seconds(pid) - before) / requests * 1e6
    return Burst(rate, spent, (_children_seconds() - client) * rate / requests)


def latencies(load: Load, *, requests: int, connections: int = 1) -> Times:
    """A C client's view."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        run_h2load(load, connections=connections, requests=requests, more=[f"--log-file={log}"])
        # Each line: start time, status, microseconds.
        return quantiles([int(line.split()[2]) for line in log.read_text().splitlines()])


def quantiles(values: Sequence[float]) -> Times:
    ordered = sorted(values)
    return Times(ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100])


def run_h2load(load: Load, *, connections: int, requests: int, more: Sequence[str] = ()) -> float:
    """Send exactly `requests`; every one must be answered well. Returns answers per second."""
    with tempfile.NamedTemporaryFile() as body:
        body.write(load.body)
        body.flush()
        command = h2load_command(load, Path(body.name), connections=connections, requests=requests)
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=H2LOAD_SECONDS, check=True)
    good = re.search(r"status codes: (\d+) 2xx", done.stdout)
    traffic = re.search(r"\((\d+)\) data", done.stdout)
    rate = re.search(r"finished in .*, ([\d.]+) req/s", done.stdout)
    if good is None or traffic is None or rate is None or int(good[1]) != requests:
        raise RuntimeError(f"not every request to {load.url} was answered:\n{done.stdout}")
    if int(traffic[1]) < MIN_DATA_SHARE * load.answer_bytes * requests:
        raise RuntimeError(f"answers of {load.url} were shorter than the one that was checked:\n{done.stdout}")
    return float(rate[1])


def h2load_command(load: Load, body: Path, *, connections: int, requests: int) -> list[str]:
    headers = [part for header in load.headers for part in ("-H", header)]
    counts = ["-c", str(connections), "-t", "1", "-n", str(requests)]
    protocol = [] if load.http2 else ["--h1"]
    # h2load wants the socket's path absolute.
    unix = ["-B", f"unix:{load.unix.resolve()}"] if load.unix else []
    return ["h2load", *protocol, *counts, *unix, "-d", str(body), *headers, load.url]


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
