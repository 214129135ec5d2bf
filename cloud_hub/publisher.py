"""Gets the newest documents to the nodes: at once when they change, and again whenever a node may lack them.

Level-triggered: the database says what is wanted, reports say what is there, and only the difference is sent. The broker
may forget everything: on every connection all of it is said again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence

from cloud_hub.documents import Documents, burnt_revision, must_resend, node_scope, tenant_scope
from cloud_hub.records import Issued, Member, Records
from cloud_hub.storage import Storage
from sync.channel import LinkLike, Will
from sync.clock import Clock
from sync.messages import HubState, encode
from sync.topics import HUB_STATE, down, tenant_of, tenant_policy

RESEND_SECONDS = 10.0
"""A document is repeated for nodes that report an older one at most this often: their answer needs time to arrive."""
SWEEP_SECONDS = 300.0
"""How often everything is compared even though nothing was heard; half to one and a half times that, at random."""
BURST = 100
"""Documents sent before pausing `PAUSE_SECONDS`: a fleet coming back must not starve a policy that is pushed meanwhile."""
PAUSE_SECONDS = 0.05

log = logging.getLogger(__name__)


def hub_will(epoch: str) -> Will:
    """What the broker says when this hub vanishes."""
    return Will(HUB_STATE, encode(HubState(state="lost", epoch=epoch)))


class Publisher:
    """Lives in the event loop; the database is read in threads."""

    def __init__(
        self,
        storage: Storage,
        documents: Documents,
        clock: Clock,
        link: LinkLike,
        epoch: str,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._storage = storage
        self._documents = documents
        self._clock = clock
        self._link = link
        self._epoch = epoch
        self._uniform = uniform
        self._sent: dict[str, tuple[int, float]] = {}
        self._due: dict[str, float] = {}
        self._everything = False
        self._wake = asyncio.Event()
        link.on_connect(self.connected)

    def send(self, issued: Iterable[Issued]) -> None:
        """Publish now. Of two revisions that race here, the newer one is what the broker keeps."""
        for document in issued:
            topic = topic_of(document)
            if topic is None:
                continue
            revision, _ = self._sent.get(topic, (0, 0.0))
            if document.revision >= revision:
                self._sent[topic] = (document.revision, self._clock.monotonic())
                self._link.publish(topic, document.envelope, qos=1, retain=True)

    def connected(self) -> None:
        """The broker is there, perhaps with an empty memory: say everything again."""
        self._everything = True
        self._wake.set()

    def heard(self, nodes: Sequence[str]) -> None:
        """These nodes were born or reported something."""
        for node_id in nodes:
            self._due.setdefault(node_id, 0.0)
        self._wake.set()

    def leave(self) -> None:
        """Say that the hub stops, before the connection is closed."""
        self._link.publish(HUB_STATE, encode(HubState(state="disconnected", epoch=self._epoch)), qos=1, retain=True)

    async def run(self) -> None:
        """Compare and send, until cancelled."""
        sweep_at = self._next_sweep()
        while True:
            await self._sleep_until(min([sweep_at, *self._due.values()]))
            if self._everything:
                self._everything = False
                await self._say_everything()
            if self._clock.monotonic() >= sweep_at:
                sweep_at = self._next_sweep()
                await self._sweep()
            await self.reconcile()

    async def reconcile(self) -> None:
        """Send what the nodes that are due lack, or remember when to look again."""
        now = self._clock.monotonic()
        ready = [node_id for node_id, at in self._due.items() if at <= now]
        for start in range(0, len(ready), BURST):
            part = ready[start : start + BURST]
            for node_id in part:
                self._due.pop(node_id, None)
            missing = await asyncio.to_thread(self._missing, part)
            self._send_missing(missing)
            if len(part) == BURST:
                await self._clock.sleep(PAUSE_SECONDS)

    def _send_missing(self, missing: Iterable[tuple[str, Issued]]) -> None:
        now = self._clock.monotonic()
        for node_id, document in missing:
            revision, at = self._sent.get(topic_of(document) or "", (0, -RESEND_SECONDS))
            if document.revision == revision and now - at < RESEND_SECONDS:
                self._due[node_id] = at + self._uniform(RESEND_SECONDS, 1.5 * RESEND_SECONDS)
            else:
                self.send([document])

    def _missing(self, node_ids: Sequence[str]) -> list[tuple[str, Issued]]:
        """(node, document it has not seen). A revision burnt by a report is replaced by one above it."""
        with self._storage.read() as records:
            found, burnt = _compare(records, node_ids, self._clock.wall())
        if burnt:
            with self._storage.write() as records:
                found += [(node_id, self._reissue(records, old, seen)) for node_id, old, seen in burnt]
        return found

    def _reissue(self, records: Records, old: Issued, seen: int) -> Issued:
        log.warning("a node has seen revision %d of %s %s, ours was %d", seen, old.kind, old.scope, old.revision)
        records.burn(old.kind, old.scope, seen)
        return self._documents.again(records, old.kind, old.scope)

    async def _say_everything(self) -> None:
        self._link.publish(HUB_STATE, encode(HubState(state="ready", epoch=self._epoch)), qos=1, retain=True)
        documents = await asyncio.to_thread(self._all)
        for start in range(0, len(documents), BURST):
            self.send(documents[start : start + BURST])
            await self._clock.sleep(PAUSE_SECONDS)

    def _all(self) -> list[Issued]:
        """Policies first: there are few of them and each speaks to many."""
        with self._storage.read() as records:
            return records.documents("policy") + records.documents("desired")

    async def _sweep(self) -> None:
        """Also signs what should follow from the deployments and for whatever reason does not stand there yet."""
        nodes, changed = await asyncio.to_thread(self._recompute)
        self.send(changed)
        self.heard(nodes)

    def _recompute(self) -> tuple[list[str], list[Issued]]:
        with self._storage.write() as records:
            nodes = records.nodes()
            return [node.id for node in nodes], self._documents.desired(records, nodes)

    def _next_sweep(self) -> float:
        return self._clock.monotonic() + self._uniform(0.5, 1.5) * SWEEP_SECONDS

    async def _sleep_until(self, at: float) -> None:
        """Until `at`, monotonic seconds, or until somebody wakes us."""
        # Not wait_for: in Python 3.11 it forgets a cancellation that arrives together with the event.
        try:
            async with asyncio.timeout(max(at - self._clock.monotonic(), 0.0)):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()


def topic_of(document: Issued) -> str | None:
    """Where a document travels; None for the catalogue, which is fetched over HTTP."""
    what, _, name = document.scope.partition(":")
    if document.kind == "desired" and what == "node":
        return down(name, "desired")
    if document.kind == "policy" and what == "tenant":
        return tenant_policy(name)
    return None


def wanted_by(records: Records, member: Member) -> list[Issued]:
    """The newest documents that speak to a node."""
    scopes = (("desired", node_scope(member.node.id)), ("policy", tenant_scope(tenant_of(member.node.id))))
    return [document for kind, scope in scopes if (document := records.document(kind, scope)) is not None]


def _compare(
    records: Records, node_ids: Sequence[str], now: float
) -> tuple[list[tuple[str, Issued]], list[tuple[str, Issued, int]]]:
    """What nodes have not seen, and what of ours they have seen overtaken (with the revision they saw)."""
    missing: list[tuple[str, Issued]] = []
    burnt: list[tuple[str, Issued, int]] = []
    for node_id in node_ids:
        member = records.member(node_id)
        if member is None:
            continue
        for document in wanted_by(records, member):
            standing = member.standing(document.kind, document, now)
            seen = burnt_revision(standing)
            if seen is not None:
                burnt.append((node_id, document, seen))
            elif must_resend(standing):
                missing.append((node_id, document))
    return missing, burnt
