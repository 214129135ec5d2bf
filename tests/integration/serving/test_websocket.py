"""WebSocket sessions over real sockets with a client that nobody here wrote: TCP and Unix, asyncio and uvloop."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from models.errors import NotFound
from models.serving.exchange import HttpRequest
from models.serving.http.server import serve_http
from models.serving.http.service import HttpLimits, HttpService
from models.serving.index import ModelDescription
from models.serving.plane import DataPlane
from models.serving.predictor import InferRequest, InferResponse
from models.serving.rest import RestHandler
from models.serving.websocket.frames import SUBPROTOCOL
from models.serving.websocket.limits import WebSocketLimits
from models.serving.websocket.server import WebSockets

SECONDS = 20


class Echo:
    """Answers with its input; "slow" after a turn of the loop, "stuck" never."""

    async def infer(self, request: InferRequest) -> InferResponse:
        if request.model == "slow":
            await asyncio.sleep(0.001)
        elif request.model == "stuck":
            await asyncio.get_running_loop().create_future()
        return InferResponse(outputs=request.inputs, model=request.model, package="p", version="1", tier="edge")


class Index:
    versions = ("1",)

    def names(self) -> list[str]:
        return ["m"]

    def describe(self, model: str, version: str | None) -> ModelDescription:
        if model != "m":
            raise NotFound(f"model '{model}' is not served here")
        return ModelDescription("m", "p", self.versions, "onnx_fp32", (), ())

    def is_ready(self, model: str, version: str | None) -> bool:
        return True


class Server:
    def __init__(self, url: str, sockets: WebSockets, rest: RestHandler, index: Index) -> None:
        self.url, self.sockets, self.rest, self.index = url, sockets, rest, index

    def connect(self, **options: Any) -> connect:
        return connect(self.url, subprotocols=[SUBPROTOCOL], max_size=None, open_timeout=SECONDS, **options)


@asynccontextmanager
async def serving(**limits: Any) -> AsyncIterator[Server]:
    index = Index()
    plane = DataPlane(Echo(), index, ready=lambda: True)
    sockets = WebSockets(plane, limits=WebSocketLimits(**limits))
    rest = RestHandler(plane, extra={"/v2/ws": sockets})
    async with serve_http(rest, drain_seconds=1) as server:
        try:
            yield Server(f"ws://{server.host}:{server.port}/v2/ws", sockets, rest, index)
        finally:
            await sockets.close(1)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[None]], None]:
    loops = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

    def run(main: Awaitable[None]) -> None:
        with asyncio.Runner(loop_factory=loops[request.param]) as runner:
            runner.run(asyncio.wait_for(main, SECONDS))

    return run


Run = Callable[[Awaitable[None]], None]


def infer(request_id: str, values: list[float], model: str = "m") -> str:
    tensor = {"name": "x", "datatype": "FP32", "shape": [len(values)], "data": values}
    return json.dumps({"op": "infer", "id": request_id, "model": model, "request": {"inputs": [tensor]}})


def binary_infer(request_id: str, data: bytes) -> tuple[bytes, bytes]:
    """The message, and the body of the request in it."""
    tensor = {"name": "x", "datatype": "UINT8", "shape": [len(data)], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    envelope = {"op": "infer", "id": request_id, "model": "m", "header_length": len(head)}
    packed = json.dumps(envelope).encode()
    return struct.pack("<I", len(packed)) + packed + head + data, head + data


async def receive(link: ClientConnection) -> Any:
    return json.loads(await link.recv())


def test_many_requests_at_once_each_get_their_own_answer(run: Run) -> None:
    async def main() -> None:
        async with serving() as server, server.connect() as link:
            assert link.subprotocol == SUBPROTOCOL

            async def ask() -> None:
                for number in range(500):
                    await link.send(infer(str(number), [number], ("m", "slow")[number % 2]))

            asking = asyncio.ensure_future(ask())
            answers = [await receive(link) for _ in range(500)]
            await asking
            assert {int(each["id"]): each["response"]["outputs"][0]["data"] for each in answers} == {
                number: [number] for number in range(500)
            }

    run(main())


def test_binary_messages_say_what_rest_says(run: Run) -> None:
    async def main() -> None:
        async with serving() as server, server.connect(compression=None) as link:
            for size in (0, 1, 300, 70_000, 5_000_000):
                data = np.random.default_rng(size).bytes(size)
                message, body = binary_infer("é", data)
                await link.send(message)
                answer = await link.recv(decode=False)
                (length,) = struct.unpack_from("<I", answer)
                envelope = json.loads(answer[4 : 4 + length])
                assert (envelope["op"], envelope["id"]) == ("answer", "é")
                header = b"%d" % (len(body) - size)
                over_rest = await server.rest(_rest(body, header))
                assert isinstance(over_rest.body, list)
                assert answer[4 + length :] == b"".join(over_rest.body)
                assert b"length: %d\r\n" % envelope["header_length"] in over_rest.headers

    run(main())


def _rest(body: bytes, header_length: bytes) -> HttpRequest:
    from models.serving.exchange import HttpHead

    headers = {b"inference-header-content-length": header_length}
    return HttpRequest(HttpHead("POST", "/v2/models/m/infer", "", headers), body)


def test_a_client_is_told_of_new_versions(run: Run) -> None:
    async def main() -> None:
        async with serving() as server, server.connect() as link:
            await link.send(json.dumps({"op": "subscribe", "model": "m"}))
            assert (await receive(link))["versions"] == ["1"]
            server.index.versions = ("1", "2")
            server.sockets.sweep()
            assert await receive(link) == {"op": "model", "model": "m", "versions": ["1", "2"]}

    run(main())


def test_pings_are_answered_both_ways(run: Run) -> None:
    async def main() -> None:
        async with serving(ping_seconds=0.0) as server, server.connect() as link:
            await asyncio.wait_for(await link.ping(), SECONDS)
            (session,) = server.sockets.sessions
            server.sockets.sweep()
            assert session._pinged is not None
            await link.send(infer("1", [1]))  # the client's pong came before this
            await receive(link)
            assert session._pinged is None

    run(main())


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"x" * 2000, 1009),
        ([b"x"] * 20, 1009),
    ],
)
def test_a_message_above_its_limits_ends_the_session_with_a_reason(run: Run, message: Any, code: int) -> None:
    async def main() -> None:
        async with serving(message_bytes=1000, message_frames=10) as server, server.connect() as link:
            with suppress(ConnectionClosed):  # it may be told while it still sends
                await link.send(message)
            with pytest.raises(ConnectionClosed) as caught:
                await link.recv()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == code

    run(main())


def test_a_client_that_does_not_read_stops_being_read(run: Run) -> None:
    async def main() -> None:
        async with serving() as server, server.connect(compression=None, max_queue=1) as link:
            message, _ = binary_infer("000", bytes(1_000_000))
            sent = 0

            async def push() -> None:
                nonlocal sent
                while True:
                    await link.send(message.replace(b'"000"', b'"%03d"' % sent, 1))
                    sent += 1

            (session,) = server.sockets.sessions
            pushing = asyncio.ensure_future(push())
            while session._reading:
                assert sent < 400, "400 MB were taken from a client that reads nothing"
                await asyncio.sleep(0.01)
            for number in range(sent):
                answer = await link.recv(decode=False)
                assert b'"%03d"' % number in answer[:100]
            pushing.cancel()
            link.transport.abort()

    run(main())


def test_a_server_that_closes_says_so(run: Run) -> None:
    async def main() -> None:
        async with serving() as server:
            idle, stuck = await server.connect(), await server.connect()
            await stuck.send(infer("1", [1], "stuck"))
            await server.sockets.close(0.2)
            with pytest.raises(ConnectionClosed) as caught:
                await idle.recv()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1001
            with pytest.raises(ConnectionClosed):
                await stuck.recv()
            with pytest.raises(InvalidStatus, match="503"):
                await server.connect()
            assert server.sockets.connections == 0

    run(main())


def test_a_page_of_another_origin_is_refused(run: Run) -> None:
    async def main() -> None:
        async with serving() as server:
            with pytest.raises(InvalidStatus, match="403"):
                await server.connect(origin="https://evil.example")

    run(main())


def test_the_same_over_a_unix_socket(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        plane = DataPlane(Echo(), Index(), ready=lambda: True)
        sockets = WebSockets(plane)
        loop = asyncio.get_running_loop()
        service = HttpService(RestHandler(plane, extra={"/v2/ws": sockets}), HttpLimits(), loop)
        path = str(tmp_path / "s")
        listening = await loop.create_unix_server(service.connect, path)
        async with unix_connect(path, "ws://tierline/v2/ws") as link:
            await link.send(infer("1", [1]))
            assert (await receive(link))["response"]["outputs"][0]["data"] == [1]
        await sockets.close(1)
        service.abort()
        listening.close()

    run(main())
