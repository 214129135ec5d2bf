"""A command whose clock jumps while it runs.

With libfaketime (Debian: apt-get install faketime) every program's clock jumps, OpenSSL's and python-tuf's too, and the
monotonic one with it: timers that run at that moment are over. Without it only the wall clock jumps, and only for what asks
`sync.clock.SystemClock`: Tierline's own code, through `TIERLINE_CLOCK_OFFSET_FILE`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from types import TracebackType
from typing import Self

from sync.chaos.faults import NeverFired
from sync.chaos.processes import Command
from sync.chaos.watch import Opened
from sync.clock import OFFSET_FILE

LIBRARIES = (
    "/usr/lib/*/faketime/libfaketime.so.1",
    "/usr/lib*/faketime/libfaketime.so.1",
    "/usr/local/lib/faketime/*.so.1",
)


def find_libfaketime() -> str | None:
    return next((found for pattern in LIBRARIES for found in sorted(glob(pattern))), None)


class JumpingClock:
    """`with JumpingClock(folder, command) as clock:` starts it at the true time; `clock.jump(seconds)` moves it.

    `library`: path of libfaketime, None = the environment hook of `sync.clock`. `folder`: for the file that holds the offset.
    """

    def __init__(self, folder: Path, command: Sequence[str], *, library: str | None = None) -> None:
        self._file = folder / "clock-offset"
        self._library = library
        self.by = 0.0
        self._write(0.0)
        self.command = Command(command, self._environment())
        self._opened = Opened(self._file)

    @property
    def how(self) -> str:
        return "libfaketime" if self._library else OFFSET_FILE

    def __enter__(self) -> Self:
        self.command.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.command.stop()
        self._opened.__exit__(kind, error, traceback)

    def jump(self, by: float) -> None:
        """From now on its clock is `by` seconds off. Raises NeverFired when the command had ended."""
        if not self.command.alive:
            raise NeverFired("clock-jump: the command had ended before")
        self._write(by)
        self._opened.seen()
        self.by = by

    def insist(self) -> None:
        """Raises NeverFired unless the clock was asked since the last jump."""
        if not self._opened.seen():
            raise NeverFired("clock-jump: nobody asked the clock while it was wrong")

    def _environment(self) -> dict[str, str]:
        if self._library is None:
            return {OFFSET_FILE: str(self._file)}
        preload = " ".join(filter(None, (self._library, os.environ.get("LD_PRELOAD"))))
        return {
            "LD_PRELOAD": preload,
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            # Its FAKETIME_DONT_FAKE_MONOTONIC would be wanted, but with it (0.9.10) Python's time.sleep fails with EINVAL.
        }

    def _write(self, by: float) -> None:
        # In place, because the watch is on the file and not on its name; always as long, so that no reader meets half a
        # number. libfaketime takes a number with a sign for seconds to add.
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, f"{by:+020.3f}\n".encode("ascii"), 0)
        finally:
            os.close(descriptor)
