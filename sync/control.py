"""The control plane of one node: what arrives goes to the updater it is for, what changes is reported, presence is told."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from uuid import uuid4

from sync import topics
from sync.channel import LinkLike, Message, Will
from sync.clock import Clock
from sync.errors import Malformed
from sync.messages import Capabilities, DocumentReport, HubState, Reported, State, decode, encode
from sync.updater import Updater

REPORT_GAP = 0.05
"""Seconds between two reports. A change of state goes out at once; those that follow on its heels share the next one."""
DESIRED, POLICY, SETTINGS, SOFTWARE = "desired", "policy", "settings", "software"

log = logging.getLogger(__name__)


def new_boot_id() -> str:
    """Names one run of the process: `seq` counts within it."""
    return uuid4().hex[:16]


def lost(node_id: str, boot: str) -> Will:
    """What the broker says when the node vanishes."""
    return Will(topics.up(node_id, "state"), encode(State(state="lost", boot=boot)))


class ControlPlane:
    """Level-triggered: everything it says is retained and said again after every connect and every start of the hub.

    `refused` counts by reason what arrived and was of no use; nothing that arrives can end it.
    """

    def __init__(
        self,
        link: LinkLike,
        node_id: str,
        updaters: Mapping[str, Updater],
        *,
        capabilities: Capabilities,
        running: Callable[[], dict[str, str]],
        clock: Clock,
        boot: str,
        groups: Iterable[str] = (),
        handlers: Mapping[str, Callable[[bytes], None]] | None = None,
        on_hub: Callable[[], None] | None = None,
        alarms: Callable[[], dict[str, str]] = dict,
    ) -> None:
        """`handlers`: what else takes payloads of `down/<leaf>`, by leaf; Malformed is counted, anything else logged.

        `on_hub` is called when the hub has started again, or is back. `alarms`: what is wrong, by name, asked for every report.
        """
        self.refused: Counter[str] = Counter()
        self._alarms = alarms
        self._link = link
        self._node_id = node_id
        self._updaters = updaters
        self._capabilities = capabilities
        self._running = running
        self._clock = clock
        self._boot = boot
        self._filters = topics.node_filters(node_id, groups)
        self._routes = {topics.down(node_id, kind): kind for kind in (DESIRED, SETTINGS, SOFTWARE)}
        self._routes[topics.tenant_policy(topics.tenant_of(node_id))] = POLICY
        self._handlers = {topics.down(node_id, leaf): handler for leaf, handler in (handlers or {}).items()}
        self._on_hub = on_hub
        self._seq = 0
        self._changed = asyncio.Event()
        self._hub_epoch = ""
        self._hub_ready = False

    def changed(self, kind: str, report: DocumentReport) -> None:
        """An updater's `on_report`."""
        self.say_again()

    def say_again(self) -> None:
        """Something a report tells of has changed."""
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled: then it says goodbye, so that nobody waits for the will."""
        self._link.subscribe(*self._filters)
        self._link.on_connect(self._announce)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive())
                tasks.create_task(self._report_changes())
        finally:
            if self._changed.is_set():
                self._say(self._reported(), "reported")  # what changed during the pause between two reports
            self._say(State(state="disconnected", boot=self._boot, at=self._clock.wall()), "state")

    def _announce(self) -> None:
        """Birth: on every connect, because the broker may have forgotten everything."""
        self._say(State(state="ready", boot=self._boot, at=self._clock.wall()), "state")
        self._say(self._capabilities, "caps")
        self._changed.set()

    async def _receive(self) -> None:
        async for message in self._link.messages():
            try:
                self._take(message)
            except Malformed as error:
                self._count(error.code, f"{message.topic}: {error}")
            except Exception:
                log.exception("a message on %s could not be handled", message.topic)
                self._count("error", message.topic)

    def _take(self, message: Message) -> None:
        kind = self._routes.get(message.topic)
        if kind in self._updaters and kind is not None:
            self._updaters[kind].offer(message.payload)
        elif message.topic in self._handlers:
            self._handlers[message.topic](message.payload)
        elif message.topic == topics.HUB_STATE:
            self._heed(decode(message.payload, HubState))
        else:
            self._count("unrouted", message.topic)

    def _heed(self, hub: HubState) -> None:
        """A hub that started again may have lost what we told it."""
        if hub.fleet > 0:
            self._link.fleet(hub.fleet)
        started, ready = hub.epoch != self._hub_epoch, hub.state == "ready"
        returned = ready and not self._hub_ready
        self._hub_epoch, self._hub_ready = hub.epoch, ready
        if started:
            self._announce()
        if (started or returned) and self._on_hub is not None:
            self._on_hub()

    def _count(self, reason: str, detail: str) -> None:
        self.refused[reason] += 1
        if self.refused[reason] == 1:
            log.warning("ignored a message (%s): %s; further ones are only counted", reason, detail)

    async def _report_changes(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                self._say(self._reported(), "reported")
            except Exception:
                log.exception("the report could not be made")
            await self._clock.sleep(REPORT_GAP)

    def _reported(self) -> Reported:
        self._seq += 1
        refused = self.refused.copy()
        for updater in self._updaters.values():
            refused.update(updater.refusals)
        return Reported(
            boot=self._boot,
            seq=self._seq,
            documents={kind: updater.report for kind, updater in self._updaters.items()},
            running=self._running(),
            refused=dict(refused),
            alarms=dict(self._alarms()),
        )

    def _say(self, message: State | Capabilities | Reported, leaf: str) -> None:
        self._link.publish(topics.up(self._node_id, leaf), encode(message), retain=True)
