"""The front of the metadata child: started when asked, killed when late, started again when it died. Blocking; no tuf here.

Why a child: importing python-tuf costs 16 MB and 0.8 s, and what it parses comes from strangers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from threading import Lock, Timer
from typing import BinaryIO, cast

from sync.errors import Absent, Malformed, SyncError, Unavailable
from sync.tuf_messages import Answer, Ask, Get, Got, read_frame, write_frame

ASK_SECONDS = 300.0
"""One refresh with all its transfers, which have limits of their own."""
STOP_SECONDS = 5.0
STARTS = 2
"""A child that ended while idle is met at the next question: that one is asked again, once."""


class TufProcess:
    """One question at a time, from any thread."""

    def __init__(self, *, seconds: float = ASK_SECONDS) -> None:
        self._seconds = seconds
        self._turn = Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the child that runs now."""
        child = self._child
        return None if child is None or child.poll() is not None else child.pid

    def ask(self, ask: Ask, get: Callable[[str, int], bytes]) -> Answer:
        """The child's answer. `get(path, limit)` brings a metadata file, raising Absent or a SyncError.

        Raises Unavailable when the child dies, is late, or talks nonsense.
        """
        with self._turn:
            for attempt in range(STARTS):
                fresh = self.pid is None
                answer = self._ask(ask, get)
                if answer is not None:
                    return answer
                if fresh or attempt == STARTS - 1:
                    break
        raise Unavailable("the metadata child died or was too slow")

    def close(self) -> None:
        """Kill the child. A question under way fails."""
        self._closed = True
        self._end(self._child)

    def _ask(self, ask: Ask, get: Callable[[str, int], bytes]) -> Answer | None:
        if self._closed:
            raise Unavailable("closed")
        child = self._running()
        late = Timer(self._seconds, child.kill)
        late.daemon = True
        late.start()
        try:
            return _talk(child, ask, get)
        except (OSError, ValueError):
            return None
        finally:
            late.cancel()
            if child.poll() is not None or self._closed:
                self._end(child)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._end(self._child)
            command = [sys.executable, "-P", "-m", "sync.tuf_child"]
            try:
                self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            except OSError as error:
                raise Unavailable(f"the metadata child did not start: {error}") from error
        return self._child

    @staticmethod
    def _end(child: subprocess.Popen[bytes] | None) -> None:
        if child is None:
            return
        child.kill()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return
        for stream in (child.stdin, child.stdout):
            try:
                cast(BinaryIO, stream).close()
            except OSError:
                pass  # what was buffered for it is of no use any more


def _talk(child: subprocess.Popen[bytes], ask: Ask, get: Callable[[str, int], bytes]) -> Answer | None:
    outgoing, incoming = cast(BinaryIO, child.stdin), cast(BinaryIO, child.stdout)
    write_frame(outgoing, ask)
    while True:
        message = read_frame(incoming, Get | Answer)  # type: ignore[arg-type]
        if message is None or isinstance(message, Answer):
            if message is None:
                child.kill()
            return message
        write_frame(outgoing, _got(message, get))


def _got(wanted: Get, get: Callable[[str, int], bytes]) -> Got:
    try:
        return Got(get(wanted.path, wanted.limit))
    except Absent as error:
        return Got(code=Absent.code, text=str(error)[:500])
    except Malformed as error:
        return Got(code=Malformed.code, text=str(error)[:500])
    except SyncError as error:
        return Got(code=Unavailable.code, text=str(error)[:500])
