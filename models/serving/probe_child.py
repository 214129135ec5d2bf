"""The child process that tries files: JSON requests on standard input, a line with a verdict for each on standard output."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from models.contract import bind, check_golden, load_golden
from models.engines import EngineOptions, Session, get_engine
from models.errors import ContractBreach, EngineFailure, InvalidRequest, PackageError
from models.manifest import Manifest, Variant
from models.serving.confine import bound, bound_next, memory_for
from models.tensor import DTYPES, Array, TensorSpec

_PR_SET_PDEATHSIG = 1


class ProbeLimits(msgspec.Struct, frozen=True):
    """What a child may use. `memory_bytes`: address space beside five times the file's size (the frameworks alone may
    map 1 GB). `cpu_seconds`, `wall_seconds`: the largest model we ship needs under one of each."""

    memory_bytes: int = 2 << 30
    cpu_seconds: int = 30
    wall_seconds: float = 60.0


class ProbeRequest(msgspec.Struct, frozen=True):
    """What to try: the file at `path`, which is `variant` of `manifest`, against the golden arrays at `golden`.

    `manifest` None: the file need only load. `golden` None: it is run once on zeros instead, and may refuse them.
    """

    path: str
    golden: str | None
    variant: Variant
    manifest: Manifest | None
    options: EngineOptions
    limits: ProbeLimits


class Verdict(msgspec.Struct, frozen=True):
    """`reason` is empty when the file keeps its promise. `final`: trying again would give the same."""

    ok: bool
    reason: str = ""
    final: bool = True


def try_file(request: ProbeRequest) -> Verdict:
    """Load, check the interface, run, compare. In the child alone: the file may do anything."""
    try:
        _try(request)
    except MemoryError:
        return Verdict(False, "the file needs more memory than a probe may use", final=False)
    except ContractBreach as error:
        # An allocation refused today may be granted on a machine with less to do.
        return Verdict(False, str(error), final="alloc" not in str(error))
    except PackageError as error:
        return Verdict(False, str(error), final=False)
    return Verdict(True)


def _try(request: ProbeRequest) -> None:
    manifest, variant, options = request.manifest, request.variant, request.options
    if manifest is not None:
        options = replace(options, inputs=manifest.inputs, outputs=manifest.outputs)
    session = get_engine(variant.engine).load(Path(request.path), options)
    try:
        bound_session = session if manifest is None else bind(session, manifest.inputs, manifest.outputs)
        if manifest is not None and request.golden is not None:
            golden = load_golden(Path(request.golden), manifest)
            check_golden(bound_session, manifest, golden, variant.tolerance)
        else:
            _run_blank(bound_session)
    finally:
        session.close()


def _run_blank(session: Session) -> None:
    """Zeros need not be valid input (an index, say): only a crash, a hang or too much memory says something of the file."""
    try:
        session.run({spec.name: _blank(spec) for spec in session.inputs}, ())
    except (EngineFailure, InvalidRequest) as error:
        if "alloc" in str(error):
            raise MemoryError from error


def _blank(spec: TensorSpec) -> Array:
    shape = tuple(1 if dim == -1 else dim for dim in spec.shape)
    return np.full(shape, b"", np.object_) if spec.datatype == "BYTES" else np.zeros(shape, DTYPES[spec.datatype])


def die_with_parent() -> None:
    """Let the kernel end this process, also in the midst of native code, with the thread that started it: who else would
    bound a file that hangs without using the processor? Linux alone can."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    except (OSError, AttributeError):
        return


def main() -> None:
    """Try every request in turn, each within limits of its own."""
    die_with_parent()
    # Frameworks print: only verdicts may reach the parent.
    answers = os.dup(1)
    os.dup2(2, 1)
    requests = msgspec.json.decode(sys.stdin.buffer.read(), type=list[ProbeRequest])
    memory = [memory_for(each.variant.engine, Path(each.path), each.limits.memory_bytes) for each in requests]
    bound(max(memory))
    for request, limit in zip(requests, memory, strict=True):
        bound_next(limit, request.limits.cpu_seconds)
        os.write(answers, msgspec.json.encode(try_file(request)) + b"\n")


if __name__ == "__main__":
    main()
    # Native teardown is skipped: a crash in it would say nothing about the file's answers.
    os._exit(0)
