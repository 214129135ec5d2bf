"""The fast HTTP front and the plain ASGI twin give the same answers, byte for byte, however the requests arrive."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import threading
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
import uvicorn
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import DeadlineExceeded, EngineFailure, NotFound, Overloaded, Unauthenticated
from models.serving.asgi import AsgiApp
from models.serving.caller import Caller, Peer
from models.serving.exchange import HttpRequest, HttpResponse
from models.serving.http.connection import HttpConnection
from models.serving.http.server import serve_http
from models.serving.http.service import HttpLimits, HttpService
from models.serving.index import ModelDescription
from models.serving.plane import DataPlane
from models.serving.predictor import InferRequest, InferResponse
from models.serving.rest import RestHandler
from models.tensor import TensorSpec

COMPARED = (
    "content-type",
    "content-length",
    "content-encoding",
    "inference-header-content-length",
    "retry-after",
    "www-authenticate",
)
BOUNDED = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
)
SECONDS = 20
T = TypeVar("T")


class Message(msgspec.Struct, frozen=True):
    """A request as a client means it."""

    method: str
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    chunked: bool = False

    def wire(self) -> bytes:
        lines = [b"%b %b HTTP/1.1\r\n" % (self.method.encode(), self.target)]
        lines += [b"%b: %b\r\n" % pair for pair in self.framed()]
        body = self.body
        if self.chunked:
            cut = len(body) // 2
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:cut], body[cut:]) if part)
            body += b"0\r\n\r\n"
        return b"".join(lines) + b"\r\n" + body

    def framed(self) -> list[tuple[bytes, bytes]]:
        framing = (b"Transfer-Encoding", b"chunked") if self.chunked else (b"Content-Length", b"%d" % len(self.body))
        return [(b"Host", b"h"), *self.headers, framing]

    def scope(self) -> dict[str, Any]:
        path, _, query = self.target.partition(b"?")
        headers = [(name.lower(), value) for name, value in self.framed()]
        return {
            "type": "http",
            "method": self.method,
            "path": "",
            "raw_path": path,
            "query_string": query,
            "headers": headers,
            "client": ("127.0.0.1", 1),
        }


class Answer(msgspec.Struct, frozen=True):
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


# --- one data plane for both -------------------------------------------------------------------------------------------

ERRORS = {
    "late": DeadlineExceeded("too late"),
    "busy": Overloaded("too much", retry_after=2.0),
    "broken": EngineFailure("the engine failed"),
    "bug": KeyError("a secret"),
}


class Echo:
    async def infer(self, request: InferRequest) -> InferResponse:
        error = ERRORS.get(request.model)
        if error is not None:
            raise error
        if request.model == "slow":
            await asyncio.sleep(0.0005)
        outputs = {
            name: array for name, array in request.inputs.items() if not request.outputs or name in request.outputs
        }
        return InferResponse(
            outputs=outputs, model=request.model, package="p", version=request.version or "1", tier="edge"
        )


class Index:
    def names(self) -> list[str]:
        return ["m", "ä b"]

    def describe(self, model: str, version: str | None) -> ModelDescription:
        if model not in self.names() or version not in (None, "1"):
            raise NotFound(f"no model '{model}' version {version}")
        spec = TensorSpec("x", "FP32", (-1, 4))
        return ModelDescription(model, "p", ("1",), "onnx_fp32", (spec,), (spec,))

    def is_ready(self, model: str, version: str | None) -> bool:
        return self.describe(model, version) is not None


class Tokens:
    revision = 0

    def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
        if authorization == b"Bearer bad":
            raise Unauthenticated("the token is not valid")
        return Caller(admin=authorization == b"Bearer admin", client=repr(peer))

    def may_use(self, caller: Caller, model: str) -> bool:
        return model != "hidden"


def handler() -> RestHandler:
    async def other(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, body=[request.path.encode("latin-1"), b" ", request.query.encode("latin-1")])

    return RestHandler(DataPlane(Echo(), Index(), ready=lambda: True, access=Tokens()), extra={"/other": other})


# --- what is sent ------------------------------------------------------------------------------------------------------


def tensor(name: str, array: Any, datatype: str, data: object) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": data}


def json_bodies() -> Iterator[bytes]:
    numbers = np.arange(8, dtype=np.float32).reshape(2, 4)
    one: dict[str, Any] = {"inputs": [tensor("x", numbers, "FP32", numbers.tolist())]}
    yield json.dumps(one).encode()
    yield json.dumps({**one, "id": "né-7", "parameters": {"priority": 1}}).encode()
    yield json.dumps({**one, "outputs": [{"name": "x"}]}, indent=2).encode()
    yield json.dumps({**one, "outputs": [{"name": "x", "parameters": {"binary_data": True}}]}).encode()
    yield json.dumps({**one, "parameters": {"binary_data_output": True}}).encode()
    yield json.dumps({"inputs": one["inputs"] * 2}).encode()
    yield json.dumps({"inputs": [tensor("t", np.empty(2), "BYTES", ["a", "ü"])]}).encode()
    yield json.dumps({"inputs": [tensor("i", np.empty(2), "INT8", [1, 300])]}).encode()
    yield json.dumps({"inputs": [tensor("i", np.empty(2), "INT8", [1, -3])]}).encode()
    yield json.dumps({"inputs": [tensor("b", np.empty(1), "BOOL", [True])]}).encode()
    yield json.dumps({"inputs": [tensor("x", np.empty((0, 4)), "FP32", [])]}).encode()
    yield json.dumps({"inputs": [tensor("x", np.empty(3), "FP32", list(range(600)))]}).encode()
    yield json.dumps({"inputs": [tensor("x", np.empty(600), "FP32", list(range(600)))]}).encode()
    yield json.dumps({**one, "parameters": {"min_confidence": 7}}).encode()
    yield b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}'
    yield b'{"inputs":[{"name":"x","datatype":"FP32","shape":[99999999999,99999999999],"data":[1]}]}'
    yield from (b"", b"{}", b"[", b"\xff\xfe", b"[" * 5000, b'{"inputs":[]}', b'{"ready":true}', b"null")


BINARY_HEAD = (
    b'{"inputs":[{"name":"x","datatype":"UINT8","shape":[%d],"parameters":{"binary_data_size":%d}}],'
    b'"parameters":{"binary_data_output":%b}}'
)


def binary_messages() -> Iterator[tuple[tuple[tuple[bytes, bytes], ...], bytes]]:
    for size, claimed, out in (
        (3, 3, b"true"),
        (3, 3, b"false"),
        (2000, 2000, b"true"),
        (3, 4, b"true"),
        (0, 0, b"true"),
    ):
        head = BINARY_HEAD % (size, claimed, out)
        for length in (len(head), len(head) - 1, len(head) + 1, 0):
            headers = ((b"Inference-Header-Content-Length", b"%d" % length),)
            yield headers, head + bytes(range(size % 256)) + bytes(size - size % 256)


def raw_deflate(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


PACKINGS: list[tuple[bytes, Callable[[bytes], bytes]]] = [
    (b"gzip", gzipped),
    (b"deflate", zlib.compress),
    (b"deflate", raw_deflate),
    (b"gzip", lambda body: gzipped(body)[:-3]),
    (b"gzip", lambda body: body),
    (b"br", lambda body: body),
    (b"identity", lambda body: body),
]
BODIES = [((), body) for body in json_bodies()] + list(binary_messages())
TARGETS = [
    b"/v2/models/m/infer",
    b"/v2/models/%C3%A4%20b/infer",
    b"/v2/models/m/versions/1/infer",
    b"/v2/models/slow/infer",
    b"/v2/models/late/infer",
    b"/v2/models/busy/infer",
    b"/v2/models/broken/infer",
    b"/v2/models/bug/infer",
    b"/v2/models/hidden/infer",
    b"/v2/models/m/infer?a=b&c",
    b"/v2/models/m/infer/",
]
OTHER_TARGETS = [
    b"/",
    b"/v2",
    b"/v2/",
    b"/v2?x",
    b"/v2/health/live",
    b"/v2/health/ready",
    b"/v2/models/m",
    b"/v2/models/m/ready",
    b"/v2/models/m/versions/2/ready",
    b"/v2/models/m/config",
    b"/v2/models/none/config",
    b"/v2/models/%ff/ready",
    b"/v2/models/%C3%A4%20b",
    b"/v2/models/stats",
    b"/v2/models/m/stats",
    b"/v2/repository/index",
    b"/v2/repository/models/m/load",
    b"/v2/logging",
    b"/v2/trace/setting",
    b"/v2/systemsharedmemory/status",
    b"/v2/models",
    b"/v2//models/m",
    b"/other/a%2Fb?c=%20",
    b"/%",
]
HEADERS = [
    (b"Content-Type", b"application/json"),
    (b"content-type", b"application/octet-stream"),
    (b"CONTENT-TYPE", b"text/plain"),
    (b"content-type", b"application/json; charset=utf-8"),
    (b"Accept-Encoding", b"gzip"),
    (b"Accept-Encoding", b"deflate;q=0.9, gzip;q=0.1"),
    (b"Accept-Encoding", b"*;q=0"),
    (b"Authorization", b"Bearer bad"),
    (b"Authorization", b"Bearer admin"),
    (b"Tierline-Deadline-Ms", b"5000"),
    (b"Tierline-Deadline-Ms", b"soon"),
    (b"Traceparent", b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"),
    (b"X-Odd", b"\xe4\xf6\xfc \t {};\x80"),
    (b"X-Empty", b""),
    (b"X-Odd", b"twice"),
]


@st.composite
def messages(draw: st.DrawFn) -> Message:
    extra = draw(st.lists(st.sampled_from(HEADERS), max_size=3, unique_by=lambda pair: pair[0].lower()))
    if draw(st.integers(0, 3)) == 0:
        target = draw(st.one_of(st.sampled_from(OTHER_TARGETS), st.sampled_from(TARGETS)))
        method = draw(st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]))
    else:
        method, target = "POST", draw(st.sampled_from(TARGETS))
    headers, body = draw(st.sampled_from(BODIES))
    match draw(st.integers(0, 7)):
        case 0:
            coding, pack = draw(st.sampled_from(PACKINGS))
            headers, body = (*headers, (b"Content-Encoding", coding)), pack(body)
        case 1:
            body = body[: draw(st.integers(0, len(body)))] + draw(st.binary(max_size=4))
    return Message(method, target, (*headers, *extra), body, chunked=draw(st.integers(0, 9)) == 0)


# --- the two servers ---------------------------------------------------------------------------------------------------


def kept(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in pairs if name in COMPARED))


def parse(data: bytes, methods: Sequence[str]) -> tuple[list[Answer], bytes]:
    """The whole answers in `data`, to requests of these methods, and what is left."""
    answers: list[Answer] = []
    while len(answers) < len(methods):
        head, mark, rest = data.partition(b"\r\n\r\n")
        if not mark:
            break
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = [(line.partition(":")[0].lower(), line.partition(":")[2].strip()) for line in lines]
        length = 0 if methods[len(answers)] == "HEAD" else int(dict(pairs)["content-length"])
        if len(rest) < length:
            break
        answers.append(Answer(int(first.split()[1]), kept(pairs), rest[:length]))
        data = rest[length:]
    return answers, data


async def ask_twin(app: AsgiApp, message: Message) -> Answer:
    sent: list[Any] = []
    body = [{"type": "http.request", "body": message.body}]

    async def receive() -> Any:
        return body.pop()

    async def send(part: Any) -> None:
        sent.append(part)

    await app(message.scope(), receive, send)
    pairs = [(name.decode(), value.decode("latin-1")) for name, value in sent[0]["headers"]]
    return Answer(sent[0]["status"], kept(pairs), b"".join(part["body"] for part in sent[1:]))


@contextmanager
def in_thread(main: Callable[[asyncio.Event, Callable[[int], None]], Awaitable[None]]) -> Iterator[int]:
    """Run `main(stop, started)` in a thread of its own; the port that it calls `started` with."""
    ready = threading.Event()
    found: list[Any] = []

    async def run() -> None:
        stop = asyncio.Event()

        def started(port: int) -> None:
            found.extend((port, asyncio.get_running_loop(), stop))
            ready.set()

        await main(stop, started)

    thread = threading.Thread(target=lambda: uvloop.run(run()), daemon=True)
    thread.start()
    assert ready.wait(SECONDS)
    port, loop, stop = found
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(SECONDS)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def fast() -> Iterator[int]:
    async def main(stop: asyncio.Event, started: Callable[[int], None]) -> None:
        async with serve_http(handler(), drain_seconds=0.2) as server:
            started(server.port)
            await stop.wait()

    with in_thread(main) as port:
        yield port


@pytest.fixture(scope="module")
def reference() -> Iterator[int]:
    """The twin behind a real uvicorn."""

    async def main(stop: asyncio.Event, started: Callable[[int], None]) -> None:
        config = uvicorn.Config(AsgiApp(handler()), port=0, log_level="critical", http="httptools", ws="none")
        server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server._serve())
        while not server.started:
            await asyncio.sleep(0.01)
        started(server.servers[0].sockets[0].getsockname()[1])
        await stop.wait()
        server.should_exit = True
        await serving

    with in_thread(main) as port:
        yield port


class Twin:
    """The twin, called in this process."""

    def __init__(self) -> None:
        self._app = AsgiApp(handler())
        self._loop = asyncio.new_event_loop()

    def ask(self, sent: Sequence[Message]) -> list[Answer]:
        return [self.run(ask_twin(self._app, message)) for message in sent]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    def close(self) -> None:
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


@pytest.fixture(scope="module")
def twin() -> Iterator[Twin]:
    twin = Twin()
    yield twin
    twin.close()


@contextmanager
def dial(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield link


def receive(link: socket.socket, methods: Sequence[str]) -> list[Answer]:
    data = b""
    while True:
        answers, rest = parse(data, methods)
        if len(answers) == len(methods):
            assert rest == b"", "more was answered than asked"
            return answers
        piece = link.recv(1 << 18)
        assert piece, f"closed after {answers}, {rest!r}"
        data += piece


def converse(port: int, sent: Sequence[Message]) -> list[Answer]:
    """One after the other on one connection."""
    answers = []
    with dial(port) as link:
        for message in sent:
            link.sendall(message.wire())
            answers += receive(link, [message.method])
    return answers


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """What breaks on purpose, thousands of times, is not logged."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@given(sent=st.lists(messages(), min_size=1, max_size=12))
@settings(BOUNDED, max_examples=500)
def test_one_after_the_other(fast: int, twin: Twin, sent: list[Message]) -> None:
    assert converse(fast, sent) == twin.ask(sent)


