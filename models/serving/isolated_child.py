"""The child process of an `IsolatedSession`: one file, one run at a time, nothing of the parent's but a socket.

Standard input is a pipe that only the parent holds and never writes to: the kernel ends this process when it closes.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sys
from pathlib import Path

import msgspec

from models.engines import EngineOptions, Session, get_engine
from models.errors import EngineFailure, InvalidRequest, PackageError, TierlineError
from models.serving.confine import bound, memory_for
from models.serving.isolated_wire import BrokenFrame, receive, send
from models.tensor import TensorSpec


class Start(msgspec.Struct, frozen=True):
    """What the child is to load, and the address space it may use."""

    path: str
    engine: str
    options: EngineOptions
    memory_bytes: int


class Interface(msgspec.Struct, frozen=True):
    """What the child says once: the file's tensors, or why it cannot be loaded. `final`: trying again gives the same."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    error: str = ""
    final: bool = True


def die_with_parent() -> None:
    """Let the kernel end this process, also in the midst of native code, once the parent has gone.

    Not PR_SET_PDEATHSIG, which follows the thread that started us; engine threads come and go.
    """
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    # Gone before the signal was asked for.
    if select.select([0], [], [], 0)[0]:
        os._exit(1)


def main(descriptor: int) -> None:
    """Say what the file is, then answer frames until the stream closes."""
    die_with_parent()
    stream = socket.socket(fileno=descriptor)
    frame, _ = receive(stream)
    start = msgspec.json.decode(frame.reason, type=Start)
    bound(memory_for(start.engine, Path(start.path), start.memory_bytes))
    try:
        session = get_engine(start.engine).load(Path(start.path), start.options)
    except (TierlineError, MemoryError) as error:
        lasting = isinstance(error, PackageError) and "alloc" not in str(error)
        said = Interface(error=str(error) or "out of memory", final=lasting)
        send(stream, {}, reason=msgspec.json.encode(said).decode())
        return
    said = Interface(tuple(session.inputs), tuple(session.outputs))
    send(stream, {}, reason=msgspec.json.encode(said).decode())
    while True:
        _answer(stream, session)


def _answer(stream: socket.socket, session: Session) -> None:
    frame, inputs = receive(stream)
    names = frame.outputs or tuple(spec.name for spec in session.outputs)
    try:
        outputs = session.run(inputs, names)
    except InvalidRequest as error:
        send(stream, {}, error="request", reason=str(error))
    except (EngineFailure, MemoryError) as error:
        send(stream, {}, error="engine", reason=str(error) or "out of memory")
    else:
        send(stream, dict(zip(names, outputs, strict=True)))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except (BrokenFrame, OSError):
        pass  # the parent has gone, or has closed the session
    os._exit(0)
