"""A listening Unix socket: nobody gets in before its mode is set, a dead server's file is replaced, a live one's is not."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ANSWER_SECONDS = 1.0
"""How long whoever may own the path gets to accept; a live server does at once."""


@contextmanager
def unix_socket(path: Path, mode: int) -> Iterator[socket.socket]:
    """A socket bound to `path`, not listening yet; its file is removed at the end. Raises OSError saying where and why."""
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            sock.bind(os.fspath(path))
            # Nobody can connect before it listens: there is no moment with another mode.
            path.chmod(mode)
        except OSError as error:
            raise _cannot(path, error.strerror or str(error), error.errno) from error
        made = _identity(path)
        try:
            yield sock
        finally:
            # Another server may have put its own in this place.
            with suppress(FileNotFoundError):
                if _identity(path) == made:
                    path.unlink()
    finally:
        sock.close()


def _remove_stale(path: Path) -> None:
    """Remove a socket's file that nobody answers at. Raises OSError when somebody does, or when it is no socket."""
    try:
        if not stat.S_ISSOCK(path.stat(follow_symlinks=False).st_mode):
            raise _cannot(path, "there is a file here that is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_SECONDS)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            # A full backlog or another user's socket: somebody lives here.
            raise _cannot(path, error.strerror or str(error), error.errno) from error
    raise _cannot(path, "another server answers here")


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat(follow_symlinks=False)
    return found.st_dev, found.st_ino


def _cannot(path: Path, reason: str, number: int | None = None) -> OSError:
    return OSError(number, f"cannot listen on {path}: {reason}")