@given(sent=st.lists(messages(), min_size=2, max_size=40), cuts=st.lists(st.floats(0, 1), max_size=6))
@settings(BOUNDED, max_examples=300)
def test_pipelined_in_random_groups(fast: int, twin: Twin, sent: list[Message], cuts: list[float]) -> None:
    stream = b"".join(message.wire() for message in sent)
    edges = sorted({0, len(stream), *(int(cut * len(stream)) for cut in cuts)})
    with dial(fast) as link:
        for start, end in pairwise(edges):
            link.sendall(stream[start:end])
        assert receive(link, [message.method for message in sent]) == twin.ask(sent)


@given(sent=st.lists(messages().filter(lambda each: len(each.body) < 400), min_size=1, max_size=3))
@settings(BOUNDED, max_examples=60)
def test_dripped(fast: int, twin: Twin, sent: list[Message]) -> None:
    with dial(fast) as link:
        for byte in b"".join(message.wire() for message in sent):
            link.sendall(bytes((byte,)))
        assert receive(link, [message.method for message in sent]) == twin.ask(sent)


@given(heads=st.lists(messages(), min_size=1, max_size=3), data=st.data())
@settings(BOUNDED, max_examples=300)
def test_the_same_head_again_with_other_bodies(
    fast: int, twin: Twin, heads: list[Message], data: st.DataObject
) -> None:
    sent = []
    for head in data.draw(st.lists(st.sampled_from(heads), min_size=4, max_size=12)):
        body = head.body
        match data.draw(st.integers(0, 4)):
            case 0:
                body = bytes(reversed(body))
            case 1:
                body = data.draw(st.sampled_from(BODIES))[1]
            case 2:
                body = body.replace(b"1", b"2")
        sent.append(msgspec.structs.replace(head, body=body))
    assert converse(fast, sent) == twin.ask(sent)


