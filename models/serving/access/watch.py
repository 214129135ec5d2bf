"""Files that may change while a server runs: looked at when somebody asks, at most once a second. No thread, no timer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

LOOK_SECONDS = 1.0

Signature = tuple[object, ...]


class Watch:
    """Tells when `paths` (files, or folders of PEM files) are no longer what they were.

    `due`: monotonic seconds before which `changed` need not be asked.
    """

    def __init__(self, paths: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.watch(paths)

    def watch(self, paths: Sequence[Path]) -> None:
        """From here on these, as they are now. To be called before they are read, so that no change is missed."""
        self.paths = tuple(paths)
        self._seen: Signature | None = self._look()
        self.due = self._clock() + LOOK_SECONDS

    def look_again(self) -> None:
        """What was found could not be used: say that it has changed at the next look too."""
        self._seen = None

    def changed(self) -> bool:
        """Whether anything has changed since this last said so."""
        now = self._clock()
        if now < self.due:
            return False
        self.due = now + LOOK_SECONDS
        seen = self._look()
        if seen == self._seen:
            return False
        self._seen = seen
        return True

    def _look(self) -> Signature:
        return tuple(signature(path) for path in self.paths)


def signature(path: Path) -> Signature:
    """Differs when the file, or one of the PEM files in the folder, does."""
    # Followed through links: a mounted Kubernetes secret changes by a link that is pointed elsewhere.
    try:
        found = path.stat()
        whole = (found.st_ino, found.st_mtime_ns, found.st_size)
        if path.is_dir():
            return (whole, *((file.name, signature(file)) for file in sorted(path.glob("*.pem"))))
    except OSError as error:
        return (error.errno,)
    return whole
