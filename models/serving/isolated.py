"""A session in a process of its own: a file that crashes, hangs or eats memory there costs one request, not the server.

Tensors travel over a socket pair, so a run costs about 0.15 ms more than in this process, and as much again for 200 KB. The
child starts with the session, ends with it or with this process, and is started again, at growing intervals, when it died.
"""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from models.engines import EngineOptions
from models.errors import ContractBreach, EngineFailure, InvalidRequest, NotReady
from models.serving.confine import environment
from models.serving.isolated_child import Interface, Start
from models.serving.isolated_wire import BrokenFrame, Frame, receive, send
from models.tensor import Array

END_SECONDS = 5.0
"""How long a killed process may take to be gone."""
FIRST_DELAY_SECONDS = 0.5
MAX_DELAY_SECONDS = 30.0
QUIET_SECONDS = 300.0
"""After this long without a death the next one counts as the first."""
MAX_REASON = 500
"""Characters of the child's message that are kept."""


class IsolationLimits(msgspec.Struct, frozen=True):
    """`memory_bytes`: address space beside five times the file's size. `start_seconds`: for the process to start and load.
    `run_seconds`: longest silence during a run, above whatever the caller enforces with `stop`."""

    memory_bytes: int = 2 << 30
    start_seconds: float = 60.0
    run_seconds: float = 120.0


class Backoff:
    """When a child that died may be started again: at once, then after 0.5 s, doubled each time up to 30 s, +-50 %."""

    def __init__(self, clock: Callable[[], float], jitter: Callable[[], float]) -> None:
        """`jitter`: a number in 0..1."""
        self._clock = clock
        self._jitter = jitter
        self._deaths = 0
        self._last = self._due = clock()

    def died(self) -> None:
        now = self._clock()
        self._deaths = 1 if now - self._last > QUIET_SECONDS else self._deaths + 1
        delay = (
            0.0 if self._deaths == 1 else min(FIRST_DELAY_SECONDS * 2.0 ** min(self._deaths - 2, 16), MAX_DELAY_SECONDS)
        )
        self._last, self._due = now, now + delay * (0.5 + self._jitter())

    def left(self) -> float:
        """Seconds until the next start, 0 = now."""
        return max(self._due - self._clock(), 0.0)