@given(sent=st.lists(messages(), min_size=1, max_size=6))
@settings(BOUNDED, max_examples=100)
def test_behind_a_real_asgi_server(reference: int, twin: Twin, sent: list[Message]) -> None:
    assert converse(reference, sent) == twin.ask(sent)


# --- without sockets: every cut is exactly where it is said to be ------------------------------------------------------


class Collected(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def write(self, data: Any) -> None:
        self.sent.append(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.sent.append(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def feed(rest: RestHandler, pieces: Sequence[bytes], methods: Sequence[str]) -> list[Answer]:
    service = HttpService(rest, HttpLimits(), asyncio.get_running_loop())
    connection, transport = HttpConnection(service), Collected()
    connection.connection_made(transport)
    for piece in pieces:
        connection.data_received(piece)
    # A handler may wait for a millisecond or for a thread.
    for turn in range(400):
        answers, left = parse(b"".join(transport.sent), methods)
        if len(answers) == len(methods):
            assert left == b""
            connection.connection_lost(None)
            return answers
        await asyncio.sleep(0 if turn < 20 else 0.001)
    raise AssertionError(f"only {answers} was answered")


def samples() -> list[Message]:
    infer = b"/v2/models/m/infer"
    plain = next(json_bodies())
    headers, binary = next(binary_messages())
    packed = ((b"Content-Encoding", b"gzip"), (b"Accept-Encoding", b"gzip"))
    return [
        Message("POST", infer, (), plain),
        Message("POST", infer, headers, binary),
        Message("POST", infer, headers, binary, chunked=True),
        Message("POST", infer, packed, gzipped(plain)),
        Message("POST", infer, (), plain[:-1]),
        Message("GET", b"/v2/models/%C3%A4%20b?x=y", (), b""),
        Message("HEAD", b"/v2/health/live", (), b""),
        Message("POST", b"/v2/models/busy/infer", (), plain),
    ]


@pytest.mark.parametrize("number", range(8))
async def test_split_at_every_byte_boundary(number: int) -> None:
    message = samples()[number]
    rest, expected = handler(), [await ask_twin(AsgiApp(handler()), message)]
    wire = message.wire()
    for cut in range(1, len(wire)):
        assert await feed(rest, (wire[:cut], wire[cut:]), [message.method]) == expected, cut
    assert await feed(rest, [wire[index : index + 1] for index in range(len(wire))], [message.method]) == expected


async def test_all_samples_in_one_stream_split_at_every_byte_boundary() -> None:
    sent = samples()
    app = AsgiApp(handler())
    expected = [await ask_twin(app, message) for message in sent]
    wire = b"".join(message.wire() for message in sent)
    methods = [message.method for message in sent]
    rest = handler()
    for cut in range(1, len(wire)):
        assert await feed(rest, (wire[:cut], wire[cut:]), methods) == expected, cut


@given(few=st.lists(messages(), min_size=1, max_size=2), data=st.data())
@settings(BOUNDED, max_examples=300)
def test_a_known_head_comes_again_in_pieces_and_in_company(twin: Twin, few: list[Message], data: st.DataObject) -> None:
    sent = [few[0], *data.draw(st.lists(st.sampled_from(few), min_size=2, max_size=8))]
    pieces = [sent[0].wire()]  # whole and alone: its head is known from here on
    for message in sent[1:]:
        wire = message.wire()
        match data.draw(st.integers(0, 3)):
            case 0:
                pieces[-1] += wire
            case 1:
                cut = data.draw(st.integers(1, len(wire) - 1))
                pieces += [wire[:cut], wire[cut:]]
            case 2:
                cut = data.draw(st.integers(1, len(wire) - 1))
                pieces[-1] += wire[:cut]
                pieces.append(wire[cut:])
            case 3:
                pieces.append(wire)
    assert twin.run(feed(handler(), pieces, [message.method for message in sent])) == twin.ask(sent)
