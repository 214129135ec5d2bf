"""The first load of a file happens in a child process that may crash, hang or eat memory without harm to serving.

The child gets one JSON request on standard input, bounds itself, loads the file, checks it against the manifest and the
golden outputs, and answers one line of JSON. Half of a corpus of damaged ONNX files loads and runs without complaint, and
native crashes are on record: hence a process, and hence the golden outputs.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from pathlib import Path

import msgspec

from models.contract import bind, check_golden, load_golden
from models.engines import EngineOptions, get_engine
from models.errors import ContractBreach, NotReady, PackageError
from models.manifest import Manifest, Variant

MAX_ANSWER_BYTES = 64 * 1024
"""Most of a child's output that is read: the file under test may make it print."""
_KEEP_ENV = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "SYSTEMROOT", "VIRTUAL_ENV")
"""All that the child gets of the environment: it runs a stranger's file and needs no secrets."""
_CRASHES = {signal.SIGSEGV, signal.SIGILL, signal.SIGFPE}
"""Deaths that the file itself causes. SIGKILL may be the system short of memory, SIGABRT an allocation that failed."""


class ProbeLimits(msgspec.Struct, frozen=True):
    """What a child may use. `memory_bytes`: address space beside five times the file's size (the frameworks alone may
    map 1 GB). `cpu_seconds`, `wall_seconds`: the largest model we ship needs under one of each."""

    memory_bytes: int = 2 << 30
    cpu_seconds: int = 30
    wall_seconds: float = 60.0


class ProbeRequest(msgspec.Struct, frozen=True):
    """What to try: the file at `path` as `variant` of `manifest`, against the golden arrays at `golden`."""

    path: str
    golden: str
    variant: Variant
    manifest: Manifest
    options: EngineOptions
    limits: ProbeLimits


class Verdict(msgspec.Struct, frozen=True):
    """`reason` is empty when the file keeps its promise. `final`: trying again would give the same."""

    ok: bool
    reason: str = ""
    final: bool = True


async def probe(request: ProbeRequest) -> Verdict:
    """Try a file in a child. Never raises for what the file does.

    Raises NotReady when the child could not be started or did not finish: that says nothing about the file.
    """
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "models.serving.probe",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env=_environment(), limit=MAX_ANSWER_BYTES,
        )  # fmt: skip
    except OSError as error:
        raise NotReady(f"no process could be started to probe the file: {error}") from error
    try:
        answer = await asyncio.wait_for(_converse(child, msgspec.json.encode(request)), request.limits.wall_seconds)
    except TimeoutError:
        return Verdict(False, f"the probe was stopped after {request.limits.wall_seconds:g} s", final=False)
    finally:
        await _reap(child)
    return _judge(answer, child.returncode)


async def _converse(child: asyncio.subprocess.Process, request: bytes) -> bytes:
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(request)
        await child.stdin.drain()
        child.stdin.close()
    except (BrokenPipeError, ConnectionResetError):
        pass  # it died early: its exit status says how
    try:
        answer = await child.stdout.readline()
    except ValueError:
        answer = b""  # more than MAX_ANSWER_BYTES without a line end
    await child.wait()
    return answer


async def _reap(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        try:
            child.kill()
        except ProcessLookupError:
            pass  # ended between the two lines
        await asyncio.wait_for(child.wait(), timeout=5.0)


def _judge(answer: bytes, status: int | None) -> Verdict:
    if status == 0:
        try:
            return msgspec.json.decode(answer, type=Verdict)
        except msgspec.MsgspecError:
            return Verdict(False, "the probe gave no readable answer", final=False)
    if status is not None and status < 0:
        killer = signal.Signals(-status)
        if killer is signal.SIGXCPU:
            return Verdict(False, "the probe used up its processor time", final=False)
        return Verdict(False, f"the file killed the probe with {killer.name}", final=killer in _CRASHES)
    return Verdict(False, f"the probe ended with status {status}", final=False)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEEP_ENV if name in os.environ}
    # The child must import this very package, whatever its working folder holds.
    path = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def try_variant(request: ProbeRequest) -> Verdict:
    """In the child: load, check the interface, run the golden inputs, compare."""
    manifest, variant = request.manifest, request.variant
    try:
        golden = load_golden(Path(request.golden), manifest)
        session = get_engine(variant.engine).load(Path(request.path), request.options)
        check_golden(bind(session, manifest.inputs, manifest.outputs), manifest, golden, variant.tolerance)
    except MemoryError:
        return Verdict(False, "the file needs more memory than a probe may use", final=False)
    except ContractBreach as error:
        # An allocation refused today may be granted on a machine with less to do.
        return Verdict(False, str(error), final="alloc" not in str(error))
    except PackageError as error:
        return Verdict(False, str(error), final=False)
    return Verdict(True)


def _bound(limits: ProbeLimits, file_bytes: int) -> None:
    memory = limits.memory_bytes + 5 * file_bytes
    for which, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_FSIZE, 0, 0),
    ):
        ceiling = resource.getrlimit(which)[1]
        top = hard if ceiling == resource.RLIM_INFINITY else min(hard, ceiling)
        resource.setrlimit(which, (min(soft, top), top))


def main() -> int:
    """Read a ProbeRequest from standard input, write a Verdict to standard output."""
    # Frameworks print: only the verdict may reach the parent.
    answers = os.dup(1)
    os.dup2(2, 1)
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=ProbeRequest)
    _bound(request.limits, Path(request.path).stat().st_size)
    os.write(answers, msgspec.json.encode(try_variant(request)) + b"\n")
    return 0


if __name__ == "__main__":
    # Native teardown is skipped: a crash in it would say nothing about the file's answers.
    code = main()
    os._exit(code)
