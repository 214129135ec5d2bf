"""Gets the newest documents to the nodes: at once when they change, and again until the nodes that are here have seen them.

Level-triggered: the database says what is wanted, reports say what is there, and only the difference is sent. The broker
may forget everything: on every connection all of it is said again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cloud_hub.documents import Documents, burnt_revision, must_resend, node_scope, tenant_scope
from cloud_hub.records import Issued, Member, Records
from cloud_hub.storage import Storage
from sync.channel import LinkLike, Will
from sync.clock import Clock
from sync.messages import HubState, encode
from sync.topics import HUB_STATE, down, tenant_of, tenant_policy

RESEND_SECONDS = 10.0
"""A document is repeated for nodes that report an older one at most this often: their answer needs time to arrive."""
MAX_WAIT_SECONDS = 300.0
"""Where the doubling of `RESEND_SECONDS` ends, for a node that never answers and for claims that burn revisions."""
SWEEP_SECONDS = 300.0
"""How often everything is compared even though nothing was heard; half to one and a half times that, at random."""
BURST = 100
"""Documents sent before pausing `PAUSE_SECONDS`: a fleet coming back must not starve a policy that is pushed meanwhile."""
PAUSE_SECONDS = 0.05
ORDER = ("policy", "settings", "desired", "software")
"""Kinds of documents, as they are said to a broker that may have forgotten everything."""

log = logging.getLogger(__name__)


def hub_will(epoch: str) -> Will:
    """What the broker says when this hub vanishes."""
    return Will(HUB_STATE, encode(HubState(state="lost", epoch=epoch)))


@dataclass(frozen=True, slots=True)
class Attempt:
    """Something done `at` (monotonic seconds), not to be done again for `wait` seconds."""

    at: float
    wait: float
    revision: int = 0

    def wait_again(self, now: float, calm: float) -> float:
        """Twice the wait, unless nothing happened for `calm` seconds."""
        return RESEND_SECONDS if now - self.at > calm else min(2 * self.wait, MAX_WAIT_SECONDS)


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
        self._sent: dict[str, Attempt] = {}
        self._burnt: dict[tuple[str, str], Attempt] = {}
        self._due: dict[str, float] = {}
        self._unproven: dict[str, float] = {}
        self._everything = False
        self._fleet = 0
        # Not of `run`, which starts again after an error: errors that keep coming must not put off the sweep for ever.
        self._sweep_at = self._next_sweep()
        self._wake = asyncio.Event()
        link.on_connect(self.connected)

    def send(self, issued: Iterable[Issued]) -> None:
        """Publish now. Of two revisions that race here, the newer one is what the broker keeps."""
        for document in issued:
            topic = topic_of(document)
            if topic is None:
                continue
            last = self._sent.get(topic)
            if last is None or document.revision >= last.revision:
                self._link.publish(topic, document.envelope, qos=1, retain=True)
                self._expect(topic, document, last)

    def _expect(self, topic: str, document: Issued, last: Attempt | None) -> None:
        """A broker's acknowledgement means little: look after a while whether the nodes report the revision."""
        now, wait = self._clock.monotonic(), RESEND_SECONDS
        if last is not None and last.revision == document.revision:
            wait = last.wait_again(now, calm=2 * last.wait)
        self._sent[topic] = Attempt(now, wait, document.revision)
        self._unproven[document.scope] = now + self._uniform(1.0, 1.5) * wait
        self._wake.set()

    def connected(self) -> None:
        """The broker is there, perhaps with an empty memory: say everything again."""
        self._everything = True
        self._wake.set()

    def heard(self, nodes: Sequence[str]) -> None:
        """These nodes were born or reported something."""
        for node_id in nodes:
            self._due[node_id] = 0.0
        self._wake.set()

    def leave(self) -> None:
        """Say that the hub stops, before the connection is closed."""
        self._link.publish(HUB_STATE, encode(HubState(state="disconnected", epoch=self._epoch)), qos=1, retain=True)

    async def run(self) -> None:
        """Compare and send, until cancelled."""
        while True:
            await self._sleep_until(min([self._sweep_at, *self._due.values(), *self._unproven.values()]))
            if self._everything:
                self._everything = False
                try:
                    await self._say_everything()
                except Exception:
                    self.connected()
                    raise
            if self._clock.monotonic() >= self._sweep_at:
                self._sweep_at = self._next_sweep()
                await self._sweep()
            await self.reconcile()

    async def reconcile(self) -> None:
        """Send what the nodes that are due lack, or remember when to look again."""
        await self._look_at_unproven()
        ready = self._ready(self._due)
        for start in range(0, len(ready), BURST):
            part = ready[start : start + BURST]
            for node_id in part:
                self._due.pop(node_id, None)
            try:
                missing, burnt = await asyncio.to_thread(self._compare, part)
                self._send_missing(missing)
                self.send(await self._reissue(burnt))
            except Exception:
                self._put_back(self._due, part)
                raise
            if len(part) == BURST:
                await self._clock.sleep(PAUSE_SECONDS)

    def _send_missing(self, missing: Iterable[tuple[str, Issued]]) -> None:
        now = self._clock.monotonic()
        for node_id, document in missing:
            last = self._sent.get(topic_of(document) or "")
            if last is not None and document.revision == last.revision and now - last.at < RESEND_SECONDS:
                self._due[node_id] = last.at + self._uniform(RESEND_SECONDS, 1.5 * RESEND_SECONDS)
            else:
                self.send([document])

    async def _look_at_unproven(self) -> None:
        """Make the nodes due for which a document was sent a while ago. Those that are away will speak when they return."""
        scopes = self._ready(self._unproven)
        if not scopes:
            return
        for scope in scopes:
            del self._unproven[scope]
        try:
            self.heard(await asyncio.to_thread(self._present, frozenset(scopes)))
        except Exception:
            self._put_back(self._unproven, scopes)
            raise

    def _present(self, scopes: Container[str]) -> list[str]:
        with self._storage.read() as records:
            present = records.present()
        return [node for node in present if node_scope(node) in scopes or tenant_scope(tenant_of(node)) in scopes]

    def _ready(self, times: Mapping[str, float]) -> list[str]:
        now = self._clock.monotonic()
        return [name for name, at in times.items() if at <= now]

    def _put_back(self, times: dict[str, float], names: Iterable[str]) -> None:
        """After an error. Spread out and not at once: what one of them may have caused must not hold up the others."""
        for name in names:
            times.setdefault(name, self._clock.monotonic() + self._uniform(1.0, 1.5) * RESEND_SECONDS)

    def _compare(self, node_ids: Sequence[str]) -> tuple[list[tuple[str, Issued]], list[tuple[Issued, int]]]:
        with self._storage.read() as records:
            return _compare(records, node_ids, self._clock.wall())

    async def _reissue(self, burnt: Iterable[tuple[Issued, int]]) -> list[Issued]:
        """Fresh revisions for those overtaken by what a node has seen, as far as the documents' waits allow."""
        highest: dict[tuple[str, str], tuple[Issued, int]] = {}
        for old, seen in burnt:
            key = (old.kind, old.scope)
            highest[key] = (old, max(seen, highest.get(key, (old, 0))[1]))
        allowed = [(old, seen) for old, seen in highest.values() if self._may_burn(old)]
        return await asyncio.to_thread(self._burn, allowed) if allowed else []

    def _may_burn(self, old: Issued) -> bool:
        """One node's claim re-signs what a whole tenant is sent: seldom, and ever more seldom while it goes on."""
        key, now = (old.kind, old.scope), self._clock.monotonic()
        last, wait = self._burnt.get(key), RESEND_SECONDS
        if last is not None:
            again = last.at + last.wait
            if now < again:
                self._unproven[old.scope] = min(again, self._unproven.get(old.scope, again))
                return False
            wait = last.wait_again(now, calm=2 * MAX_WAIT_SECONDS)
        self._burnt[key] = Attempt(now, wait)
        return True

    def _burn(self, burnt: Iterable[tuple[Issued, int]]) -> list[Issued]:
        found = []
        with self._storage.write() as records:
            for old, seen in burnt:
                log.warning(
                    "a node has seen revision %d of %s %s, ours was %d", seen, old.kind, old.scope, old.revision
                )
                records.burn(old.kind, old.scope, seen)
                found.append(self._documents.again(records, old.kind, old.scope))
        return found

    async def _say_everything(self) -> None:
        self._say_state(await asyncio.to_thread(self._count))
        documents = await asyncio.to_thread(self._all)
        for start in range(0, len(documents), BURST):
            self.send(documents[start : start + BURST])
            await self._clock.sleep(PAUSE_SECONDS)

    def _say_state(self, fleet: int) -> None:
        """Nodes spread what all of them do at once over a time that the size of the fleet gives."""
        self._fleet = fleet
        self._link.publish(
            HUB_STATE, encode(HubState(state="ready", epoch=self._epoch, fleet=fleet)), qos=1, retain=True
        )

    def _count(self) -> int:
        with self._storage.read() as records:
            return len(records.nodes())

    def _all(self) -> list[Issued]:
        """Policies first: there are few of them and each speaks to many. Then settings: they say when models may change."""
        with self._storage.read() as records:
            return [document for kind in ORDER for document in records.documents(kind)]

    async def _sweep(self) -> None:
        """Also signs what should follow from the deployments and for whatever reason does not stand there yet."""
        nodes, changed = await asyncio.to_thread(self._recompute)
        if abs(len(nodes) - self._fleet) > self._fleet // 10:
            self._say_state(len(nodes))
        self.send(changed)
        self.heard(nodes)

    def _recompute(self) -> tuple[list[str], list[Issued]]:
        with self._storage.write() as records:
            nodes = records.nodes()
            changed = self._documents.settings(records, nodes) + self._documents.desired(records, nodes)
            changed += self._documents.software(records, nodes)
            return [node.id for node in nodes], changed

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
    """Where a document travels; None for a kind or scope that no topic is for."""
    what, _, name = document.scope.partition(":")
    if document.kind in ("desired", "settings", "software") and what == "node":
        return down(name, document.kind)
    if document.kind == "policy" and what == "tenant":
        return tenant_policy(name)
    return None


def wanted_by(records: Records, members: Sequence[Member]) -> list[list[Issued]]:
    """The newest documents that speak to each of some nodes."""
    scopes = [(node_scope(member.node.id), tenant_scope(tenant_of(member.node.id))) for member in members]
    documents = records.documents_of(ORDER, {scope for pair in scopes for scope in pair})
    found = []
    for node, tenant in scopes:
        wanted = (("desired", node), ("settings", node), ("software", node), ("policy", tenant))
        found.append([documents[key] for key in wanted if key in documents])
    return found


def _compare(
    records: Records, node_ids: Sequence[str], now: float
) -> tuple[list[tuple[str, Issued]], list[tuple[Issued, int]]]:
    """What nodes have not seen, and what of ours they have seen overtaken (with the revision they saw)."""
    missing: list[tuple[str, Issued]] = []
    burnt: list[tuple[Issued, int]] = []
    members = records.members_named(node_ids)
    for member, documents in zip(members, wanted_by(records, members), strict=True):
        for document in documents:
            standing = member.standing(document.kind, document, now)
            seen = burnt_revision(standing)
            if seen is not None:
                burnt.append((document, seen))
            elif must_resend(standing):
                missing.append((member.node.id, document))
    return missing, burnt
