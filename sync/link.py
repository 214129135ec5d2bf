"""The MQTT connection, as `async with Link(...)`. The only importer of paho.

One paho client per connection and one supervisor that replaces it: so the protocol version can fall back, the delay between
attempts carries our own jitter, and a network thread that ends for whatever reason is noticed by its end, never by
`is_connected()`. paho holds no queue of ours: packets wait in `sync.outgoing` and enter paho within a small window, so an
unacknowledged one is sent again on the next connection. Numbers after `paho` are issues of paho.mqtt.python.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from sync import tunnel
from sync.channel import MAX_FLEET, Address, LinkLike, LinkOptions, Message, Will, broker_address, reconnect_delay
from sync.errors import InvalidConfig, SyncError
from sync.messages import MAX_MESSAGE_BYTES
from sync.outgoing import Outgoing, Packet

CONNACK_SECONDS = 10.0
"""A broker that accepted the socket must have answered by then."""
DRAIN_SECONDS = 2.0
"""How long leaving waits for acknowledgements of what was published."""
CLOSE_SECONDS = 3.0
"""How long leaving waits for paho's thread; it is a daemon and is abandoned after that."""
_OTHER = {
    MQTTProtocolVersion.MQTTv5: MQTTProtocolVersion.MQTTv311,
    MQTTProtocolVersion.MQTTv311: MQTTProtocolVersion.MQTTv5,
}

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
        self._connection: _Connection | None = None
        self._connected = False
        self._version = MQTTProtocolVersion.MQTTv5
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
        attempt = 0
        while True:
            was_up = False
            try:
                was_up, why = await self._connect_once()
            except SyncError as error:
                why = str(error)  # the certificates cannot be read
            except Exception as error:
                # No thread or no descriptor to be had: that passes, and a node without a link is deaf for good.
                log.exception("an attempt to reach %s failed", self._options.url)
                why = f"the attempt failed: {error}"
            attempt = 1 if was_up else attempt + 1
            self._trouble = why
            self._tell(False, why)
            await asyncio.sleep(reconnect_delay(attempt, self._options, random.uniform, self._fleet_size))

    async def _connect_once(self) -> tuple[bool, str]:
        """One connection from its beginning to its end: whether it was up, and why it ended."""
        connection = _Connection(self, self._options, self._address, self._proxy, self._version, self._clean)
        self._connection = connection
        try:
            was_up = await self._serve(connection)
            wrong_version = connection.version_refused or connection.hung_up
        finally:
            self._lost()
            await connection.close()
        if wrong_version:
            # A broker without MQTT 5 should refuse the version, but some just hang up: then try the other one.
            self._version = _OTHER[self._version]
        return was_up, connection.why

    async def _serve(self, connection: _Connection) -> bool:
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

    def up(self, connection: _Connection, receive_maximum: int | None) -> None:
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

    def acknowledged(self, connection: _Connection, mid: int, failure: str | None) -> None:
        """The broker has the message, or refuses it: then sending it again would not help."""
        if connection is not self._connection:
            return
        packet = self._under_way.pop(mid, None)
        if packet is not None and failure is not None:
            self.refused += 1
            log.warning("the broker refused a publish on %s: %s", packet.topic, failure)
        self._pump()

    def arrived(self, connection: _Connection, message: Message) -> None:
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


class _Client(paho.Client):
    """paho's client, whose network thread says when it ends: the only reliable sign of life."""

    on_end: Callable[[], None]
    proxy: tunnel.Proxy | None = None

    def _create_socket_connection(self) -> socket.socket:
        """paho's own way through a proxy needs PySocks."""
        if self.proxy is None:
            return super()._create_socket_connection()
        return tunnel.connect(self.proxy, self._host, self._port, self._connect_timeout)

    def loop_forever(self, timeout: float = 1.0, retry_first_connection: bool = False) -> MQTTErrorCode:
        try:
            return super().loop_forever(timeout, retry_first_connection)
        finally:
            self.on_end()


