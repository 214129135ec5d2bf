"""The metadata child: reads an Ask, answers, ends by itself when nobody asks for a while. See `sync.tuf_process`.

It has no network and no credentials, little memory and little time: hostile metadata can cost it its life and nobody else's.
"""

from __future__ import annotations

import os
import resource
import select
import sys
from typing import BinaryIO

from sync.errors import Absent, Malformed, Unavailable
from sync.tuf_client import answer
from sync.tuf_messages import Ask, Get, Got, read_frame, write_frame

IDLE_SECONDS = 30.0
"""Without a question for so long it ends: its memory is worth more than the 0.8 s of its next start."""
MEMORY_BYTES = 256 << 20
"""Address space; a refresh takes 50."""
CPU_SECONDS = 60
"""In the life of one child. A refresh takes 0.05."""


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Unbuffered below: what select does not see must not sit in a buffer of ours.
    incoming = os.fdopen(os.dup(0), "rb", buffering=0)
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print of some library must not end up between two messages
    reader = _Whole(incoming)
    while select.select([incoming], [], [], IDLE_SECONDS)[0]:
        ask = read_frame(reader, Ask)  # type: ignore[arg-type]
        if ask is None:
            break
        write_frame(outgoing, answer(ask, lambda path, limit: _get(reader, outgoing, path, limit)))
    return 0


def _get(reader: _Whole, outgoing: BinaryIO, path: str, limit: int) -> bytes:
    write_frame(outgoing, Get(path, limit))
    got = read_frame(reader, Got)  # type: ignore[arg-type]
    if got is None:
        sys.exit(0)  # the parent is gone
    if got.code == Absent.code:
        raise Absent(got.text)
    if got.code == Malformed.code:
        raise Malformed(got.text)
    if got.code:
        raise Unavailable(got.text)
    return got.data


class _Whole:
    """Reads exactly what is asked for, and nothing beyond it."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw

    def read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self._raw.read(count - len(data))
            if not piece:
                break
            data += piece
        return bytes(data)


if __name__ == "__main__":
    sys.exit(main())
