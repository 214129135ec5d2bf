"""The first load of a file happens in a child process that may crash, hang or eat memory without harm to serving.

The child (`probe_start`, `probe_child`) gets JSON on standard input, bounds itself, loads the file, checks it against what its
manifest promises, runs it, and answers one line of JSON. Half of a corpus of damaged ONNX files loads and runs without
complaint, and native crashes are on record: hence a process, and hence the golden outputs. It is no sandbox: a file that takes
the child over can read what this user may read, and answer for itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from models.engines import EngineOptions
from models.errors import NotReady
from models.manifest import Blob, Manifest, Variant
from models.serving.confine import environment
from models.serving.probe_child import ProbeLimits, ProbeRequest, Verdict

__all__ = ["ProbeLimits", "ProbeRequest", "Verdict", "file_request", "probe", "probe_files", "try_in_turn"]

MAX_ANSWER_BYTES = 64 * 1024
"""Most of a line of a child's output that is read: the file under test may make it print."""
SHARED_SECONDS = 10.0
"""How long one file may hold up a child that has others to try; beyond it, it is tried again by itself."""
MAX_CHILDREN = 2
"""Children at once: each may use a core and the memory of the limits."""
REAP_SECONDS = 5.0
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
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "models.serving.probe_start",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env=environment(), limit=MAX_ANSWER_BYTES,
        )  # fmt: skip
    except OSError as error:
        raise NotReady(f"no process could be started to probe the file: {error}") from error
    answers: list[Verdict] = []
    try:
        await asyncio.wait_for(_send(child, msgspec.json.encode(list(requests))), patience)
        for request in requests:
            seconds = min(patience, request.limits.wall_seconds)
            answers.append(await asyncio.wait_for(_answer(child), seconds))
        await asyncio.wait_for(child.wait(), patience)
    except TimeoutError:
        return answers, Verdict(False, f"the probe was stopped after {patience:g} s", final=False)
    except msgspec.MsgspecError:
        if await _ended(child) == 0:
            return answers, Verdict(False, "the probe gave no readable answer", final=False)
    finally:
        await _reap(child)
    return answers, _ending(child.returncode)


async def _send(child: asyncio.subprocess.Process, request: bytes) -> None:
    assert child.stdin is not None
    try:
        child.stdin.write(request)
        await child.stdin.drain()
        child.stdin.close()
    except (BrokenPipeError, ConnectionResetError):
        pass  # it died early: its exit status says how


async def _answer(child: asyncio.subprocess.Process) -> Verdict:
    """The next verdict. Raises MsgspecError when there is none to read."""
    assert child.stdout is not None
    try:
        line = await child.stdout.readline()
    except ValueError:
        line = b""  # more than MAX_ANSWER_BYTES without a line end
    return msgspec.json.decode(line, type=Verdict)


async def _ended(child: asyncio.subprocess.Process) -> int | None:
    """Its exit status, which follows the end of its output at once; None when it stays."""
    try:
        return await asyncio.wait_for(child.wait(), REAP_SECONDS)
    except TimeoutError:
        return None


async def _reap(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        try:
            child.kill()
        except ProcessLookupError:
            pass  # ended between the two lines
        await asyncio.wait_for(child.wait(), REAP_SECONDS)


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
