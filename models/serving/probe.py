"""The first load of a file happens in a child process that may crash, hang or eat memory without harm to serving.

The child (`probe_child`) gets JSON on standard input, bounds itself, loads the file, checks it against what its
manifest promises, runs it, and answers one line of JSON. Half of a corpus of damaged ONNX files loads and runs without
complaint, and native crashes are on record: hence a process, and hence the golden outputs. It is no sandbox: a file that takes
the child over can read what this user may read, and answer for itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer

import msgspec

from models.engines import EngineOptions
from models.errors import NotReady
from models.manifest import Blob, Manifest, Variant
from models.serving.aside import aside
from models.serving.confine import environment
from models.serving.cores import LOADING_NICE, give_way
from models.serving.probe_child import ProbeLimits, ProbeRequest, Verdict

__all__ = ["ProbeLimits", "ProbeRequest", "Verdict", "file_request", "probe", "probe_files", "try_in_turn"]

MAX_ANSWER_BYTES = 64 * 1024
"""Most of a line of a child's output that is read: the file under test may make it print."""
SHARED_SECONDS = 10.0
"""How long one file may hold up a child that has others to try; beyond it, it is tried again by itself."""
MAX_CHILDREN = 2
"""Children at once: each may use a core and the memory of the limits."""
REAP_SECONDS = 5.0
LINGER_SECONDS = 1.0
"""Between the end of its output and that of the child."""
_CRASHES = {signal.SIGSEGV, signal.SIGILL, signal.SIGFPE}
"""Deaths that the file itself causes. SIGKILL may be the system short of memory, SIGABRT an allocation that failed."""


def file_request(
    path: Path,
    engine: str,
    *,
    manifest: Manifest | None = None,
    options: EngineOptions | None = None,
    limits: ProbeLimits | None = None,
    digest: str = "",
) -> ProbeRequest:
    """For a file without golden arrays. Raises OSError.

    `digest`: `sha256:...` of all that is loaded with the file, "" = it stands alone: then it is read, 60 ms for each 100 MB.
    """
    if not digest:
        with path.open("rb") as file:
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    variant = Variant(engine, "", Blob(digest, path.stat().st_size))
    return ProbeRequest(str(path), None, variant, manifest, options or EngineOptions(), limits or ProbeLimits())


async def probe(request: ProbeRequest) -> Verdict:
    """Try one file in a child of its own. Never raises for what the file does.

    Raises NotReady when the child could not be started: that says nothing about the file.
    """
    answers, ending = await try_in_turn([request], request.limits.wall_seconds)
    return ending or answers[0]


async def probe_files(requests: Sequence[ProbeRequest]) -> list[Verdict]:
    """Try several files, in the order of `requests`; raises as `probe` does.

    One child tries all of them, since starting it is most of the work. Only "ok" counts from there: what is refused, and what
    is left when the child dies, is tried again in a child of its own, so that no file answers for another.
    """
    if len(requests) < 2:
        return [await probe(request) for request in requests]
    answers, _ = await try_in_turn(requests, SHARED_SECONDS)
    free = asyncio.Semaphore(MAX_CHILDREN)

    async def settle(index: int) -> Verdict:
        if index < len(answers) and answers[index].ok:
            return answers[index]
        async with free:
            return await probe(requests[index])

    return await asyncio.gather(*(settle(index) for index in range(len(requests))))


async def try_in_turn(requests: Sequence[ProbeRequest], patience: float) -> tuple[list[Verdict], Verdict | None]:
    """What one child answered, in the order of `requests`, and how it ended if that was not well.

    Fewer answers than requests: the first without one is what ended the child. `patience`: seconds, for each file.
    """
    child = _start()
    try:
        return await aside(lambda: _talk(child, requests, patience))
    finally:
        # Nobody waits any more, or it has ended: the thread takes it off the table.
        child.kill()


def _start() -> subprocess.Popen[bytes]:
    """A child that steps aside for whoever serves. In the loop, which it holds up for a millisecond: the interpreter is held
    until the child runs its own program, and a thread that gives way to others would hold it longer.

    Not by the loop, which forks: that copies the page tables of all this process has mapped, and stops gRPC's threads first.
    """
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "models.serving.probe_child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip
    except OSError as error:
        raise NotReady(f"no process could be started to probe the file: {error}") from error
    # From outside: starting the interpreter is half of the child's work.
    give_way(LOADING_NICE, child.pid)
    return child


def _talk(
    child: subprocess.Popen[bytes], requests: Sequence[ProbeRequest], patience: float
) -> tuple[list[Verdict], Verdict | None]:
    """In a thread: the whole conversation, to the end of the child."""
    assert child.stdin is not None
    assert child.stdout is not None
    answers: list[Verdict] = []
    with child.stdout, _Patience(child) as patient:
        with patient.at_most(patience), suppress(BrokenPipeError), child.stdin as pipe:
            pipe.write(msgspec.json.encode(list(requests)))
        for request in requests:
            with patient.at_most(min(patience, request.limits.wall_seconds)):
                line = child.stdout.readline(MAX_ANSWER_BYTES)
            try:
                answers.append(msgspec.json.decode(line, type=Verdict))
            except msgspec.MsgspecError:
                if not patient.lost and _ended(child) in (0, None):
                    return answers, Verdict(False, "the probe gave no readable answer", final=False)
                break
        else:
            with patient.at_most(patience):
                child.wait()
    if patient.lost:
        return answers, Verdict(False, f"the probe was stopped after {patience:g} s", final=False)
    return answers, _ending(child.returncode)


def _ended(child: subprocess.Popen[bytes]) -> int | None:
    """Its exit status, which follows the end of its output at once; None when it stays."""
    try:
        return child.wait(LINGER_SECONDS)
    except subprocess.TimeoutExpired:
        return None


class _Patience:
    """Ends a child that keeps its reader waiting. `lost`: that has happened. Left, it has been reaped."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self.lost = False

    def __enter__(self) -> _Patience:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait(REAP_SECONDS)

    @contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        timer = Timer(seconds, self._lose)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _lose(self) -> None:
        self.lost = True
        self._child.kill()


def _ending(status: int | None) -> Verdict | None:
    """What an exit status says of the file under test; None: nothing, the child went as it should."""
    if status == 0:
        return None
    if status is not None and status < 0:
        killer = signal.Signals(-status)
        if killer is signal.SIGXCPU:
            return Verdict(False, "the probe used up its processor time", final=False)
        return Verdict(False, f"the file killed the probe with {killer.name}", final=killer in _CRASHES)
    return Verdict(False, f"the probe ended with status {status}", final=False)