class IsolatedSession:
    """`Session` in a child process. Runs take turns; `run` blocks, so it is never for an event loop's thread.

    The outputs belong to the caller. `run` raises NotReady, beside a session's errors, while a child that died more than
    once may not be started yet.
    """

    serial = True

    def __init__(
        self,
        path: Path,
        engine: str,
        options: EngineOptions | None = None,
        limits: IsolationLimits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Start the process and load the file there: blocks. Raises ContractBreach, or NotReady when it may work later."""
        self._limits = limits or IsolationLimits()
        self._start = Start(str(path.resolve()), engine, options or EngineOptions(), self._limits.memory_bytes)
        self._backoff = Backoff(clock, jitter)
        self._turn = threading.Lock()
        # Guards the three below against `stop` and `close`, which do not wait for their turn.
        self._state = threading.Lock()
        self._running = self._stopped = self._closed = False
        self._child: _Child | None = _Child(self._start, self._limits)
        self.inputs, self.outputs = self._child.interface.inputs, self._child.interface.outputs

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Outputs in the order asked for, () = all. Raises EngineFailure, InvalidRequest, NotReady."""
        names = tuple(outputs) or tuple(spec.name for spec in self.outputs)
        with self._turn:
            child = self._ready_child()
            with self._state:
                self._running, self._stopped = True, False
            try:
                frame, answers = child.ask(inputs, names)
            except (BrokenFrame, OSError) as error:
                raise self._ended(child, error) from error
            finally:
                with self._state:
                    self._running = False
        if frame.error == "request":
            raise InvalidRequest(frame.reason[:MAX_REASON])
        if frame.error:
            raise EngineFailure(frame.reason[:MAX_REASON])
        return [answers[name] for name in names]

    def stop(self) -> bool:
        """Kill the process if a run is under way; the next run starts another."""
        with self._state:
            if self._running and self._child is not None:
                self._stopped = True
                self._child.kill()
        return True

    def close(self) -> None:
        """End the process."""
        with self._state:
            self._closed = True
            child, self._child = self._child, None
        if child is not None:
            child.end()

    def _ready_child(self) -> _Child:
        """The child, started again if it has died. Raises EngineFailure or NotReady."""
        if self._closed:
            raise EngineFailure("the session is closed")
        if self._child is not None and self._child.has_ended():
            self._drop(self._child)
        if self._child is not None:
            return self._child
        wait = self._backoff.left()
        if wait > 0:
            raise NotReady(f"the model's process has died and is started again in {wait:.1f} s")
        try:
            child = _Child(self._start, self._limits)
        except (ContractBreach, NotReady) as error:
            self._backoff.died()
            raise EngineFailure(f"the model's process did not start again: {error}") from error
        with self._state:
            self._child = None if self._closed else child
        if self._child is None or (child.interface.inputs, child.interface.outputs) != (self.inputs, self.outputs):
            self._drop(child)
            raise EngineFailure("the session is closed" if self._closed else "the model's file has changed")
        return child

    def _ended(self, child: _Child, error: Exception) -> EngineFailure:
        with self._state:
            stopped = self._stopped
        if not stopped and isinstance(error, TimeoutError):
            how = f"the run was stopped after {self._limits.run_seconds:g} s"
            self._drop(child)
        else:
            how = self._drop(child)
        return EngineFailure("the run was stopped" if stopped else how)

    def _drop(self, child: _Child) -> str:
        """End a child that is no more use. Returns what it died of."""
        with self._state:
            if self._child is child:
                self._child = None
        self._backoff.died()
        return child.end()


class _Child:
    """One process with the file loaded. Raises ContractBreach for a file that it refuses, NotReady for any other end."""

    def __init__(self, start: Start, limits: IsolationLimits) -> None:
        self._stream, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "models.serving.isolated_child", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, env=environment(), process_group=0,
                )  # fmt: skip
            except OSError as error:
                self._stream.close()
                raise NotReady(f"no process could be started for the model: {error}") from error
        try:
            self.interface = self._load(start, limits)
        except BaseException:
            self.end()
            raise
        self._stream.settimeout(limits.run_seconds)

    def _load(self, start: Start, limits: IsolationLimits) -> Interface:
        self._stream.settimeout(limits.start_seconds)
        try:
            send(self._stream, {}, reason=msgspec.json.encode(start).decode())
            frame, _ = receive(self._stream)
            said = msgspec.json.decode(frame.reason, type=Interface)
        except TimeoutError as error:
            raise NotReady(f"the file was not loaded within {limits.start_seconds:g} s") from error
        except (BrokenFrame, OSError, msgspec.MsgspecError) as error:
            raise NotReady(f"the file was not loaded: {self.end()}") from error
        if said.error:
            raise (ContractBreach if said.final else NotReady)(said.error[:MAX_REASON])
        return said

    def ask(self, inputs: Mapping[str, Array], names: Sequence[str]) -> tuple[Frame, dict[str, Array]]:
        """Raises BrokenFrame, OSError."""
        send(self._stream, inputs, names)
        frame, answers = receive(self._stream)
        if not frame.error and not all(name in answers for name in names):
            raise BrokenFrame("outputs are missing")
        return frame, answers

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str:
        """Kill it if it still lives; returns how it ended. Calling twice is harmless."""
        self._stream.close()
        if not self._exited():
            self._process.kill()
            self._process.wait(END_SECONDS)
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self._process.returncode
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"the model's process died ({how})"

    def _exited(self) -> bool:
        """One that has closed its stream is on its way out: how it ends by itself is worth a moment."""
        try:
            self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            return False
        return True
