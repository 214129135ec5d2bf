"""Fakes for tests, shipped with what they fake: a clock that is moved by hand, a broker in memory, an activator."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sync.channel import Message, Will
from sync.chaos.hub import HubSimulator as HubSimulator  # noqa: PLC0414 - part of this module for its users
from sync.chaos.hub import simulated_hub as simulated_hub  # noqa: PLC0414
from sync.errors import Expired, SyncError
from sync.outgoing import Outgoing, Packet
from sync.state import Approval, StateStore
from sync.trust import Keyring, digest_of, encode_keyring
from sync.tuf_messages import Answer, Ask, Listed, Mark


class FakeClock:
    """Time moves only by `advance`; sleepers whose time has come are woken then."""

    def __init__(self, wall: float = 1_800_000_000.0) -> None:
        self._wall = wall
        self._monotonic = 1_000.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def wall(self) -> float:
        return self._wall

    def monotonic(self) -> float:
        return self._monotonic

    @property
    def sleepers(self) -> int:
        """How many tasks are waiting for time to pass."""
        return sum(not future.done() for _, future in self._sleepers)

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._monotonic + seconds, future))
        await future

    def advance(self, seconds: float) -> None:
        """Move both clocks and wake who is due."""
        self._wall += seconds
        self._monotonic += seconds
        waiting = [(due, future) for due, future in self._sleepers if not future.done()]
        self._sleepers = [(due, future) for due, future in waiting if due > self._monotonic]
        for due, future in waiting:
            if due <= self._monotonic:
                future.set_result(None)


def matches(pattern: str, topic: str) -> bool:
    """MQTT 3.1.1, 4.7: `+` is one level, a final `#` any number of levels."""
    wanted, given = pattern.split("/"), topic.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(given) or level not in ("+", given[index]):
            return False
    return len(wanted) == len(given)


class MemoryBroker:
    """Retained messages, wildcard filters and wills, in one process and without delay."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.log: list[Message] = []
        self._links: list[MemoryLink] = []

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Route a message, also from a test that plays the other side."""
        self.log.append(Message(topic, payload, retain))
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        for link in list(self._links):
            link.deliver(Message(topic, payload))

    def forget(self) -> None:
        """Lose every retained message, as a broker without persistence does at a restart."""
        self.retained.clear()

    def payloads(self, topic: str) -> list[bytes]:
        """Everything that was published on `topic`, oldest first."""
        return [message.payload for message in self.log if message.topic == topic]

    def attach(self, link: MemoryLink) -> None:
        self._links.append(link)

    def detach(self, link: MemoryLink) -> None:
        self._links.remove(link)


class MemoryLink:
    """A `LinkLike` on a MemoryBroker. Connected from the start of the block until `drop`; `heal` connects again."""

    def __init__(self, broker: MemoryBroker, will: Will | None = None, limit: int = 10_000) -> None:
        self._broker = broker
        self._will = will
        self._filters: list[str] = []
        self._callbacks: list[Callable[[], None]] = []
        self._outgoing = Outgoing(limit)
        self._incoming: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._closed = False
        self._connected = False

    async def __aenter__(self) -> Self:
        self.heal()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connected:
            self._connected = False
            self._broker.detach(self)
        self._closed = True
        self._arrived.set()

    @property
    def connected(self) -> bool:
        return self._connected

    def drop(self) -> None:
        """Lose the connection: the broker speaks the will."""
        self._connected = False
        self._broker.detach(self)
        if self._will is not None:
            self._broker.publish(self._will.topic, self._will.payload, retain=True)

    def heal(self) -> None:
        """Connect: subscribe again, send what waited, tell the callbacks."""
        self._connected = True
        self._broker.attach(self)
        for pattern in self._filters:
            self._replay(pattern)
        self._pump()
        for callback in self._callbacks:
            callback()

    def on_connect(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        if self._connected:
            callback()

    def fleet(self, size: int) -> None:
        """Nothing reconnects by itself here."""

    def subscribe(self, *filters: str) -> None:
        for pattern in filters:
            if pattern not in self._filters:
                self._filters.append(pattern)
                if self._connected:
                    self._replay(pattern)

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        if self._connected or qos > 0 or retain:
            self._outgoing.put(Packet(topic, payload, qos, retain))
            self._pump()

    async def messages(self) -> AsyncIterator[Message]:
        while True:
            while self._incoming:
                yield self._incoming.popleft()
            if self._closed:
                return
            self._arrived.clear()
            await self._arrived.wait()

    def deliver(self, message: Message) -> None:
        """From the broker. One copy, whatever the number of filters that match."""
        if any(matches(pattern, message.topic) for pattern in self._filters):
            self._incoming.append(message)
            self._arrived.set()

    def _replay(self, pattern: str) -> None:
        for topic, payload in self._broker.retained.items():
            if matches(pattern, topic):
                self._incoming.append(Message(topic, payload, retain=True))
                self._arrived.set()

    def _pump(self) -> None:
        while self._connected and (packet := self._outgoing.take()) is not None:
            self._broker.publish(packet.topic, packet.payload, retain=packet.retain)


class FakeRepository:
    """Meets `sync.packages.Client`: an update repository without metadata. What it says is taken as verified.

    `files`: approved, digest -> size. `keyring`: of the documents. `expires`, `issued`: Unix seconds. `failure`: what every
    question ends in when set. It fetches `timestamp.json`, so a source that is down is down here too.
    """

    def __init__(self, keyring: Keyring, now: float, lifetime: float = 86_400.0) -> None:
        self.files: dict[str, int] = {}
        self.keyring = encode_keyring(keyring)
        self.version = 0
        self.issued, self.expires = now, now + lifetime
        self.failure: SyncError | None = None
        self.asked: list[Ask] = []

    def ask(self, ask: Ask, get: Callable[[str, int], bytes]) -> Answer:
        self.asked.append(ask)
        try:
            get("timestamp.json", 16_384)
        except SyncError as error:
            return Answer(code=error.code, text=str(error))
        if self.failure is not None:
            return Answer(code=self.failure.code, text=str(self.failure))
        if ask.now > self.expires:
            return Answer(code=Expired.code, text="timestamp.json is expired")
        self.version += 1
        names = {f"sha256/{digest.removeprefix('sha256:')}": digest for digest in self.files}
        found = {name: Listed(names[name], self.files[names[name]]) for name in ask.names if name in names}
        found["keys/documents.json"] = Listed(digest_of(self.keyring), len(self.keyring))
        marks = {role: Mark(self.version, "k") for role in ("timestamp", "snapshot")}
        kept = {"timestamp": b"{}"}
        return Answer(files=found, marks=marks, kept=kept, expires=self.expires, issued=self.issued)

    def close(self) -> None:
        """Nothing runs."""


ROOT = b'{"signed":{"_type":"root"}}'
"""Looks like root metadata to a node's configuration; a FakeRepository asks for no more."""


