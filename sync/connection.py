"""One connection to a broker, from CONNECT to its end. The only importer of paho.

Its callbacks run in paho's network thread, whose end is the only reliable sign of life, never `is_connected()`. Numbers after
`paho` are issues of paho.mqtt.python.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from sync import tunnel
from sync.channel import Address, LinkOptions, Message
from sync.messages import MAX_MESSAGE_BYTES
from sync.outgoing import Packet

CLOSE_SECONDS = 3.0
"""How long leaving waits for paho's thread; it is a daemon and is abandoned after that."""

log = logging.getLogger(__name__)


class Owner(Protocol):
    """Who is told what happens; `arrived` in paho's thread, the others in the event loop."""

    def up(self, connection: Connection, receive_maximum: int | None) -> None: ...
    def acknowledged(self, connection: Connection, mid: int, failure: str | None) -> None: ...
    def arrived(self, connection: Connection, message: Message) -> None: ...


class Client(paho.Client):
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


class Connection:
    """One paho client. `v5`: MQTT 5, else 3.1.1. `clean`: begin a new session."""

    def __init__(
        self,
        owner: Owner,
        options: LinkOptions,
        address: Address,
        proxy: tunnel.Proxy | None,
        v5: bool,
        clean: bool,
    ) -> None:
        self.decided = asyncio.Event()
        self.ended = asyncio.Event()
        self.why = "connection lost"
        self.version_refused = False
        self._opened = self._answered = False
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._closing = self._started = False
        self._v5 = v5
        self.name = "MQTT 5" if self._v5 else "MQTT 3.1.1"
        self._client = self._build(options, address, clean)
        self._client.proxy = proxy
        self._client.connect_async(
            address.host,
            address.port,
            keepalive=options.keepalive,
            clean_start=clean,
            properties=_connect_properties(options.session_seconds) if self._v5 else None,
        )

    def _build(self, options: LinkOptions, address: Address, clean: bool) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            options.client_id,
            clean_session=None if self._v5 else clean,
            protocol=MQTTProtocolVersion.MQTTv5 if self._v5 else MQTTProtocolVersion.MQTTv311,
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
            self.post(self._owner.up, self, getattr(properties, "ReceiveMaximum", None))
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
        self.post(self._owner.acknowledged, self, mid, str(reason) if reason.is_failure else None)

    def _on_message(self, client: paho.Client, userdata: object, message: paho.MQTTMessage) -> None:
        self._owner.arrived(self, Message(message.topic, bytes(message.payload), message.retain))

    def _on_end(self) -> None:
        self.ended.set()
        self.decided.set()


def _connect_properties(session_seconds: int) -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = session_seconds
    properties.MaximumPacketSize = 2 * MAX_MESSAGE_BYTES
    return properties
