"""Whether anybody opened a file meanwhile: inotify(7), which the standard library does not offer."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import Self

IN_ACCESS, IN_OPEN = 0x1, 0x20
MAX_READ = 64 * 1024


class Opened:
    """`with Opened(path) as opened:`, then `opened.seen()`. Raises OSError where inotify is not to be had."""

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(path), IN_OPEN | IN_ACCESS) < 0:
            number = ctypes.get_errno()
            if self._fd >= 0:
                os.close(self._fd)
            raise OSError(number, os.strerror(number), str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def seen(self) -> bool:
        """Whether it was opened or read since the last call."""
        try:
            return bool(os.read(self._fd, MAX_READ))
        except BlockingIOError:
            return False