def know(data: Path, keyring: Keyring, until: float) -> None:
    """Make the node in the folder `data` one that has verified `keyring`, good until then (Unix seconds)."""
    data.mkdir(parents=True, exist_ok=True)
    state, encoded = StateStore(data / "state.db"), encode_keyring(keyring)
    state.approve(Approval(until, until - 86_400.0, digest_of(encoded), encoded))
    state.close()


class FakeActivator:
    """Meets `sync.updater.Activator`; remembers what it was asked and fails when told to.

    `active`: body in force. `wanted`: digests `plan` answers. `refuse`: exception that `prepare` raises for a body.
    `gate`: `prepare` waits for it when set. `judgement`: what `verdict` answers.
    """

    def __init__(self, wanted: Sequence[str] = ()) -> None:
        self.wanted = tuple(wanted)
        self.active: bytes | None = None
        self.history: list[bytes] = []
        self.prepared: list[tuple[bytes, dict[str, bytes]]] = []
        self.discarded: list[bytes] = []
        self.refuse: dict[bytes, Exception] = {}
        self.gate: asyncio.Event | None = None
        self.judgement = "good"
        self.settled_times = 0

    def plan(self, body: bytes, capabilities: Mapping[str, object]) -> Sequence[str]:
        return self.wanted

    async def prepare(self, body: bytes, blobs: Mapping[str, Path]) -> object:
        self.prepared.append((body, {digest: path.read_bytes() for digest, path in blobs.items()}))
        if self.gate is not None:
            await self.gate.wait()
        if body in self.refuse:
            raise self.refuse[body]
        return body

    async def commit(self, token: object) -> None:
        if not isinstance(token, bytes):
            raise TypeError("expected what prepare returned")
        self.active = token
        self.history.append(token)

    async def discard(self, token: object) -> None:
        if isinstance(token, bytes):
            self.discarded.append(token)

    def verdict(self) -> str:
        return self.judgement

    def settled(self) -> None:
        self.settled_times += 1
