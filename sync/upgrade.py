"""A node's own software as a document: built into the free slot, tried there, switched to, proved by itself or taken back.

    plan -> fetch -> prepare: build and try the free slot -> commit: switch on the disk, end the process in good order
         -> the launcher starts the new version -> it proves itself: confirmed | it does not: the launcher goes back

Meets `sync.activation.Activator` for documents of kind `software`. The process that commits is never the one that judges.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from msgspec.structs import replace

from sync.clock import Clock
from sync.errors import Rejected, StoreFailed, Unavailable
from sync.slot_builder import SlotBuilder
from sync.slots import (
    BASE_VARIABLE,
    HEALTHY_SECONDS,
    HEALTHY_VARIABLE,
    INHERIT_VARIABLE,
    ROOT_VARIABLE,
    Slot,
    Slots,
    SlotState,
    confirmed,
    switched,
)
from sync.software import decode_software, name_of

POLL_SECONDS = 1.0
LINGER_SECONDS = 1.0
"""Between the switch and the end of the process: the report of it gets out."""

log = logging.getLogger(__name__)


class Upgrade:
    """`builder`: None = this node was not started by the launcher and refuses software. `restart()` ends the process, so that
    the launcher starts what is current then."""

    def __init__(
        self,
        builder: SlotBuilder | None,
        clock: Clock,
        *,
        restart: Callable[[], None],
        healthy_seconds: float = HEALTHY_SECONDS,
    ) -> None:
        self._builder = builder
        self._clock = clock
        self._restart = restart
        self._healthy_seconds = healthy_seconds
        self._connected: Callable[[], bool] | None = None
        self._serves: Callable[[], bool] = lambda: False
        self._restarting: asyncio.Task[None] | None = None

    def plan(self, body: bytes, capabilities: Mapping[str, object]) -> Sequence[str]:
        """The wheels, unless this very software runs. Raises Malformed naming the field, Rejected for what was given up."""
        software = decode_software(body)
        state, name = self._slots().read(), name_of(software)
        if _runs(state, name):
            return ()
        if name in state.given_up:
            raise Rejected(f"{software.version} was taken back: {state.given_up[name]}")
        return tuple(wheel.digest for wheel in software.wheels)

    async def prepare(self, body: bytes, blobs: Mapping[str, Path]) -> object:
        """A slot that was built and tried; or the current one, when it is this. Raises Malformed, Rejected, NotNow."""
        software = decode_software(body)
        slots, name = self._slots(), name_of(software)
        state = await asyncio.to_thread(slots.read)
        if _runs(state, name):
            return state.current
        if self._connected is None:
            raise NotNow(f"{software.version} is not what runs here")  # a node that starts must not wait for a build
        # One on trial is neither built over nor left alone; one that only lacked the broker is tried when that is there.
        while not state.confirmed or (name in state.tries and not self._connected()):
            await self._clock.sleep(POLL_SECONDS)
            state = await asyncio.to_thread(slots.read)
        assert self._builder is not None
        try:
            return await self._builder.build(slots.free(state), software, blobs)
        except (StoreFailed, Unavailable) as error:
            raise NotNow(str(error)) from error

    async def commit(self, token: object) -> None:
        """Switch, and end this process soon. Nothing when the slot is the one this runs from. Raises StoreFailed."""
        if not isinstance(token, Slot):
            raise TypeError("expected what prepare returned")
        slots = self._slots()
        state = await asyncio.to_thread(slots.read)
        if state.current == token:
            return
        connected = self._connected is not None and self._connected()
        changed = switched(state, token, connected=connected, served=self._serves())
        await asyncio.to_thread(slots.write, changed)
        log.warning("switching to version %s in slot %s", token.version, token.name)
        self._restarting = asyncio.create_task(self._restart_soon(), name="software restart")

    async def _restart_soon(self) -> None:
        await self._clock.sleep(LINGER_SECONDS)
        self._restart()

    async def discard(self, token: object) -> None:
        """The slot is built anew next time."""

    def verdict(self) -> str:
        """The launcher takes back what is bad, while this does not run: here a version is good, or on trial."""
        try:
            proved = self._builder is None or self._builder.slots.read().confirmed
        except StoreFailed as error:
            return f"undecided: {error}"
        return "good" if proved and self._restarting is None else "undecided: on trial"

    def settled(self) -> None:
        """Nothing was kept for the probation."""

    def joined(self, connected: Callable[[], bool], serves: Callable[[], bool]) -> None:
        """The node is up, from the disk; from here on slots may be built. `connected`: whether the broker is reached;
        `serves`: whether any model is."""
        self._connected, self._serves = connected, serves

    async def prove(self) -> None:
        """Confirm the version this runs from, once it did for a while what the one before it could: serve, reach the broker.

        Returns when there is nothing to prove (any more). A broker that is away is waited for, until the launcher's time is up.
        """
        if self._builder is None:
            return
        since, proved = self._clock.monotonic(), False
        while not proved:
            try:
                since, proved = await self._look(self._builder.slots, since)
            except StoreFailed as error:
                log.warning("the version on trial cannot prove itself: %s", error)
            await self._clock.sleep(POLL_SECONDS)

    async def _look(self, slots: Slots, since: float) -> tuple[float, bool]:
        """(since when it has been well, monotonic seconds; whether nothing is left to prove)."""
        state, now = await asyncio.to_thread(slots.read), self._clock.monotonic()
        if state.confirmed:
            return since, True
        if self._connected is None or (state.served and not self._serves()):
            return now, False
        if now - since < self._healthy_seconds:
            return since, False
        if state.connected and not self._connected():
            if not state.healthy:
                await asyncio.to_thread(slots.write, replace(state, healthy=True))
            return since, False
        await asyncio.to_thread(slots.write, confirmed(state))
        log.warning("version %s proved itself", state.current.version if state.current else "")
        return since, True

    def _slots(self) -> Slots:
        if self._builder is None:
            raise Rejected("this node's software is not upgraded from here: it was not started by 'tierline launch'")
        return self._builder.slots


class NotNow(Rejected):
    """Time must pass, or a disk get room: to be tried again."""

    transient = True


def _runs(state: SlotState, name: str) -> bool:
    return state.current is not None and state.current.software == name


def upgrade_from(environment: Mapping[str, str], probe: Sequence[str], clock: Clock) -> Upgrade:
    """What the launcher said in `environment`; without one, software is refused. `probe`: as `SlotBuilder` takes it."""
    root, base = environment.get(ROOT_VARIABLE), environment.get(BASE_VARIABLE)
    if not root or not base:
        return Upgrade(None, clock, restart=end_process)
    builder = SlotBuilder(Slots(Path(root)), base, inherit=INHERIT_VARIABLE in environment, probe=tuple(probe))
    seconds = float(environment.get(HEALTHY_VARIABLE, HEALTHY_SECONDS))
    return Upgrade(builder, clock, restart=end_process, healthy_seconds=seconds)


@asynccontextmanager
async def proving(upgrade: Upgrade) -> AsyncIterator[None]:
    """Let the version that runs prove itself while the block lasts."""
    task = asyncio.create_task(upgrade.prove(), name="software on trial")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def end_process() -> None:
    """In good order, as a supervisor would."""
    os.kill(os.getpid(), signal.SIGTERM)
