"""Ways out of a strict network: WebSocket, HTTP proxies, and a broker that knows MQTT 3.1.1 only."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.broker import find_mosquitto, has_websockets
from sync.channel import LinkOptions
from sync.clock import SystemClock
from sync.download import Download, Limits, Route
from sync.enrol import join_hub
from sync.link import Link
from sync.renewal import Renewal
from sync.tunnel import connect, read_proxy
from tests.integration.identity.conftest import Site, eventually, running_site

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed: ways out were NOT tested"),
]
NODE = "acme.edge-1"


class Proxy:
    """An HTTP proxy that only tunnels. `opened`: where to. `answer`: what it says instead of opening the tunnel."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.credentials: list[str] = []
        self.answer: bytes | None = None
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = head[0].split(" ")
        self.credentials += [line.partition(": ")[2] for line in head if line.lower().startswith("proxy-authorization")]
        if self.answer is not None or method != "CONNECT":
            writer.write(self.answer or b"HTTP/1.1 405 Method Not Allowed\r\n\r\n")
            await writer.drain()
            return
        self.opened.append(target)
        host, _, port = target.rpartition(":")
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65_536):
            sink.write(data)
            await sink.drain()
    except OSError:
        pass
    sink.close()


@asynccontextmanager
async def proxy() -> AsyncIterator[Proxy]:
    running = Proxy()
    server = await asyncio.start_server(running.serve, "127.0.0.1", 0)
    running.url = f"http://us%65r:p%40ss@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield running
    finally:
        server.close()


async def test_broker_hub_and_files_are_reached_through_a_proxy(site: Site) -> None:
    async with proxy() as way:
        token = await site.in_thread(site.invite)
        joined = await site.in_thread(join_hub, site.url, token, site.folder / NODE, tier="edge", proxy=way.url)
        assert f'proxy = "{way.url}"' in joined.config.read_text()
        hub = site.url.removeprefix("https://")
        assert way.opened == [hub] * 2
        identity = site.identity(NODE)
        options = LinkOptions(url=site.mqtts, client_id=NODE, tls=identity.link_context, proxy=way.url)
        async with Link(options) as link:
            await eventually(lambda: link.connected)
            assert way.opened[-1] == site.mqtts.removeprefix("mqtts://")
        await site.in_thread(Renewal(identity, site.url, SystemClock(), proxy=way.url).renew)
        route = Route(identity.http_context, read_proxy(way.url))
        fetch = Download(f"{site.url}/tuf/timestamp.json", identity.bearer, Limits(), route=route)
        before = len(way.opened)
        assert await site.in_thread(fetch.read, 100_000)
        assert len(way.opened) == before + 1
        assert set(way.credentials) == {f"Basic {base64.b64encode(b'user:p@ss').decode()}"}


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "407"),
        (b"HTTP/1.1 200 " + b"x" * 20_000, "did not finish"),
        (b"\r\n\r\n", "refused"),
        (b"nonsense\r\n\r\n", "refused"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "refused"),
    ],
)
async def test_a_proxy_that_refuses_or_babbles_is_an_error_and_no_more(answer: bytes, match: str) -> None:
    async with proxy() as way:
        way.answer = answer
        with pytest.raises(OSError, match=match):
            await asyncio.to_thread(connect, read_proxy(way.url), "127.0.0.1", 1, 2.0)


@pytest.mark.skipif(
    find_mosquitto() is None or not has_websockets(str(find_mosquitto())),
    reason="this mosquitto has no WebSockets: MQTT over WebSocket was NOT tested against it",
)
async def test_mqtt_over_websocket_with_tls_and_a_certificate(tmp_path: Path) -> None:
    async with running_site(tmp_path, websocket=True) as site:
        await site.in_thread(site.join)
        assert site.broker.secure is not None
        url = f"wss://127.0.0.1:{site.broker.secure.websocket_port}/mqtt"
        options = LinkOptions(url=url, client_id=NODE, tls=site.identity(NODE).link_context)
        async with proxy() as way, Link(options) as link:
            await eventually(lambda: link.connected)
            link.publish(f"tierline/v1/{NODE}/up/state", b'{"state":"ready","boot":"b"}', retain=True)
            await eventually(lambda: site.client.get(f"/api/v1/nodes/{NODE}")["state"] == "ready", thread=True)
            through = LinkOptions(
                url=url, client_id=NODE, tls=site.identity(NODE).link_context, proxy=way.url, keepalive=30
            )
            async with Link(through) as other:
                await eventually(lambda: other.connected)
                assert way.opened


@asynccontextmanager
async def old_broker(context: ssl.SSLContext) -> AsyncIterator[tuple[int, list[int], list[bytes]]]:
    """Speaks MQTT 3.1.1 and refuses 5 (3.1.1, 3.2.2.3: return code 1). Yields port, protocol levels seen, PUBLISH packets."""
    levels: list[int] = []
    published: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                kind = (await reader.readexactly(1))[0]
                length = shift = 0
                while True:
                    byte = (await reader.readexactly(1))[0]
                    length |= (byte & 127) << shift
                    shift += 7
                    if byte < 128:
                        break
                body = await reader.readexactly(length)
                if kind >> 4 == 1:
                    levels.append(body[6])
                    writer.write(bytes([0x20, 2, 0, 0 if body[6] == 4 else 1]))
                    if body[6] != 4:
                        break
                elif kind >> 4 == 3:
                    published.append(body)
                    topic = int.from_bytes(body[:2], "big")
                    writer.write(bytes([0x40, 2]) + body[2 + topic : 4 + topic])
                elif kind >> 4 == 8:
                    writer.write(bytes([0x90, 3]) + body[:2] + b"\x01")
                elif kind >> 4 == 12:
                    writer.write(b"\xd0\x00")
        except (asyncio.IncompleteReadError, OSError):
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1], levels, published
    finally:
        server.close()


async def test_a_broker_that_knows_3_1_1_alone_is_spoken_to_in_it_with_the_certificate(site: Site) -> None:
    await site.in_thread(site.join)
    tls = site.data / "tls"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "server.crt", tls / "server.key")
    context.load_verify_locations(tls / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    async with old_broker(context) as (port, levels, published):
        options: Any = LinkOptions(
            url=f"mqtts://127.0.0.1:{port}", client_id=NODE, tls=site.identity(NODE).link_context, min_delay=0.01
        )
        async with Link(options) as link:
            link.publish(f"tierline/v1/{NODE}/up/event", b"hello")
            await eventually(lambda: link.connected and link.pending == 0)
    assert levels[:2] == [5, 4]
    assert b"hello" in published[0]
