"""The MQTT connection, as `async with Link(...)`.

One `sync.connection` at a time and one supervisor that replaces it: so the protocol version can fall back, the delay between
attempts carries our own jitter, and a network thread that ends for whatever reason is noticed. paho holds no queue of ours:
packets wait in `sync.outgoing` and enter paho within a small window, so an unacknowledged one is sent again on the next
connection.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from sync import tunnel
from sync.channel import MAX_FLEET, LinkLike, LinkOptions, Message, Will, broker_address, reconnect_delay
from sync.connection import CLOSE_SECONDS, Connection
from sync.errors import InvalidConfig, SyncError
from sync.messages import MAX_MESSAGE_BYTES
from sync.outgoing import Outgoing, Packet

CONNACK_SECONDS = 10.0
"""A broker that accepted the socket must have answered by then."""
DRAIN_SECONDS = 2.0
"""How long leaving waits for acknowledgements of what was published."""
STEADY_SECONDS = 10.0
FLAPPING_ATTEMPT = 5
"""A connection that lasted less was no success: two machines that show one certificate would evict each other twice a second
for ever. The delay then grows up to that of this attempt."""

log = logging.getLogger(__name__)

__all__ = ["Link", "LinkLike", "LinkOptions", "Message", "Will"]


class Link:
    """A connection that is kept up until the block ends. Use from one event loop, whose thread calls every method.

    A broker that is down at the start is not an error: what is published waits, bounded.
    """

    def __init__(self, options: LinkOptions) -> None:
        self._options = options
        self._address = broker_address(options.url)
        if self._address.tls and options.tls is None:
            raise InvalidConfig(f"broker {options.url!r} needs certificates")
        self._proxy = tunnel.read_proxy(options.proxy) if options.proxy else None
        self._fleet_size = options.fleet_size
        self._filters: list[str] = []
        self._callbacks: list[Callable[[], None]] = []
        self._outgoing = Outgoing(options.max_outgoing)
        self._under_way: dict[int, Packet] = {}
        self._window = options.window
        self._incoming: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._closed = False
        self._connection: Connection | None = None
        self._connected = False
        self._v5 = True
        self._clean = True
        self._told: bool | None = None
        self._trouble = ""
        self._task: asyncio.Task[None] | None = None
        self.lost_incoming = 0
        self.refused = 0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._keep_connected(), name="mqtt link")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connected:
            try:
                async with asyncio.timeout(DRAIN_SECONDS):
                    await self._drained.wait()
            except TimeoutError:
                log.warning("link to %s closes with %d messages unsent", self._options.url, self.pending)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=CLOSE_SECONDS + 1)
        self._closed = True
        self._arrived.set()

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def protocol(self) -> str:
        """MQTT 5 or MQTT 3.1.1, as the broker granted it; empty without a connection."""
        return self._connection.name if self._connection is not None and self._connected else ""

    @property
    def trouble(self) -> str:
        """Why the last attempt failed, or the last connection ended; empty when there was none."""
        return self._trouble

    @property
    def pending(self) -> int:
        """Messages that the broker has not acknowledged yet."""
        return len(self._outgoing) + len(self._under_way)

    @property
    def dropped(self) -> int:
        """Outgoing messages given up because too many waited, or at QoS 0 because the connection broke."""
        return self._outgoing.dropped

    def fleet(self, size: int) -> None:
        """How many nodes would reconnect together, as the hub says; it scales the jitter from the next attempt on."""
        self._fleet_size = min(max(size, 1), MAX_FLEET)

    def on_connect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every connect, once the subscriptions are under way; at once when already connected."""
        self._callbacks.append(callback)
        if self._connected:
            callback()

    def subscribe(self, *filters: str) -> None:
        """Add filters, QoS 1. They are subscribed on every connect: some brokers forget a session they say they kept."""
        added = [item for item in filters if item not in self._filters]
        self._filters += added
        if self._connection is not None and self._connected:
            self._connection.subscribe(added)

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Hand over a message; never blocks. It waits while there is no connection, except at QoS 0 unretained.

        An acknowledgement means that the broker has it, never that anybody received it.
        """
        packet = Packet(topic, payload, qos, retain)
        if self._connected or qos > 0 or retain:
            self._outgoing.put(packet)
            self._drained.clear()
            self._pump()
        else:
            self._outgoing.dropped += 1

    async def messages(self) -> AsyncIterator[Message]:
        """Everything that arrives, for one consumer; ends when the link is closed."""
        while True:
            while self._incoming:
                yield self._incoming.popleft()
            if self._closed:
                return
            self._arrived.clear()
            if not self._incoming:
                await self._arrived.wait()

    # --- the supervisor -----------------------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        attempt, loop = 0, asyncio.get_running_loop()
        while True:
            was_up, began = False, loop.time()
            try:
                was_up, why = await self._connect_once()
            except SyncError as error:
                why = str(error)  # the certificates cannot be read
            except Exception as error:
                # No thread or no descriptor to be had: that passes, and a node without a link is deaf for good.
                log.exception("an attempt to reach %s failed", self._options.url)
                why = f"the attempt failed: {error}"
            if was_up:
                steady = loop.time() - began >= STEADY_SECONDS
                attempt = 1 if steady else min(attempt + 1, FLAPPING_ATTEMPT)
            else:
                attempt += 1
            self._trouble = why
            self._tell(False, why)
            await asyncio.sleep(reconnect_delay(attempt, self._options, random.uniform, self._fleet_size))

    async def _connect_once(self) -> tuple[bool, str]:
        """One connection from its beginning to its end: whether it was up, and why it ended."""
        connection = Connection(self, self._options, self._address, self._proxy, self._v5, self._clean)
        self._connection = connection
        try:
            was_up = await self._serve(connection)
            wrong_version = connection.version_refused or connection.hung_up
        finally:
            self._lost()
            await connection.close()
        if wrong_version:
            # A broker without MQTT 5 should refuse the version, but some just hang up: then try the other one.
            self._v5 = not self._v5
        return was_up, connection.why

    async def _serve(self, connection: Connection) -> bool:
        """Until the connection's thread has ended. True when it was up in between."""
        connection.start()
        try:
            # Not wait_for: before Python 3.12 it may swallow a cancellation that comes together with the event.
            async with asyncio.timeout(CONNACK_SECONDS):
                await connection.decided.wait()
        except TimeoutError:
            connection.why = "no answer from the broker"
            return False
        was_up = self._connected
        await connection.ended.wait()
        return was_up

    # --- events, in the event loop ------------------------------------------------------------------------------

    def up(self, connection: Connection, receive_maximum: int | None) -> None:
        """The broker accepted the connection."""
        if connection is not self._connection:
            return
        self._connected, self._clean = True, False
        self._window = min(self._options.window, receive_maximum or self._options.window)
        connection.subscribe(self._filters)
        self._tell(True, connection.name)
        self._pump()
        for callback in self._callbacks:
            try:
                callback()
            except Exception:
                log.exception("a callback on connect failed")

    def acknowledged(self, connection: Connection, mid: int, failure: str | None) -> None:
        """The broker has the message, or refuses it: then sending it again would not help."""
        if connection is not self._connection:
            return
        packet = self._under_way.pop(mid, None)
        if packet is not None and failure is not None:
            self.refused += 1
            log.warning("the broker refused a publish on %s: %s", packet.topic, failure)
        self._pump()

    def arrived(self, connection: Connection, message: Message) -> None:
        """Runs in paho's thread: bounded here, so that a stalled event loop cannot collect messages without end."""
        if len(self._incoming) >= self._options.max_incoming or len(message.payload) > MAX_MESSAGE_BYTES:
            self.lost_incoming += 1
            return
        self._incoming.append(message)
        connection.post(self._arrived.set)

    def _lost(self) -> None:
        self._connected = False
        self._connection = None
        packets, self._under_way = list(self._under_way.values()), {}
        self._outgoing.give_back(packets)

    def _pump(self) -> None:
        connection = self._connection
        while connection is not None and self._connected and len(self._under_way) < self._window:
            packet = self._outgoing.take()
            if packet is None:
                break
            self._under_way[connection.publish(packet)] = packet
        if not self.pending:
            self._drained.set()

    def _tell(self, healed: bool, why: str) -> None:
        """Once when it breaks and once when it heals, never once per attempt."""
        if healed != self._told:
            self._told = healed
            text = "link to %s is up (%s)" if healed else "link to %s is down: %s"
            log.log(logging.INFO if healed else logging.WARNING, text, self._options.url, why)