class _Connection:
    """One paho client from CONNECT to its end. Callbacks run in paho's thread and only post into the event loop."""

    def __init__(
        self,
        link: Link,
        options: LinkOptions,
        address: Address,
        proxy: tunnel.Proxy | None,
        version: MQTTProtocolVersion,
        clean: bool,
    ) -> None:
        self.decided = asyncio.Event()
        self.ended = asyncio.Event()
        self.why = "connection lost"
        self.version_refused = False
        self._opened = self._answered = False
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._closing = self._started = False
        self._v5 = version == MQTTProtocolVersion.MQTTv5
        self.name = "MQTT 5" if self._v5 else "MQTT 3.1.1"
        self._client = self._build(options, address, version, clean)
        self._client.proxy = proxy
        self._client.connect_async(
            address.host,
            address.port,
            keepalive=options.keepalive,
            clean_start=clean,
            properties=_connect_properties(options.session_seconds) if self._v5 else None,
        )

    def _build(self, options: LinkOptions, address: Address, version: MQTTProtocolVersion, clean: bool) -> _Client:
        client = _Client(
            CallbackAPIVersion.VERSION2,
            options.client_id,
            clean_session=None if self._v5 else clean,
            protocol=version,
            transport="tcp" if address.path is None else "websockets",
            reconnect_on_failure=False,
        )
        if address.path is not None:
            client.ws_set_options(path=address.path)
        if address.tls and options.tls is not None:
            client.tls_set_context(options.tls())
        client.suppress_exceptions = True  # an exception in a callback ends the thread without a word: paho 365
        client.max_queued_messages_set(0)  # a limit here drops the newest, silently: paho 856
        client.max_inflight_messages_set(options.window)
        client.username_pw_set(options.username, options.password)
        if options.will is not None:
            client.will_set(options.will.topic, options.will.payload, qos=1, retain=True)
        client.on_end = lambda: self.post(self._on_end)
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        return client

    def start(self) -> None:
        self._client.loop_start()
        self._started = True

    def subscribe(self, filters: list[str]) -> None:
        for topic in filters:
            self._client.subscribe(topic, qos=1)

    def publish(self, packet: Packet) -> int:
        """The message id under which the broker's answer will come."""
        return self._client.publish(packet.topic, packet.payload, packet.qos, packet.retain).mid

    @property
    def hung_up(self) -> bool:
        """The broker took the socket and closed it without an answer."""
        return self._opened and not self._answered and not self._closing

    async def close(self) -> None:
        self._closing = True
        self._client.disconnect()
        if not self._started:
            return  # no thread will ever say that it ended
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.ended.wait()
        except TimeoutError:
            log.warning("paho's network thread did not end within %g s", CLOSE_SECONDS)

    def post(self, action: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(action, *args)
        except RuntimeError:
            log.debug("the event loop is closed: nobody is left to tell")

    # --- callbacks, in paho's thread ----------------------------------------------------------------------------

    def _on_socket_open(self, client: paho.Client, userdata: object, sock: Any) -> None:
        # Without it a publish from a callback costs 44 ms at the median, with it 0.6 (paho 874).
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._opened = True

    def _on_connect(
        self, client: paho.Client, userdata: object, flags: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._answered = True
        if self._closing:
            client.disconnect()
        elif reason.is_failure:
            self.why = f"the broker refused us: {reason}"
            self.version_refused = reason.value == 132  # MQTT 5, 3.2.2.2: unsupported protocol version
        else:
            self.post(self._link.up, self, getattr(properties, "ReceiveMaximum", None))
            self.post(self.decided.set)

    def _on_connect_fail(self, client: paho.Client, userdata: object) -> None:
        self.why = "no connection to the broker"
        client.disconnect()  # paho would retry by itself, without jitter; the supervisor does

    def _on_disconnect(
        self, client: paho.Client, userdata: object, flags: object, reason: ReasonCode, properties: object
    ) -> None:
        if reason.value != 0 and self.why == "connection lost":
            self.why = f"connection lost: {reason}"

    def _on_subscribe(
        self, client: paho.Client, userdata: object, mid: int, reasons: list[ReasonCode], properties: object
    ) -> None:
        # A grant proves nothing (mosquitto grants what it will filter), a refusal does.
        for reason in reasons:
            if reason.is_failure:
                log.warning("the broker refused a subscription: %s", reason)

    def _on_publish(
        self, client: paho.Client, userdata: object, mid: int, reason: ReasonCode, properties: object
    ) -> None:
        # paho counts a refused publish as published: only the reason code tells, and only in MQTT 5.
        self.post(self._link.acknowledged, self, mid, str(reason) if reason.is_failure else None)

    def _on_message(self, client: paho.Client, userdata: object, message: paho.MQTTMessage) -> None:
        self._link.arrived(self, Message(message.topic, bytes(message.payload), message.retain))

    def _on_end(self) -> None:
        self.ended.set()
        self.decided.set()


def _connect_properties(session_seconds: int) -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = session_seconds
    properties.MaximumPacketSize = 2 * MAX_MESSAGE_BYTES
    return properties
