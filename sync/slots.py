"""Two places on the disk for the node's own software, and one small file that says which of them is started.

    <root>/slots.json     which slot is current, how often it was started before it proved itself, what was given up
    <root>/a, <root>/b    virtual environments; the one that is not current may be built anew
    <root>/wheels         what the slot under construction is installed from

The launcher (`deploy.launcher`) counts a start here before it starts anything, the node confirms itself here. Only one of
them writes at a time: the launcher while no node runs. slots.json is replaced whole, so a power cut leaves the old or the
new one. `None` as a slot is the software the launcher itself was installed with: it is never changed, and always there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from sync.durable import write_whole
from sync.errors import StoreFailed
from sync.schema import refuse_later

FORMAT = 1
NAMES = ("a", "b")
STATE_FILE = "slots.json"
WHEELS = "wheels"
ROOT_VARIABLE, BASE_VARIABLE, INHERIT_VARIABLE = "TIERLINE_SLOTS", "TIERLINE_BASE_PYTHON", "TIERLINE_SLOTS_INHERIT"
"""What the launcher tells the node: where the slots are, which interpreter builds them, whether they see its packages."""
HEALTHY_VARIABLE = "TIERLINE_HEALTHY_SECONDS"
HEALTHY_SECONDS = 30.0
"""How long a version on trial must be healthy before it counts as proved."""
MAX_STATE_BYTES = 64 * 1024
MAX_BOOTS = 3
"""Starts of a version that has not proved itself; the next one starts the version before it."""
MAX_TRIES = 3
"""Trials of one version that may end without it ever having reached the broker: its own fault, or the network's."""
MAX_GIVEN_UP = 16
MAX_REASON = 300


class Slot(msgspec.Struct, frozen=True):
    """`name`: a or b. `software`: digest of the statement it was built from."""

    name: str
    version: str
    software: str


class SlotState(msgspec.Struct, frozen=True, kw_only=True):
    """`boots`: starts of `current` since it was switched to. `confirmed`: it proved itself. `connected`, `served`: the broker
    was reached, models were served when it was switched to. `healthy`: it is, but for the broker. `tries`: by software,
    trials that ended for lack of a connection alone. `given_up`: software -> why it is not tried again here. `last`: why
    there was a way back."""

    format: int = FORMAT
    current: Slot | None = None
    previous: Slot | None = None
    boots: int = 0
    confirmed: bool = True
    connected: bool = False
    served: bool = False
    healthy: bool = False
    tries: dict[str, int] = {}
    given_up: dict[str, str] = {}
    last: str = ""


# --- decisions, pure ------------------------------------------------------------------------------------------------


def switched(state: SlotState, slot: Slot, *, connected: bool, served: bool) -> SlotState:
    """`slot` becomes current, on trial. `connected`, `served`: what it must be able to do as well.

    What has not proved itself is no place to go back to.
    """
    previous = state.current if state.confirmed else state.previous
    return msgspec.structs.replace(
        state,
        current=slot,
        previous=previous,
        boots=0,
        confirmed=False,
        connected=connected,
        served=served,
        healthy=False,
        last="",
    )


def confirmed(state: SlotState) -> SlotState:
    if state.current is None:
        return state
    tries = {software: count for software, count in state.tries.items() if software != state.current.software}
    return msgspec.structs.replace(state, confirmed=True, boots=0, tries=tries)


def booted(state: SlotState) -> SlotState:
    """A start, counted before it is tried; the state may say to start what was there before."""
    if state.confirmed:
        return state
    if state.boots >= MAX_BOOTS:
        return rolled_back(state, f"it ended {state.boots} times before it had proved itself")
    return msgspec.structs.replace(state, boots=state.boots + 1)


def rolled_back(state: SlotState, reason: str, *, passing: bool = False) -> SlotState:
    """The previous slot is current again. `passing`: the network may be at fault; it is given up after `MAX_TRIES` such."""
    bad = state.current
    if bad is None or state.confirmed:
        return state
    reason = reason[:MAX_REASON]
    tries, given_up = dict(state.tries), dict(state.given_up)
    count = tries.pop(bad.software, 0) + 1
    if passing and count < MAX_TRIES:
        tries[bad.software] = count
    else:
        given_up[bad.software] = reason
    return msgspec.structs.replace(
        state,
        current=state.previous,
        previous=None,
        boots=0,
        confirmed=True,
        tries=dict(list(tries.items())[-MAX_GIVEN_UP:]),
        given_up=dict(list(given_up.items())[-MAX_GIVEN_UP:]),
        last=f"{bad.version}: {reason}",
    )


# --- the disk -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slots:
    """The folder `root`. Raises StoreFailed when the disk refuses, or the file is of a later release."""

    root: Path

    def read(self) -> SlotState:
        path = self.root / STATE_FILE
        try:
            with path.open("rb") as file:
                data = file.read(MAX_STATE_BYTES + 1)
        except FileNotFoundError:
            return SlotState()
        except OSError as error:
            raise StoreFailed(f"{path}: {error.strerror}") from error
        try:
            refuse_later(str(path), msgspec.json.decode(data, type=_Stamp).format, FORMAT)
            state = msgspec.json.decode(data, type=SlotState)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise StoreFailed(f"{path}: {error}") from error
        for slot in (state.current, state.previous):
            if slot is not None and slot.name not in NAMES:
                raise StoreFailed(f"{path}: slot {slot.name[:20]!r} is none of {', '.join(NAMES)}")
        return state

    def write(self, state: SlotState) -> None:
        """On the disk when this returns."""
        path = self.root / STATE_FILE
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            write_whole(path, msgspec.json.encode(state), mode=0o644)
        except OSError as error:
            raise StoreFailed(f"{path}: {error.strerror}") from error

    def folder(self, name: str) -> Path:
        return self.root / name

    def python(self, slot: Slot) -> Path:
        """Its interpreter. Raises StoreFailed when there is none."""
        path = self.folder(slot.name) / "bin" / "python"
        if not path.exists():
            raise StoreFailed(f"{path}: slot {slot.name} holds no software any more")
        return path

    def free(self, state: SlotState) -> str:
        """The slot that may be built anew: neither current nor, while that one is on trial, what it goes back to."""
        used = {slot.name for slot in (state.current, None if state.confirmed else state.previous) if slot is not None}
        try:
            return next(name for name in NAMES if name not in used)
        except StopIteration:
            raise StoreFailed("both slots are in use until the version on trial has proved itself") from None


class _Stamp(msgspec.Struct, frozen=True):
    format: int = FORMAT
