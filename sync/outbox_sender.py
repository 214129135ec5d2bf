"""Takes events from the outbox to the broker, and again until the hub acknowledges them. One task, no thread."""

from __future__ import annotations

import asyncio
import logging
import random

from sync.channel import LinkLike, spread
from sync.clock import Clock
from sync.errors import StoreFailed
from sync.outbox import Outbox
from sync.outbox_policy import Allowance, Uniform, packets
from sync.outbox_store import Waiting
from sync.topics import up

SWEEP_SECONDS = 60.0
"""How often the outbox looks for what has expired, while anything waits."""
TROUBLE_SECONDS = 5.0
"""Pause after the disk refused to be read."""

log = logging.getLogger(__name__)


class Sender:
    """`run` ends only by cancellation; nothing is published while the link is down."""

    def __init__(
        self, outbox: Outbox, link: LinkLike, node_id: str, clock: Clock, uniform: Uniform = random.uniform
    ) -> None:
        self._outbox = outbox
        self._link = link
        self._topic = up(node_id, "event")
        self._clock = clock
        self._uniform = uniform
        self._allowance = Allowance(clock.monotonic())
        self._wake = asyncio.Event()
        self._drained = False
        self._sweep_at = clock.monotonic() + SWEEP_SECONDS
        outbox.on_change = self._changed
        link.on_connect(self._connected)

    def hub_started(self) -> None:
        """The hub came back: what it missed is repeated soon instead of when its back-off ends."""
        self._outbox.flight.hasten(self._clock.monotonic())
        self._changed()

    def _connected(self) -> None:
        self._outbox.flight.postpone(self._clock.monotonic())
        self._changed()

    def _changed(self) -> None:
        self._drained = False
        self._wake.set()

    async def run(self) -> None:
        while True:
            self._wake.clear()
            try:
                if self._link.connected:
                    await self._send_due()
                    await self._send_new()
            except StoreFailed as error:
                log.warning("events wait: %s", error)
                await self._clock.sleep(TROUBLE_SECONDS * self._uniform(0.5, 1.5))
                continue
            except Exception:
                log.exception("events could not be sent")
                await self._clock.sleep(TROUBLE_SECONDS * self._uniform(0.5, 1.5))
                continue
            await self._rest()

    async def _send_due(self) -> None:
        flight = self._outbox.flight
        due = flight.due(self._clock.monotonic())
        if due and self._allowed:
            found = await self._outbox.fetch_again(due)
            flight.keep_only(due, (event.seq for event in found.events))
            self._publish(found)

    async def _send_new(self) -> None:
        flight = self._outbox.flight
        while not self._drained and flight.free and self._link.connected and self._allowed:
            self._drained = True  # before the look: what is put in meanwhile says so again
            found = await self._outbox.fetch(flight.free)
            if not found.events:
                return
            self._drained = False
            self._publish(found)

    def _publish(self, found: Waiting) -> None:
        flight = self._outbox.flight
        # Of the file they were read from: it may have been replaced since, by one with numbers of its own.
        made = packets(found.events, flight.lonely, boot=found.boot, starts=found.starts, low=found.low)
        for payload, events in made:
            self._link.publish(self._topic, payload, qos=1)
            self._allowance.spend(len(payload))
            flight.sent(events, self._clock.monotonic())

    @property
    def _allowed(self) -> bool:
        return self._allowance.wait(self._clock.monotonic()) == 0

    async def _rest(self) -> None:
        """Until something changes or something is due; without end when nothing waits."""
        now = self._clock.monotonic()
        if self._outbox.pending or self._outbox.unwritten:
            if now >= self._sweep_at:
                self._sweep_at = now + SWEEP_SECONDS + self._uniform(0.0, spread(self._outbox.flight.fleet))
                self._outbox.sweep()
            due = self._next_send(now) if self._link.connected else None
            until = self._sweep_at if due is None else min(due, self._sweep_at)
            await self._until_woken(max(until - now, 0.0))
        else:
            await self._wake.wait()

    def _next_send(self, now: float) -> float | None:
        flight = self._outbox.flight
        due = now if flight.free and not self._drained else flight.next_due()
        return None if due is None else max(due, now + self._allowance.wait(now))

    async def _until_woken(self, seconds: float) -> None:
        if self._wake.is_set():
            return
        timer = asyncio.ensure_future(self._clock.sleep(seconds))
        woken = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({timer, woken}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            woken.cancel()
