"""`tierline launch`: starts the version of the software that is current, and the one before it when that does not hold.

It belongs to what was installed by hand and no update touches it. It needs no network, and no answer from anybody: what it
goes by is on the disk (`sync.slots`). A version on trial goes back when it ends `MAX_BOOTS` times, when it has not proved
itself within a time, or when its slot is broken.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from sync.errors import StoreFailed
from sync.slots import (
    BASE_VARIABLE,
    HEALTHY_SECONDS,
    HEALTHY_VARIABLE,
    INHERIT_VARIABLE,
    ROOT_VARIABLE,
    Slot,
    Slots,
    SlotState,
    booted,
    rolled_back,
)

STOP_SECONDS = 40.0
"""After which a node that was told to end is killed: it gives itself 30."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between the end of a node and its next start; doubled while ends follow each other, jittered."""
CALM_SECONDS = 60.0
"""A node that ran this long ended for a reason of its own: the pauses start anew."""
POLL_SECONDS = 0.1


@dataclass
class Launcher:
    """`command`: what follows `python -m tierline`. `trial_seconds`: within which a version must have proved itself."""

    slots: Slots
    command: Sequence[str]
    trial_seconds: float = 600.0
    healthy_seconds: float = HEALTHY_SECONDS
    inherit: bool = False
    say: Callable[[str], None] = lambda text: print(f"tierline launch: {text}", file=sys.stderr, flush=True)
    _stopping: bool = field(default=False, init=False)
    _child: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def run(self) -> int:
        """Until told to stop, or a version that has proved itself ends by itself. Returns its exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        pause = FIRST_PAUSE
        while True:
            state = self._begin()
            began = time.monotonic()
            code = self._once(state)
            switched = self._switched(state)
            if self._told_to_stop() or (code == 0 and state.confirmed and not switched):
                return code
            if switched:
                pause = FIRST_PAUSE
                continue
            if time.monotonic() - began > CALM_SECONDS:
                pause = FIRST_PAUSE
            self.say(f"{name_of(state)} ended with {code}; it is started again in about {pause:g} s")
            self._wait(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
            pause = min(2 * pause, LONGEST_PAUSE)
            if self._told_to_stop():
                return code

    def _switched(self, state: SlotState) -> bool:
        """Whether another version is current than the one that has just ended."""
        with suppress(StoreFailed):
            return self.slots.read().current != state.current
        return False

    def _told_to_stop(self) -> bool:
        return self._stopping

    def _begin(self) -> SlotState:
        """Count the start on the disk before it happens."""
        try:
            before = self.slots.read()
            state = booted(before)
            if state.current is not None and not state.confirmed and not self._holds(state.current):
                state = rolled_back(state, "its slot holds no software any more")
            if state != before:
                self.slots.write(state)
        except StoreFailed as error:
            # A version that serves beats a count that is exact: what was installed by hand is always there.
            self.say(f"{error}; starting the software this was installed with")
            return SlotState()
        if state.last and state.last != before.last:
            self.say(f"went back to {name_of(state)}: {state.last}")
        return state

    def _holds(self, slot: Slot) -> bool:
        with suppress(StoreFailed):
            return self.slots.python(slot).exists()
        return False

    def _once(self, state: SlotState) -> int:
        python = self._python(state)
        self._child = subprocess.Popen([python, "-m", "tierline", *self.command], env=self._environment(state))
        deadline = None if state.confirmed else time.monotonic() + self.trial_seconds
        while (code := self._child.poll()) is None:
            if self._told_to_stop():
                return self._end()
            if deadline is not None and time.monotonic() > deadline:
                if self.slots.read().confirmed:
                    deadline = None
                    continue
                code = self._end()
                self._go_back(f"it had not proved itself within {self.trial_seconds:g} s")
                return code
            time.sleep(POLL_SECONDS)
        return code

    def _python(self, state: SlotState) -> str:
        if state.current is None:
            return sys.executable
        try:
            return str(self.slots.python(state.current))
        except StoreFailed as error:
            self.say(f"{error}; starting the software this was installed with")
            return sys.executable

    def _go_back(self, reason: str) -> None:
        state = self.slots.read()
        # One that lacked nothing but a connection may be innocent: the network is at fault too.
        self.slots.write(rolled_back(state, reason, passing=state.healthy))
        self.say(f"went back: {reason}")

    def _environment(self, state: SlotState) -> Mapping[str, str]:
        environment = {**os.environ, ROOT_VARIABLE: str(self.slots.root), BASE_VARIABLE: sys.executable}
        environment[HEALTHY_VARIABLE] = str(self.healthy_seconds)
        if self.inherit:
            environment[INHERIT_VARIABLE] = "1"
        if state.current is not None:
            # What lies in the working folder or on a path of the shell must not stand in for what was verified.
            for name in ("PYTHONPATH", "PYTHONHOME"):
                environment.pop(name, None)
            environment |= {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}
        return environment

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _end(self) -> int:
        """End the node in order, and by force when it does not."""
        assert self._child is not None
        self._child.terminate()
        try:
            return self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < end:
            time.sleep(POLL_SECONDS)


def name_of(state: SlotState) -> str:
    if state.current is None:
        return "the software this was installed with"
    return f"{state.current.version} in slot {state.current.name}"


def launch(argv: Sequence[str]) -> int:
    """`tierline launch --slots FOLDER edge CONFIG`."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="tierline launch",
        description="Run a node whose own software the hub may upgrade, and go back when a version does not hold.",
    )
    parser.add_argument("--slots", type=Path, required=True, metavar="FOLDER", help="where versions are installed")
    parser.add_argument(
        "--trial-seconds",
        type=float,
        default=600.0,
        help="within which a version must have proved itself (default 600)",
    )
    parser.add_argument(
        "--healthy-seconds",
        type=float,
        default=HEALTHY_SECONDS,
        help=f"how long it must hold for that (default {HEALTHY_SECONDS:g})",
    )
    parser.add_argument(
        "--inherit", action="store_true", help="versions use the dependencies installed here, where they bring none"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="edge CONFIG")
    options = parser.parse_args(argv)
    if not options.command:
        parser.error("say what to start, such as: edge node.toml")
    launcher = Launcher(
        Slots(options.slots.resolve()),
        options.command,
        trial_seconds=options.trial_seconds,
        healthy_seconds=options.healthy_seconds,
        inherit=options.inherit,
    )
    try:
        return launcher.run()
    except (OSError, StoreFailed) as error:
        print(f"tierline launch: {error}", file=sys.stderr)
        return 2
