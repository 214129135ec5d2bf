"""The proxy over real sockets: what passes, what does not, and that a fault knows whether it fired."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator

import pytest

from sync.chaos import Answer503, BlackHole, Corrupt, Drip, HalfOpen, Lag, LinkCut, NeverFired, Proxy, Reset

DATA = os.urandom(300_000)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        pass
    finally:
        writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with Proxy(f"{host}:{port}") as found:
        yield found
    server.close()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, data: bytes, timeout: float = 5.0) -> bytes:
        self.writer.write(data)
        async with asyncio.timeout(timeout):
            return await self.reader.readexactly(len(data))


async def connect(proxy: Proxy, timeout: float = 5.0) -> Client:
    async with asyncio.timeout(timeout):
        return Client(*await asyncio.open_connection(*proxy.address))


async def test_without_a_fault_every_byte_passes_and_the_end_too(proxy: Proxy) -> None:
    client = await connect(proxy)
    client.writer.write(DATA)
    client.writer.write_eof()
    assert await client.reader.read(-1) == DATA
    async with asyncio.timeout(5):
        while proxy.open_connections:
            await asyncio.sleep(0.01)


async def test_a_cut_link_delivers_what_was_sent_meanwhile_once_it_is_back(proxy: Proxy) -> None:
    client = await connect(proxy)
    await client.ask(b"before")
    fault = LinkCut()
    async with proxy.suffering(fault):
        with pytest.raises(TimeoutError):
            await client.ask(b"during", 0.2)
        with pytest.raises(TimeoutError):
            await connect(proxy, 0.3)
    async with asyncio.timeout(5):
        assert await client.reader.readexactly(6) == b"during"
    assert fault.tally.unanswered > 0
    assert await (await connect(proxy)).ask(b"after") == b"after"


async def test_a_black_hole_answers_no_handshake_and_resets_who_spoke_into_it(proxy: Proxy) -> None:
    client = await connect(proxy)
    async with proxy.suffering(BlackHole()):
        with pytest.raises(TimeoutError):
            await connect(proxy, 0.3)
        with pytest.raises(TimeoutError):
            await client.ask(b"lost", 0.2)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await client.ask(b"again")
    assert await (await connect(proxy)).ask(b"after") == b"after"


async def test_half_open_accepts_and_never_answers(proxy: Proxy) -> None:
    fault = HalfOpen()
    async with proxy.suffering(fault):
        client = await connect(proxy)
        with pytest.raises(TimeoutError):
            await client.ask(b"hello", 0.2)
    assert fault.tally.bytes == 5
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await client.ask(b"again")


async def test_reset_ends_open_connections_and_new_ones(proxy: Proxy) -> None:
    client = await connect(proxy)
    await client.ask(b"before")
    async with proxy.suffering(Reset()):
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await client.ask(b"during")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await (await connect(proxy)).ask(b"during")


async def test_lag_is_felt_both_ways_and_does_not_limit_the_rate(proxy: Proxy) -> None:
    client = await connect(proxy)
    async with proxy.suffering(Lag(0.1)):
        began = time.monotonic()
        assert await client.ask(DATA) == DATA
        took = time.monotonic() - began
    assert 0.2 <= took < 1.5


async def test_a_drip_keeps_its_rate_and_ends_with_its_fault(proxy: Proxy) -> None:
    client = await connect(proxy)
    async with proxy.suffering(Drip(2_000.0, "down")):
        began = time.monotonic()
        await client.ask(bytes(1_000))
        assert 0.4 <= time.monotonic() - began < 2.0
        client.writer.write(DATA)
        await asyncio.sleep(0.1)
    async with asyncio.timeout(5):
        assert await client.reader.readexactly(len(DATA)) == DATA


async def test_corruption_changes_bytes_and_neither_adds_nor_loses_any(proxy: Proxy) -> None:
    client = await connect(proxy)
    async with proxy.suffering(Corrupt(1_000)):
        assert await client.ask(DATA) != DATA


async def test_a_refused_request_is_answered_by_the_proxy_and_the_connection_lives_on(proxy: Proxy) -> None:
    client = await connect(proxy)
    request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    async with proxy.suffering(Answer503()):
        for _ in range(3):
            client.writer.write(request)
            async with asyncio.timeout(5):
                head = await client.reader.readuntil(b"\r\n\r\n")
                await client.reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            assert head.startswith(b"HTTP/1.1 503")
    assert await client.ask(request) == request


async def test_a_fault_that_nothing_met_fails_the_block(proxy: Proxy) -> None:
    with pytest.raises(NeverFired, match="lag"):
        async with proxy.suffering(Lag(0.1)):
            pass


async def test_one_fault_at_a_time(proxy: Proxy) -> None:
    await proxy.begin(Lag(0.1))
    with pytest.raises(RuntimeError, match="lag is still on"):
        await proxy.begin(Reset())
    await proxy.end()
