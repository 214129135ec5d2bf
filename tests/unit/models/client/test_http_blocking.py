"""The blocking transport: one retry at most, never a foreign answer, everything by the deadline."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from models.client.http_blocking import BlockingHttp
from models.client.http_calls import HttpCall
from models.errors import DeadlineExceeded, TierlineError, Unreachable
from models.serving.endpoint import Endpoint
from models.serving.reply import MAX_RESPONSE_HEAD_BYTES, Reply

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"

Script = Callable[[socket.socket, int], None]


def ask(body: bytes = b"", *, repeatable: bool = True) -> HttpCall[Reply]:
    head = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n" % len(body)
    return HttpCall(head, [body], lambda reply: reply, repeatable=repeatable)


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def read_request(connection: socket.socket) -> bytes:
    """One request without a body, or b"" at the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return b""
        data += more
    return data


@contextmanager
def served(script: Script, **options: Any) -> Iterator[BlockingHttp]:
    """A transport to a server that handles its connections, one after the other, by `script(connection, number)`."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for number in range(1000):
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                try:
                    script(connection, number)
                except OSError:
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    options = {"size": 4, "connect_timeout": 1.0, **options}
    transport = BlockingHttp(Endpoint("127.0.0.1", listening.getsockname()[1]), **options)
    try:
        yield transport
    finally:
        transport.close()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(10)
        assert not thread.is_alive()


def answering(connection: socket.socket, number: int) -> None:
    while read_request(connection):
        connection.sendall(OK)


def test_a_connection_is_kept() -> None:
    numbers = []

    def script(connection: socket.socket, number: int) -> None:
        numbers.append(number)
        answering(connection, number)

    with served(script) as transport:
        for _ in range(3):
            assert transport.run(ask(), soon()).body == b"{}"
    assert numbers == [0]


def closing_after_one(connection: socket.socket, number: int) -> None:
    read_request(connection)
    connection.sendall(OK)
    if number == 0:
        read_request(connection)  # then closes without a byte


def test_a_kept_connection_that_closes_without_a_byte_is_replaced_once() -> None:
    with served(closing_after_one) as transport:
        assert transport.run(ask(), soon()).status == 200
        assert transport.run(ask(), soon()).status == 200


def test_what_must_not_be_done_twice_gets_a_connection_of_its_own() -> None:
    numbers: list[int] = []
    kept: list[socket.socket] = []

    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        numbers.append(number)
        connection.sendall(OK)
        kept.append(connection.dup())  # stays open

    with served(script) as transport:
        transport.run(ask(), soon())
        transport.run(ask(repeatable=False), soon(2))
    assert numbers == [0, 1]
    for connection in kept:
        connection.close()


def test_a_new_connection_that_closes_is_not_retried() -> None:
    numbers = []

    def script(connection: socket.socket, number: int) -> None:
        numbers.append(number)
        read_request(connection)

    with served(script) as transport, pytest.raises(Unreachable, match="closed"):
        transport.run(ask(), soon())
    assert numbers == [0]


def test_once_a_byte_of_the_answer_has_come_nothing_is_sent_again() -> None:
    requests = []

    def script(connection: socket.socket, number: int) -> None:
        for sent in (OK, b"HTTP/1.1 2"):
            requests.append(read_request(connection))
            connection.sendall(sent)

    with served(script) as transport:
        transport.run(ask(), soon())
        with pytest.raises(Unreachable):
            transport.run(ask(), soon())
    assert len(requests) == 2


@pytest.mark.parametrize("at_once", [True, False])
def test_an_answer_to_no_question_never_becomes_the_answer_to_the_next(at_once: bool) -> None:
    foreign = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong"
    read, sent = threading.Event(), threading.Event()

    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        if number == 0 and at_once:
            connection.sendall(OK + foreign)
            sent.set()
        else:
            connection.sendall(OK)
        if number == 0 and not at_once:
            read.wait(5)
            connection.sendall(foreign)
            sent.set()
        read_request(connection)

    with served(script) as transport:
        assert transport.run(ask(), soon()).body == b"{}"
        read.set()
        assert sent.wait(5)
        assert transport.run(ask(), soon()).body == b"{}"


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}",
        b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 4 * MAX_RESPONSE_HEAD_BYTES,
        b"",
    ],
)
def test_a_broken_answer_counts_as_none(answer: bytes) -> None:
    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)

    with served(script) as transport, pytest.raises(Unreachable):
        transport.run(ask(), soon())


@pytest.mark.parametrize(
    "pieces",
    [
        [OK[i : i + 1] for i in range(len(OK))],
        [b"HTTP/1.1 100 Continue\r\n\r\n", OK],
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"],
    ],
)
def test_every_form_of_an_answer_is_read(pieces: list[bytes]) -> None:
    def script(connection: socket.socket, number: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while read_request(connection):
            for piece in pieces:
                connection.sendall(piece)
            if b"close" in pieces[0]:
                return

    with served(script) as transport:
        for _ in range(3):
            assert transport.run(ask(), soon()).body == b"{}"


def test_the_same_head_again_brings_its_own_body() -> None:
    bodies = [b"ab", b"cd", b"ef", b"longer", b"gh", b"\r\n"]

    def script(connection: socket.socket, number: int) -> None:
        for body in bodies:
            read_request(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    with served(script) as transport:
        assert [transport.run(ask(), soon()).body for _ in bodies] == bodies


def test_a_server_that_does_not_answer_costs_no_more_than_the_deadline() -> None:
    ended = threading.Event()

    def script(connection: socket.socket, number: int) -> None:
        if number:
            answering(connection, number)
            return
        read_request(connection)
        try:
            connection.recv(1)
        except ConnectionResetError:
            ended.set()

    with served(script) as transport:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            transport.run(ask(), soon(0.05))
        assert time.monotonic() - start < 1
        assert ended.wait(5)  # the server learns at once that nobody waits
        assert transport.run(ask(), soon()).body == b"{}"


def test_a_dripping_server_costs_no_more_than_the_deadline() -> None:
    stop = threading.Event()

    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while not stop.wait(0.01):
            connection.sendall(b"x")

    with served(script) as transport:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            transport.run(ask(), soon(0.1))
        assert time.monotonic() - start < 1
        stop.set()


def test_a_server_that_does_not_read_costs_no_more_than_the_deadline() -> None:
    stop = threading.Event()

    def script(connection: socket.socket, number: int) -> None:
        stop.wait(10)

    with served(script) as transport:
        with pytest.raises(DeadlineExceeded):
            transport.run(ask(bytes(32 << 20)), soon(0.1))
        stop.set()


def test_who_finds_no_free_connection_waits_until_the_deadline() -> None:
    asked, release = threading.Event(), threading.Event()

    def script(connection: socket.socket, number: int) -> None:
        while read_request(connection):
            asked.set()
            release.wait(10)
            connection.sendall(OK)

    with served(script, size=1) as transport:
        got: list[Reply] = []
        first = threading.Thread(target=lambda: got.append(transport.run(ask(), soon())))
        first.start()
        assert asked.wait(5)
        with pytest.raises(DeadlineExceeded):
            transport.run(ask(), soon(0.05))
        release.set()
        assert transport.run(ask(), soon()).body == b"{}"
        first.join(5)
        assert got


def test_many_threads_get_the_answers_to_their_own_questions() -> None:
    def script(connection: socket.socket, number: int) -> None:
        def echo() -> None:
            with connection_of_its_own:
                while data := read_request(connection_of_its_own):
                    body = data.partition(b"x-number: ")[2].partition(b"\r")[0]
                    connection_of_its_own.sendall(
                        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
                    )

        connection_of_its_own = connection.dup()
        threading.Thread(target=echo, daemon=True).start()

    wrong: list[int] = []

    def run(transport: BlockingHttp, first: int) -> None:
        for number in range(first, first + 100):
            call: HttpCall[Reply] = HttpCall(b"GET / HTTP/1.1\r\nx-number: %d\r\n" % number, [], lambda reply: reply)
            if transport.run(call, soon()).body != b"%d" % number:
                wrong.append(number)

    with served(script, size=3) as transport:
        threads = [threading.Thread(target=run, args=(transport, 1000 * n)) for n in range(1, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert not wrong


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_an_interrupted_call_spoils_its_connection(kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    with served(answering) as transport:
        transport.run(ask(), soon())
        (connection,) = transport._idle

        def interrupted(deadline: float) -> Reply:
            raise kind

        monkeypatch.setattr(connection, "_receive", interrupted)
        with pytest.raises(kind):
            transport.run(ask(), soon())
        assert not connection.usable
        assert transport.run(ask(), soon()).body == b"{}"


def test_nothing_is_begun_after_the_end() -> None:
    with served(answering) as transport:
        transport.run(ask(), soon())
        transport.close()
        with pytest.raises(TierlineError, match="closed"):
            transport.run(ask(), soon())
