"""A command whose disk is full for a while.

The command runs in a mount namespace of its own, in which its folder is a small tmpfs holding a copy of what was there; the
disk is full while a ballast file fills it. Nothing of the true folder is ever written, and all of it vanishes with the
command. It takes root or user namespaces (unshare(1)); where neither is allowed, `Unsupported` says so.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sync.chaos.faults import NeverFired
from sync.chaos.processes import Command

BALLAST = ".chaos-ballast"
BLOCK = 64 * 1024
SMALL_BLOCK = 512
PROBE_SECONDS = 10.0
_MOUNT = (
    'mount --bind "$1" "$2" && mount -t tmpfs -o "size=$3,mode=0700" tmpfs "$1" && cp -a "$2/." "$1/" && umount "$2"'
)
_RUN = f'{_MOUNT} && cd "$4" && shift 4 && exec "$@"'


class Unsupported(Exception):
    """This machine does not let us do it. The message says what is missing."""


def namespace() -> list[str]:
    """The command that gives what follows it a mount namespace of its own. Raises Unsupported."""
    if shutil.which("unshare") is None:
        raise Unsupported("disk-full needs unshare (util-linux)")
    plain, mapped = ["unshare", "--mount", "--"], ["unshare", "--user", "--map-root-user", "--mount", "--"]
    for way in (plain, mapped):
        test = [*way, "sh", "-c", "mount -t tmpfs tmpfs /tmp"]
        if subprocess.run(test, capture_output=True, timeout=PROBE_SECONDS, check=False).returncode == 0:
            return way
    raise Unsupported("disk-full needs root or user namespaces: this machine allows neither to mount a file system")


class SmallDisk:
    """`with SmallDisk(folder, command, size) as disk:`, then `disk.fill()` and `disk.free()`. `size`: bytes.

    Raises Unsupported, and OSError when the command does not start.
    """

    def __init__(self, folder: Path, command: Sequence[str], size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.resolve()
        way = namespace()
        self._aside = Path(tempfile.mkdtemp(prefix="chaos-"))
        arguments = ["sh", "-c", _RUN, "sh", str(self._folder), str(self._aside), str(size), os.getcwd(), *command]
        self.command = Command([*way, *arguments])

    def __enter__(self) -> Self:
        self.command.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.command.stop()
        self._aside.rmdir()

    @property
    def inside(self) -> Path:
        """The small disk, as seen from here."""
        return Path(f"/proc/{self.command.pid}/root{self._folder}")

    def fill(self) -> None:
        """Not one byte is left afterwards. Raises NeverFired when the command ended, or its disk is not there yet."""
        self._insist_mounted()
        with (self.inside / BALLAST).open("ab", buffering=0) as ballast:
            for block in (BLOCK, SMALL_BLOCK):
                _fill(ballast.fileno(), block)
        self.insist()

    def free(self) -> None:
        """Raises NeverFired when the command ended meanwhile."""
        self.insist()
        (self.inside / BALLAST).unlink()

    def insist(self) -> None:
        """Raises NeverFired unless the command lives and its disk is full."""
        if not self.command.alive:
            raise NeverFired("disk-full: the command had ended before")
        if os.statvfs(self.inside).f_bavail:
            raise NeverFired("disk-full: the disk was not full the whole time")

    def _insist_mounted(self) -> None:
        if (
            not self.command.alive
            or not self.inside.is_dir()
            or self.inside.stat().st_dev == self._folder.stat().st_dev
        ):
            raise NeverFired("disk-full: the command had ended before, or its disk was not ready yet")


def _fill(descriptor: int, block: int) -> None:
    while True:
        try:
            if os.write(descriptor, b"\0" * block) == 0:
                return
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return
