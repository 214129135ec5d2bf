"""The HTTP front: whole and in pieces, in order, within limits, and never silent about a refusal."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from models.serving.exchange import FileBody, HttpRequest, HttpResponse, header_lines
from models.serving.http.body import MAX_PIECES
from models.serving.http.connection import LINGER_SECONDS, HttpConnection
from models.serving.http.server import serve_http
from models.serving.http.service import HttpLimits, HttpService


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.writes = 0
        self.closed = self.aborted = self.ended = False
        self.reading = True
        self.unread = 0  # what a client that does not read has left in the buffer

    def get_write_buffer_size(self) -> int:
        return self.unread

    def write(self, data: Any) -> None:
        assert not self.closed
        self.sent += bytes(data)
        self.writes += 1

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed


class Client:
    """A connection without a socket."""

    def __init__(self, handler: Any = None, **limits: int) -> None:
        self.service = HttpService(handler or echo, HttpLimits(**limits), asyncio.get_running_loop())
        self.connection = HttpConnection(self.service)
        self.transport = FakeTransport()
        self.connection.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        self.connection.data_received(data)
        self.service.send_now()

    def answers(self) -> list[tuple[int, dict[str, str], bytes]]:
        return parse(self.transport.sent)


def parse(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        status = int(first.split()[1])
        length = int(headers.get("content-length", "0"))
        found.append((status, headers, data[:length]))
        data = data[length:]
    return found


async def echo(request: HttpRequest) -> HttpResponse:
    seen = {"method": request.method, "path": request.path, "query": request.query, "body": request.body.decode()}
    return HttpResponse(200, body=json.dumps(seen).encode())


POST = b"POST /a%20b?c=d HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = (
    b"POST /x HTTP/1.1\r\nhost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\nx-trailer: 1\r\n\r\n"
)
GET = b"GET /g HTTP/1.1\r\nhost: h\r\n\r\n"


def bodies(client: Client) -> list[Any]:
    return [json.loads(body) for _, _, body in client.answers()]


@pytest.mark.parametrize("message", [POST, CHUNKED])
async def test_a_request_may_be_split_at_every_byte(message: bytes) -> None:
    whole = Client()
    whole.send(message)
    assert bodies(whole)[0]["body"] == "hello"
    for cut in range(1, len(message)):
        client = Client()
        client.send(message[:cut])
        client.send(message[cut:])
        assert bodies(client) == bodies(whole)
    client = Client()
    for index in range(len(message)):
        client.send(message[index : index + 1])
    assert bodies(client) == bodies(whole)


async def test_the_target_is_split_and_stays_encoded() -> None:
    client = Client()
    client.send(POST)
    assert bodies(client) == [{"method": "POST", "path": "/a%20b", "query": "c=d", "body": "hello"}]


async def test_an_absolute_target_means_its_path() -> None:
    client = Client()
    client.send(b"GET http://h:1/a/b?c HTTP/1.1\r\nhost: h\r\n\r\n")
    assert (bodies(client)[0]["path"], bodies(client)[0]["query"]) == ("/a/b", "c")


async def test_header_names_arrive_in_lower_case_and_trailers_do_not_count() -> None:
    seen: list[dict[bytes, bytes]] = []

    async def handler(request: HttpRequest) -> HttpResponse:
        seen.append(request.headers)
        return HttpResponse(200)

    Client(handler).send(CHUNKED)
    assert seen == [{b"host": b"h", b"transfer-encoding": b"chunked"}]


async def test_pipelined_requests_are_answered_in_order_in_one_write() -> None:
    client = Client()
    client.send(POST + GET + CHUNKED)
    assert [body["path"] for body in bodies(client)] == ["/a%20b", "/g", "/x"]
    assert client.transport.writes == 1


async def test_answers_leave_at_the_end_of_the_turn_without_being_asked() -> None:
    client = Client()
    client.connection.data_received(GET)
    client.connection.data_received(GET)
    assert client.transport.writes == 0
    await turns(1)
    assert client.transport.writes == 1
    assert len(client.answers()) == 2


async def test_a_late_answer_keeps_its_place() -> None:
    gate = asyncio.Event()

    async def handler(request: HttpRequest) -> HttpResponse:
        if request.path == "/slow":
            await gate.wait()
        return HttpResponse(200, body=request.path.encode())

    client = Client(handler)
    client.send(b"GET /slow HTTP/1.1\r\nhost: h\r\n\r\n" + GET)
    assert client.transport.sent == b""
    gate.set()
    await turns()
    assert [body for _, _, body in client.answers()] == [b"/slow", b"/g"]


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_long_pipeline_is_worked_off_in_turns() -> None:
    client = Client(pipeline=4)
    client.send(GET * 10)
    assert len(client.answers()) == 4
    assert not client.transport.reading
    await turns()
    assert len(client.answers()) == 10
    assert client.transport.reading


async def test_reading_stops_while_the_pipeline_is_full() -> None:
    gate = asyncio.Event()

    async def handler(request: HttpRequest) -> HttpResponse:
        await gate.wait()
        return HttpResponse(200)

    client = Client(handler, pipeline=2)
    client.send(GET * 3)
    assert not client.transport.reading
    gate.set()
    await turns(8)
    assert len(client.answers()) == 3
    assert client.transport.reading


async def test_nothing_is_started_while_answers_go_unread() -> None:
    client = Client()
    client.connection.pause_writing()
    client.send(GET)
    assert client.transport.sent == b""
    assert not client.transport.reading
    client.connection.resume_writing()
    await turns()
    assert len(client.answers()) == 1


MALFORMED = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"FOO / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
]


@pytest.mark.parametrize("data", MALFORMED)
async def test_malformed_http_gets_a_400_and_a_closed_connection(data: bytes) -> None:
    client = Client()
    client.send(GET + data)
    client.send(b"more")
    assert [status for status, _, _ in client.answers()] == [200, 400]
    _, headers, body = client.answers()[-1]
    assert "malformed HTTP" in json.loads(body)["error"]
    assert headers["connection"] == "close"
    assert client.transport.ended


async def test_an_announced_oversized_body_is_refused_before_it_comes() -> None:
    client = Client(body_bytes=10)
    client.send(b"POST / HTTP/1.1\r\ncontent-length: 11\r\n\r\n")
    assert client.answers()[0][0] == 413
    assert client.transport.ended
    assert not client.transport.closed


async def test_a_refused_client_that_goes_on_sending_is_cut_off() -> None:
    client = Client(body_bytes=10)
    client.send(b"POST / HTTP/1.1\r\ncontent-length: 11\r\n\r\n")
    for _ in range(LINGER_SECONDS + 1):
        client.send(b"x")
        assert not client.transport.aborted
        client.service.sweep()
    assert client.transport.aborted


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + b"8\r\n12345678\r\n" * 2 + b"0\r\n\r\n",
        b"GET /" + b"x" * 300 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 300 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: 1\r\n" % index for index in range(9)) + b"\r\n",
    ],
    ids=["chunked body", "target", "header", "headers"],
)
@pytest.mark.parametrize("whole", [True, False])
async def test_what_is_above_a_limit_is_refused_whole_or_in_pieces(data: bytes, whole: bool) -> None:
    client = Client(body_bytes=10, header_bytes=200, header_count=8)
    size = len(data) if whole else 1
    for start in range(0, len(data), size):
        client.send(data[start : start + size])
    assert [status for status, _, _ in client.answers()] == [413]


async def test_an_endless_chunked_body_is_refused() -> None:
    client = Client(body_bytes=100, header_bytes=50)
    client.send(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(200):
        client.send(b"1\r\nx\r\n")
    assert client.answers()[0][0] == 413


async def test_a_client_that_waits_for_100_continue_gets_it() -> None:
    client = Client()
    client.send(b"POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
    assert client.transport.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.transport.sent = b""
    client.send(b"hello")
    assert bodies(client)[0]["body"] == "hello"


EXPECTING = b"POST / HTTP/1.%d\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n"


async def test_http_1_0_gets_no_interim_answer() -> None:
    client = Client()
    client.send(EXPECTING % 0)
    assert client.transport.sent == b""


async def test_100_continue_waits_for_the_answers_before_it() -> None:
    handler = Stuck()
    client = Client(handler)
    client.send(GET + EXPECTING % 1)
    assert client.transport.sent == b""
    handler.release.set()
    await turns()
    client.service.send_now()
    assert client.transport.sent.endswith(b"}HTTP/1.1 100 Continue\r\n\r\n")
    client.transport.sent = b""
    client.send(b"hello")
    assert bodies(client)[0]["body"] == "hello"


async def test_a_body_that_came_unasked_is_not_asked_for_later() -> None:
    handler = Stuck()
    client = Client(handler)
    client.send(GET + EXPECTING % 1)
    client.send(b"hello" + POST[:-2])
    handler.release.set()
    await turns()
    client.service.send_now()
    assert b" 100 " not in client.transport.sent


IN_CHUNKS = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "trailers",
    [[b"x%d: 1\r\n" % index for index in range(10)], [b"x: 1\r\n"] * 40, [b"x: "] + [b"y" * 50] * 5],
    ids=["many", "the same", "one long"],
)
async def test_trailers_are_held_to_the_limits_of_headers(trailers: list[bytes]) -> None:
    client = Client(header_bytes=200, header_count=8)
    client.send(IN_CHUNKS)
    client.send(b"2\r\nab\r\n0\r\n")
    for trailer in trailers:
        client.send(trailer)
    assert [status for status, _, _ in client.answers()] == [413]


async def test_a_body_in_tiny_chunks_weighs_what_it_holds() -> None:
    client = Client()
    client.send(IN_CHUNKS)
    kept = 0
    for _ in range(40):
        client.send(b"1\r\nx\r\n" * 1000)
        kept = max(kept, len(client.connection._parts))
    assert kept < 3 * MAX_PIECES
    client.send(b"0\r\n\r\n")
    assert bodies(client)[0]["body"] == "x" * 40_000


@pytest.mark.parametrize(
    ("sent", "seconds", "status"),
    [
        (b"GET / HT", 5, 408),
        (b"POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\nhe", 9, 408),
        (b"", 20, None),
        (GET, 20, None),
    ],
    ids=["head", "body", "new", "kept"],
)
async def test_slow_clients_are_cut_off_by_the_sweep(sent: bytes, seconds: int, status: int | None) -> None:
    client = Client(header_seconds=5, body_seconds=9, idle_seconds=20)
    if sent:
        client.send(sent)
    before = len(client.answers())
    for _ in range(seconds):
        client.service.sweep()
    assert len(client.answers()) == before
    assert not client.transport.closed
    client.service.sweep()
    if status is None:
        assert client.transport.closed
    else:
        assert client.answers()[-1][0] == status


async def test_bytes_that_trickle_in_do_not_extend_the_time_for_a_head() -> None:
    client = Client(header_seconds=5)
    for byte in b"GET / ":
        client.send(bytes([byte]))
        client.service.sweep()
    assert client.answers()[-1][0] == 408


async def test_a_client_that_does_not_read_is_cut_off() -> None:
    client = Client(write_seconds=3)
    client.send(GET)
    client.connection.pause_writing()
    for _ in range(4):
        client.service.sweep()
    assert client.transport.aborted


async def test_an_answer_in_work_is_never_timed_out_here() -> None:
    async def handler(request: HttpRequest) -> HttpResponse:
        await asyncio.Event().wait()
        raise AssertionError

    client = Client(handler, idle_seconds=1)
    client.send(GET)
    for _ in range(5):
        client.service.sweep()
    assert not client.transport.closed
    client.connection.connection_lost(None)


class Stuck:
    """A handler that answers when `release` is set."""

    def __init__(self) -> None:
        self.entered, self.release, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        self.entered.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await echo(request)


async def test_a_client_that_resets_its_connection_cancels_its_request() -> None:
    handler = Stuck()
    async with serve_http(handler) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(GET)
        await asyncio.wait_for(handler.entered.wait(), 2)
        no_linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        writer.close()
        await asyncio.wait_for(handler.cancelled.wait(), 2)


async def test_a_client_that_ends_its_side_gets_every_answer_and_then_the_end() -> None:
    handler = Stuck()
    async with serve_http(handler) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(GET + GET)
        writer.write_eof()
        await asyncio.wait_for(handler.entered.wait(), 2)
        await asyncio.sleep(0)
        handler.release.set()
        answers = parse(await asyncio.wait_for(reader.read(), 2))
        writer.close()
    assert [status for status, _, _ in answers] == [200, 200]
    assert answers[-1][1]["connection"] == "close"


async def test_an_answer_of_this_turn_is_sent_before_an_ended_connection_closes() -> None:
    client = Client()
    client.connection.data_received(GET)
    assert not client.connection.eof_received()
    assert [status for status, _, _ in client.answers()] == [200]


async def test_half_a_request_before_the_end_is_dropped() -> None:
    handler = Stuck()
    client = Client(handler)
    client.send(GET + POST[:-2])
    assert client.connection.eof_received()
    handler.release.set()
    await turns()
    client.service.send_now()
    assert len(client.answers()) == 1
    assert client.transport.closed


async def test_an_ended_connection_is_not_kept_for_ever() -> None:
    client = Client(Stuck(), idle_seconds=5)
    client.send(GET)
    assert client.connection.eof_received()
    for _ in range(5):
        client.service.sweep()
    assert not client.transport.aborted
    client.service.sweep()
    assert client.transport.aborted
    client.connection.connection_lost(None)


async def test_a_file_reaches_a_client_that_has_ended_its_side(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")

    async def handler(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, b"", FileBody(tmp_path / "f", 0, 10))

    client = Client(handler)
    client.send(GET)
    assert client.connection.eof_received()
    await until(lambda: client.transport.closed)
    assert client.answers()[0][2] == b"0123456789"
    assert not client.transport.aborted


@pytest.mark.parametrize(
    ("request_line", "header", "kept", "said"),
    [
        (b"HTTP/1.1", b"", True, None),
        (b"HTTP/1.1", b"connection: close\r\n", False, "close"),
        (b"HTTP/1.0", b"", False, "close"),
        (b"HTTP/1.0", b"connection: keep-alive\r\n", True, "keep-alive"),
    ],
)
async def test_connections_are_kept_as_the_client_asks(
    request_line: bytes, header: bytes, kept: bool, said: str | None
) -> None:
    client = Client()
    client.send(b"GET / %b\r\nhost: h\r\n%b\r\n" % (request_line, header))
    assert client.transport.closed is not kept
    assert client.answers()[0][1].get("connection") == said


async def test_an_upgrade_is_answered_as_plain_http_and_closed() -> None:
    client = Client()
    client.send(b"GET / HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
    assert client.answers()[0][0] == 200
    assert client.transport.closed


async def test_head_gets_the_head_alone() -> None:
    client = Client()
    client.send(b"HEAD / HTTP/1.1\r\nhost: h\r\n\r\n")
    head, _, rest = client.transport.sent.partition(b"\r\n\r\n")
    assert b"content-length: " in head
    assert rest == b""


async def test_a_failing_handler_is_an_internal_error_without_details() -> None:
    async def handler(request: HttpRequest) -> HttpResponse:
        raise RuntimeError("secret")

    client = Client(handler)
    client.send(GET)
    status, _, body = client.answers()[0]
    assert (status, json.loads(body)) == (500, {"error": "internal error"})


async def test_connections_above_the_limit_are_refused_in_words() -> None:
    client = Client(connections=1)
    extra = HttpConnection(client.service)
    transport = FakeTransport()
    extra.connection_made(transport)
    assert parse(transport.sent)[0][0] == 503
    assert transport.ended


async def test_a_file_is_streamed_from_its_offset_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    content = bytes(range(256)) * 3000
    path.write_bytes(content)

    async def handler(request: HttpRequest) -> HttpResponse:
        if request.path == "/file":
            return HttpResponse(206, b"", FileBody(path, 5, len(content) - 5))
        return HttpResponse(200, b"", b"after")

    client = Client(handler)
    client.send(b"GET /file HTTP/1.1\r\nhost: h\r\n\r\n" + GET)
    await until(lambda: client.transport.sent.endswith(b"after"))
    (status, _, body), (_, _, after) = client.answers()
    assert (status, body, after) == (206, content[5:], b"after")


async def until(reached: Any) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + 2
    while not reached():
        assert loop.time() < end
        await loop.run_in_executor(None, int)


async def test_a_file_waits_for_a_slow_reader(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"x" * 600_000)

    async def handler(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, b"", FileBody(path, 0, 600_000))

    client = Client(handler)
    client.send(GET)
    client.connection.pause_writing()
    await until(lambda: client.transport.sent)
    for _ in range(20):
        await asyncio.get_running_loop().run_in_executor(None, int)
    assert len(client.transport.sent) < 300_000
    client.connection.resume_writing()
    await until(lambda: len(client.transport.sent) > 600_000)


async def test_a_missing_file_is_an_internal_error(tmp_path: Path) -> None:
    async def handler(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, b"", FileBody(tmp_path / "none", 0, 10))

    client = Client(handler)
    client.send(GET)
    await until(lambda: client.transport.sent)
    assert client.answers()[0][0] == 500


async def test_a_file_shorter_than_promised_cuts_the_connection(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"x" * 300_000)

    async def handler(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, b"", FileBody(path, 0, 600_000))

    client = Client(handler)
    client.send(GET)
    await until(lambda: client.transport.aborted)


def test_a_header_value_cannot_end_its_line() -> None:
    assert header_lines([("etag", '"a"'), ("x", "y")]) == b'etag: "a"\r\nx: y\r\n'
    with pytest.raises(ValueError, match="etag"):
        header_lines([("etag", "a\r\nset-cookie: b")])


async def test_leaving_the_server_finishes_requests_in_work() -> None:
    entered, gate = asyncio.Event(), asyncio.Event()

    async def handler(request: HttpRequest) -> HttpResponse:
        entered.set()
        await gate.wait()
        return HttpResponse(200, body=b"done")

    serving = serve_http(handler)
    server = await serving.__aenter__()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(GET)
    await entered.wait()
    leaving = asyncio.ensure_future(serving.__aexit__(None, None, None))
    await turns()
    gate.set()
    answer = await asyncio.wait_for(reader.read(), 2)
    await asyncio.wait_for(leaving, 2)
    assert answer.endswith(b"connection: close\r\n\r\ndone")
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", server.port)


async def test_a_drain_has_an_end() -> None:
    async def handler(request: HttpRequest) -> HttpResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with serve_http(handler, drain_seconds=0.05) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(GET)
        await turns()
    assert await asyncio.wait_for(reader.read(), 2) == b""
    writer.close()


async def test_a_taken_port_is_said_clearly() -> None:
    async with serve_http(echo) as server:
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {server.port}: Address already in use"):
            async with serve_http(echo, port=server.port):
                pass


# --- a head that comes again -----------------------------------------------------------------------------------------


def seen_by(*reads: bytes, split: bool = False) -> list[tuple[str, str, bytes]]:
    """What a handler is asked when these reads arrive: method, path, body."""
    seen: list[tuple[str, str, bytes]] = []

    async def handler(request: HttpRequest) -> HttpResponse:
        seen.append((request.method, request.path, request.body))
        return HttpResponse(200)

    client = Client(handler)
    for read in reads:
        for piece in [read[index : index + 1] for index in range(len(read))] if split else [read]:
            client.send(piece)
    return seen


POST_B = b"POST /b HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi"
GET_A = b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "reads",
    [
        (POST_B, POST_B, POST_B.replace(b"hi", b"ho")),
        (GET_A, GET_A, POST_B, GET_A),
        (GET_A, GET_A + b"\r\n", GET_A + b"\r\n", b"\r\n" + GET_A, GET_A),
        (GET_A, POST_B + GET_A[:20], GET_A[20:], GET_A),
        (GET_A, POST_B + b"POST /p HTTP/1.1\r\nx-note: ", GET_A.replace(b"\r\n\r\n", b"\r\n"), b"\r\n", GET_A),
        (POST_B, b"\r", POST_B, POST_B),
        (POST_B + GET_A, POST_B, GET_A + POST_B, POST_B),
        (GET_A.replace(b"host", b"content-length: 0\r\nhost"),) * 3,
    ],
)
async def test_a_head_that_is_remembered_means_what_the_parser_says(reads: tuple[bytes, ...]) -> None:
    assert seen_by(*reads) == seen_by(*reads, split=True)


@pytest.mark.parametrize("index", range(1, len(POST_B)))
@pytest.mark.parametrize(
    "first", [(POST_B,), (POST_B[:-1], POST_B[-1:]), (POST_B[:3], POST_B[3:]), (GET_A, GET_A + POST_B)]
)
async def test_a_body_that_comes_in_pieces_behind_a_head_that_is_remembered(
    first: tuple[bytes, ...], index: int
) -> None:
    again = POST_B.replace(b"hi", b"ho")
    reads = (*first, again[:index], again[index:] + GET_A, GET_A, again[:index], again[index:] + GET_A[:9], GET_A[9:])
    assert seen_by(*reads) == seen_by(*reads, split=True)


async def test_a_head_behind_another_request_is_not_taken_for_the_one_before_it() -> None:
    other = POST_B.replace(b"/b", b"/c")
    reads = (POST_B[:-1], POST_B[-1:] + other[:-1], other[-1:], POST_B, POST_B[:-1], POST_B[-1:], other)
    assert seen_by(*reads) == seen_by(*reads, split=True)


async def test_a_body_behind_a_head_that_is_remembered_has_no_more_time_than_any() -> None:
    client = Client(echo)
    client.send(POST_B)
    client.send(POST_B[:-1])
    for _ in range(HttpLimits().body_seconds + 2):
        client.service.sweep()
    assert b"408" in client.transport.sent
    client.send(POST_B[-1:])
    assert len(client.answers()) == 2


async def test_a_body_in_many_pieces_behind_a_head_that_is_remembered_is_joined_now_and_then() -> None:
    large = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n" + b"x" * 5000
    client = Client(echo)
    client.send(large)
    client.send(large[:-5000])
    for _ in range(4999):
        client.send(b"x")
        assert len(client.connection._parts) <= MAX_PIECES + 5
    client.send(b"x")
    assert bodies(client)[0] == bodies(client)[1]


async def test_a_connection_in_steady_use_is_not_idle() -> None:
    client = Client(echo)
    for _ in range(3 * HttpLimits().idle_seconds):
        client.send(GET_A)
        client.service.sweep()
    assert not client.transport.closed


async def test_an_unfinished_head_behind_a_whole_request_has_no_more_time_than_any() -> None:
    client = Client(echo)
    client.send(GET_A + GET_A[:10])
    for _ in range(HttpLimits().header_seconds + 2):
        client.service.sweep()
    assert b"408" in client.transport.sent


# --- what all connections hold ----------------------------------------------------------------------------------------


async def test_the_bodies_of_all_connections_together_are_bounded() -> None:
    asked: list[asyncio.Future[None]] = []

    async def handler(request: HttpRequest) -> HttpResponse:
        asked.append(asyncio.get_running_loop().create_future())
        await asked[-1]
        return HttpResponse(200)

    limits = HttpLimits(held_bytes=100_000)
    service = HttpService(handler, limits, asyncio.get_running_loop())
    large = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 60000\r\n\r\n" + b"x" * 60_000
    clients = []
    for read in (large, large[:40_000] + b"", POST_B):
        connection, transport = service.connect(), FakeTransport()
        connection.connection_made(transport)
        for start in range(0, len(read), 20_000):
            connection.data_received(read[start : start + 20_000])
        clients.append((connection, transport))
    connection, transport = clients[1]
    connection.data_received(large[40_000:50_000])
    service.send_now()
    assert b"429" in transport.sent
    assert not clients[0][1].sent
    assert len(asked) == 2, "a small body is taken even so"
    for future in asked:
        future.set_result(None)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for connection, _ in clients:
        connection.connection_lost(None)
    assert service.held_bytes == 0


async def test_bodies_behind_a_head_that_is_remembered_are_bounded_too() -> None:
    client = Client(echo, held_bytes=70_000)
    large = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 60000\r\n\r\n" + b"x" * 60_000
    client.send(large)
    client.send(large[:40_000])
    assert client.service.held_bytes >= 39_000
    client.service.held_bytes += 30_000  # of another connection
    client.send(large[40_000:50_000])
    client.service.held_bytes -= 30_000
    assert [status for status, _, _ in client.answers()] == [200, 429]
    client.connection.connection_lost(None)
    assert client.service.held_bytes == 0


async def test_requests_behind_a_file_wait_in_the_socket_not_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"x" * 10)

    async def handler(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, b"", FileBody(path, 0, 10))

    client = Client(handler)
    for _ in range(HttpLimits().pipeline + 1):
        client.send(GET_A)
    assert not client.transport.reading
    client.connection.connection_lost(None)


async def test_a_slow_reader_that_reads_on_is_not_cut_off() -> None:
    client = Client(echo)
    client.transport.unread = 10_000_000
    client.connection.pause_writing()
    for _ in range(3 * HttpLimits().write_seconds):
        client.transport.unread -= 100_000
        client.service.sweep()
    assert not client.transport.aborted
    for _ in range(HttpLimits().write_seconds + 2):
        client.service.sweep()
    assert client.transport.aborted
