"""A hub that misbehaves on purpose, for testing nodes without the real one: documents over any link, files over HTTP.

It signs with test keys of its own. Over a `MemoryLink` it meets a node in the same process; over a `Link` to a real broker, as
the user `sync.topics.HUB_USER`, it meets a real one. How files come to be approved is the caller's business: `approve`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import msgspec

from sync import topics
from sync.channel import LinkLike, Message
from sync.chaos.source import MisbehavingSource
from sync.clock import Clock, SystemClock
from sync.errors import Malformed
from sync.events import Ack, Event, unpack, unpack_event
from sync.messages import Capabilities, Document, HubState, Reported, State, decode, encode
from sync.trust import Keyring, SigningKey, sign

KINDS = ("desired", "policy", "settings")
MAX_HELD = 1_000
"""Messages that may wait to be let go out of order."""

Approve = Callable[[Mapping[str, bytes], Keyring], Mapping[str, bytes]]
"""From every file by digest, and the keys that sign documents, to what must be served at which path so that nodes take them
for approved: an update repository's metadata."""


@dataclass(slots=True, kw_only=True)
class Manners:
    """How messages go down. `copies`: of each. `lost`: share of them that is not sent at all. `hold`: keep them until `let_go`,
    which sends them in any order. `lost_acks`: share of acknowledgements that is not sent although the event was kept.
    """

    copies: int = 1
    lost: float = 0.0
    hold: bool = False
    lost_acks: float = 0.0


@dataclass(slots=True)
class Heard:
    """What one node said. `events`: by id, once each. `arrivals`: how often each id came over the wire."""

    states: list[State] = field(default_factory=list)
    capabilities: Capabilities | None = None
    reports: list[Reported] = field(default_factory=list)
    events: dict[str, Event] = field(default_factory=dict)
    arrivals: dict[str, int] = field(default_factory=dict)
    malformed: list[str] = field(default_factory=list)

    @property
    def reported(self) -> Reported | None:
        return self.reports[-1] if self.reports else None


