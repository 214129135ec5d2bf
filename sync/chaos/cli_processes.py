"""The faults of `tierline chaos` that happen to a process. Each raises NeverFired, Unsupported or OSError."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from sync.chaos import processes
from sync.chaos.clock_jump import JumpingClock, find_libfaketime
from sync.chaos.disk import SmallDisk
from sync.chaos.events import say
from sync.chaos.faults import NeverFired
from sync.chaos.processes import Command

POLL_SECONDS = 0.05


def pause(options: argparse.Namespace) -> None:
    _insist_alive(options.pid)
    time.sleep(options.after)
    _insist_alive(options.pid)
    with processes.paused(options.pid):
        say("fault began", fault="pause", pid=options.pid)
        began = time.monotonic()
        time.sleep(options.duration)
    say("fault ended", fault="pause", pid=options.pid, seconds=round(time.monotonic() - began, 3), fired=True)


def kill(options: argparse.Namespace) -> None:
    _insist_alive(options.pid)
    time.sleep(options.after)
    processes.kill(options.pid)
    say("fault began", fault="kill", pid=options.pid, fired=True)


def restart(options: argparse.Namespace) -> None:
    command = Command(options.command)
    command.start()
    say("command started", pid=command.pid)
    try:
        _while_alive(command, options.after)
        pid = command.pid
        command.kill()
        say("fault began", fault="broker-restart", pid=pid)
        time.sleep(options.duration)
        command.start()
        say("fault ended", fault="broker-restart", pid=command.pid, seconds=options.duration, fired=True)
        _calm_after(command, options.then)
        if not command.alive:
            raise NeverFired(f"broker-restart: the command did not stay up, exit code {command.returncode}")
    finally:
        command.stop()


def clock_jump(options: argparse.Namespace) -> None:
    library = None if options.hook else find_libfaketime()
    if library is None and not options.hook:
        print(
            "tierline chaos clock-jump: libfaketime is not installed (apt-get install faketime): only Tierline's own clock "
            "jumps, not what OpenSSL or another program reads",
            file=sys.stderr,
        )
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as folder,
        JumpingClock(Path(folder), options.command, library=library) as clock,
    ):
        say("command started", pid=clock.command.pid, how=clock.how)
        _while_alive(clock.command, options.after)
        clock.jump(options.by)
        say("fault began", fault="clock-jump", by=options.by)
        _while_alive(clock.command, options.duration)
        clock.insist()
        clock.jump(0.0)
        say("fault ended", fault="clock-jump", seconds=options.duration, fired=True)
        _calm_after(clock.command, options.then)


def disk_full(options: argparse.Namespace) -> None:
    with SmallDisk(Path(options.folder), options.command, options.size) as disk:
        say("command started", pid=disk.command.pid, folder=options.folder, size=options.size)
        _while_alive(disk.command, max(options.after, 2 * POLL_SECONDS))
        disk.fill()
        say("fault began", fault="disk-full")
        _while_alive(disk.command, options.duration)
        disk.free()
        say("fault ended", fault="disk-full", seconds=options.duration, fired=True)
        _calm_after(disk.command, options.then)


def _while_alive(command: Command, seconds: float) -> None:
    """`seconds`, or until the command ends."""
    end = time.monotonic() + seconds
    while command.alive and time.monotonic() < end:
        time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))


def _calm_after(command: Command, seconds: float) -> None:
    """A signal is now no interruption but the wanted end."""
    with suppress(KeyboardInterrupt):
        _while_alive(command, seconds)


def _insist_alive(pid: int) -> None:
    if not processes.alive(pid):
        raise NeverFired(f"there is no process {pid}")
