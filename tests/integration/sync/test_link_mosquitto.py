"""The link against a real broker: it comes back by itself and loses nothing that matters."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from sync.channel import LinkOptions, Message, Will
from sync.link import Link
from tests.integration.sync.conftest import Mosquitto, free_port

pytestmark = pytest.mark.broker


def options(url: str, name: str, **more: object) -> LinkOptions:
    return LinkOptions(url=url, client_id=name, min_delay=0.05, max_delay=0.2, **more)  # type: ignore[arg-type]


async def take(messages: AsyncIterator[Message], count: int = 1) -> list[Message]:
    async with asyncio.timeout(10):
        return [await anext(messages) for _ in range(count)]


async def when(ready: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not ready():
            await asyncio.sleep(0.01)


async def test_what_is_published_arrives_in_order(broker: Mosquitto) -> None:
    async with Link(options(broker.url, "a")) as a, Link(options(broker.url, "b")) as b:
        a.subscribe("x/#")
        await when(lambda: a.connected and b.connected)
        b.publish("x/warm", b"")
        inbox = a.messages()
        await take(inbox)
        for number in range(200):
            b.publish("x/n", b"%d" % number, qos=number % 2)
        got = [message.payload for message in await take(inbox, 200)]
        assert [item for item in got if int(item) % 2] == [b"%d" % number for number in range(1, 200, 2)]
        assert sorted(got, key=int) == [b"%d" % number for number in range(200)]
        await when(lambda: b.pending == 0)


async def test_only_the_newest_retained_value_is_sent_by_a_link_that_was_offline(broker: Mosquitto) -> None:
    broker.stop()
    async with Link(options(broker.url, "a")) as a:
        for value in (b"1", b"2", b"3"):
            a.publish("level", value, retain=True)
        assert a.pending == 1
        broker.start()
        async with Link(options(broker.url, "b")) as b:
            b.subscribe("level")
            (message,) = await take(b.messages())
            assert message == Message("level", b"3", message.retain)


async def test_after_a_broker_that_forgot_everything_subscriptions_and_unsent_messages_are_back(
    broker: Mosquitto,
) -> None:
    async with Link(options(broker.url, "a")) as a:
        a.subscribe("x/#")
        births: list[bool] = []
        a.on_connect(lambda: births.append(True))
        await when(lambda: a.connected)
        broker.stop(kill=True)
        await when(lambda: not a.connected)
        a.publish("x/fleeting", b"lost", qos=0)
        a.publish("x/state", b"kept", retain=True)
        a.publish("x/event", b"kept too")
        broker.start()
        got = {message.topic: message.payload for message in await take(a.messages(), 2)}
        assert got == {"x/state": b"kept", "x/event": b"kept too"}
        assert len(births) == 2
        assert a.dropped == 1


async def test_a_link_that_vanishes_is_reported_by_its_will_and_one_that_leaves_is_not(broker: Mosquitto) -> None:
    async with Link(options(broker.url, "watcher")) as watcher:
        watcher.subscribe("state/#")
        async with Link(options(broker.url, "polite", will=Will("state/polite", b"lost"))) as polite:
            await when(lambda: polite.connected)
        async with Link(options(broker.url, "rude", will=Will("state/rude", b"lost"))) as rude:
            await when(lambda: rude.connected)
            sock = rude._connection._client.socket()  # type: ignore[union-attr]
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # type: ignore[union-attr]
            sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
            (message,) = await take(watcher.messages())
            assert message.topic == "state/rude"
            await when(lambda: rude.connected)


async def test_small_packets_are_sent_at_once(broker: Mosquitto) -> None:
    async with Link(options(broker.url, "a")) as a:
        await when(lambda: a.connected)
        sock = a._connection._client.socket()  # type: ignore[union-attr]
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0  # type: ignore[union-attr]


async def test_an_exception_in_a_callback_does_not_end_the_link(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Link(options(broker.url, "a")) as a, Link(options(broker.url, "b")) as b:
        a.subscribe("x")
        a.on_connect(lambda: 1 / 0)
        await when(lambda: a.connected and b.connected)
        arrived, failures = a.arrived, []

        def fail_once(connection: object, message: Message) -> None:
            if not failures:
                failures.append(message)
                raise RuntimeError("a mistake")
            arrived(connection, message)  # type: ignore[arg-type]

        monkeypatch.setattr(a, "arrived", fail_once)
        b.publish("x", b"1")
        b.publish("x", b"2")
        (message,) = await take(a.messages())
        assert (message.payload, len(failures)) == (b"2", 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_network_thread_that_dies_is_replaced(broker: Mosquitto, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Link(options(broker.url, "a")) as a:
        await when(lambda: a.connected)
        first = a._connection
        client = first._client  # type: ignore[union-attr]

        def die(*args: object) -> None:
            raise RuntimeError("inside paho")

        monkeypatch.setattr(client, "_loop", die)
        await when(lambda: a.connected and a._connection is not first)


async def test_a_flood_is_bounded_and_counted(broker: Mosquitto) -> None:
    async with Link(options(broker.url, "a", max_incoming=5)) as a, Link(options(broker.url, "b")) as b:
        a.subscribe("x")
        await when(lambda: a.connected and b.connected)
        for number in range(50):
            b.publish("x", b"%d" % number)
        await when(lambda: a.lost_incoming == 45)
        assert len(await take(a.messages(), 5)) == 5


async def test_leaving_leaves_no_thread_behind(broker: Mosquitto) -> None:
    before = threading.active_count()
    async with Link(options(broker.url, "a")) as a:
        await when(lambda: a.connected)
    await when(lambda: threading.active_count() <= before)


class OldBroker:
    """Speaks MQTT 3.1.1 only: refuses, or hangs up on, anything newer. Records the protocol levels it was offered."""

    def __init__(self, *, polite: bool) -> None:
        self.levels: list[int] = []
        self.port = free_port()
        self._polite = polite

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while packet := await reader.read(4096):
                if packet[0] >> 4 == 1:
                    level = packet[8]
                    self.levels.append(level)
                    if level == 4:
                        writer.write(b"\x20\x02\x00\x00")
                        continue
                    if self._polite:
                        writer.write(b"\x20\x02\x00\x01")
                    return
                if packet[0] >> 4 == 14:
                    return
        finally:
            writer.close()


@pytest.mark.parametrize("polite", [True, False])
async def test_a_broker_without_mqtt_5_is_spoken_to_in_3_1_1(polite: bool) -> None:
    old = OldBroker(polite=polite)
    server = await asyncio.start_server(old.serve, "127.0.0.1", old.port)
    async with server, Link(options(f"mqtt://127.0.0.1:{old.port}", "a")) as a:
        await when(lambda: a.connected)
        assert old.levels == [5, 4]