class HubSimulator:
    """Use through `simulated_hub`. `nodes`: what was heard, by node id. `sent`, `lost`: messages down, copies counted.

    `lost_acks`: acknowledgements that were kept back. `keys`: by document kind; `stranger`: a key no node believes.
    """

    def __init__(
        self,
        link: LinkLike,
        source: MisbehavingSource,
        *,
        approve: Approve | None = None,
        clock: Clock | None = None,
        seed: int = 0,
    ) -> None:
        self.manners = Manners()
        self.nodes: dict[str, Heard] = {}
        self.keys = {kind: SigningKey.generate() for kind in KINDS}
        self.stranger = SigningKey.generate()
        self.source = source
        self.sent = self.lost = self.lost_acks = 0
        self._link = link
        self._approve = approve
        self._clock = clock or SystemClock()
        self._random = Random(seed)  # noqa: S311 - a run that can be repeated, not a secret
        self._revisions: dict[tuple[str, str], int] = {}
        self._files: dict[str, bytes] = {}
        self._last: dict[str, bytes] = {}
        self._held: list[tuple[str, bytes, bool]] = []
        self._epoch = 0

    @property
    def keyring(self) -> Keyring:
        """What a node must pin to believe this hub."""
        return Keyring(tuple(key.key(kind) for kind, key in self.keys.items()))

    # --- what goes down -----------------------------------------------------------------------------------------

    def add_file(self, data: bytes) -> str:
        """Serve and approve a file. Its digest."""
        digest = self.source.add(data)
        self._files[digest] = data
        self.approve()
        return digest

    def approve(self) -> None:
        """Serve the metadata that says which files are approved and whose signature counts."""
        if self._approve is not None:
            self.source.put_all(self._approve(self._files, self.keyring))

    def envelope(
        self,
        kind: str,
        scope: str,
        body: object,
        *,
        digests: Iterable[str] = (),
        revision: int | None = None,
        issued: float | None = None,
        expires: float | None = None,
        key: SigningKey | None = None,
    ) -> bytes:
        """A signed document. `revision`: the next one unless given. `key`: the right one unless given."""
        number = self._revisions.get((kind, scope), 0) + 1 if revision is None else revision
        self._revisions[kind, scope] = max(number, self._revisions.get((kind, scope), 0))
        document = Document(
            kind=kind,
            scope=scope,
            revision=number,
            issued=self._clock.wall() if issued is None else issued,
            digests=tuple(digests),
            body=msgspec.Raw(msgspec.json.encode(body)),
            expires=expires,
        )
        return sign(document, [key or self.keys[kind]])

    def desire(self, node_id: str, body: object, digests: Iterable[str] = ()) -> bytes:
        """Tell a node what to run, the next revision. The envelope."""
        envelope = self.envelope("desired", f"node:{node_id}", body, digests=digests)
        self.say(topics.down(node_id, "desired"), envelope)
        return envelope

    def set_policy(self, tenant: str, body: object) -> bytes:
        """Tell a tenant's nodes their policy, the next revision. The envelope."""
        envelope = self.envelope("policy", f"tenant:{tenant}", body)
        self.say(topics.tenant_policy(tenant), envelope)
        return envelope

    def say(self, topic: str, payload: bytes, *, retain: bool = True) -> None:
        """Send as the manners of the moment have it."""
        self._last[topic] = payload
        if self.manners.hold:
            if len(self._held) >= MAX_HELD:
                raise RuntimeError(f"{MAX_HELD} messages are held already")
            self._held.append((topic, payload, retain))
            return
        if self._random.random() < self.manners.lost:
            self.lost += 1
            return
        for _ in range(self.manners.copies):
            self._send(topic, payload, retain)

    def let_go(self) -> int:
        """Send what was held, in an order of its own. How many messages."""
        held, self._held = self._held, []
        self._random.shuffle(held)
        for topic, payload, retain in held:
            self._send(topic, payload, retain)
        return len(held)

    def storm(self, times: int) -> int:
        """Send the last message of every topic again, `times` times, mixed. How many messages."""
        messages = [(topic, payload) for topic, payload in self._last.items() for _ in range(times)]
        self._random.shuffle(messages)
        for topic, payload in messages:
            self._send(topic, payload, True)
        return len(messages)

    def restart(self) -> None:
        """Say what a hub says that has just started: nodes tell everything again."""
        self._epoch += 1
        self._send(topics.HUB_STATE, encode(HubState(state="ready", epoch=f"simulated-{self._epoch}")), True)

    def _send(self, topic: str, payload: bytes, retain: bool) -> None:
        self.sent += 1
        self._link.publish(topic, payload, retain=retain)

    # --- what comes up ------------------------------------------------------------------------------------------

    async def listen(self) -> None:
        """Until the link closes."""
        self._link.subscribe(*topics.hub_filters())
        async for message in self._link.messages():
            self._hear(message)

    def _hear(self, message: Message) -> None:
        node_id, leaf = topics.parse_up(message.topic)
        heard = self.nodes.setdefault(node_id, Heard())
        try:
            if leaf == "state":
                heard.states.append(decode(message.payload, State))
            elif leaf == "caps":
                heard.capabilities = decode(message.payload, Capabilities)
            elif leaf == "reported":
                heard.reports.append(decode(message.payload, Reported))
            elif leaf == "event":
                self._keep(node_id, heard, message.payload)
        except Malformed as error:
            heard.malformed.append(str(error))

    def _keep(self, node_id: str, heard: Heard, payload: bytes) -> None:
        ids = []
        for raw in unpack(payload).events:
            event = unpack_event(raw)
            heard.events.setdefault(event.id, event)
            heard.arrivals[event.id] = heard.arrivals.get(event.id, 0) + 1
            ids.append(event.id)
        if self._random.random() < self.manners.lost_acks:
            self.lost_acks += 1
            return
        for _ in range(self.manners.copies):
            self._link.publish(topics.down(node_id, "ack"), encode(Ack(ids=tuple(ids))))


@asynccontextmanager
async def simulated_hub(
    link: LinkLike, *, approve: Approve | None = None, clock: Clock | None = None, seed: int = 0
) -> AsyncIterator[HubSimulator]:
    """A hub that listens until the block ends. The link belongs to the caller. `seed`: of everything random."""
    with MisbehavingSource() as source:
        hub = HubSimulator(link, source, approve=approve, clock=clock, seed=seed)
        hub.approve()
        task = asyncio.create_task(hub.listen(), name="simulated hub")
        try:
            yield hub
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=1.0)
