"""One call to a hub that nobody vouches for yet: bounded, whatever it answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from sync import hub_call
from sync.errors import Unavailable
from sync.hub_call import HubRefused, call


@contextmanager
def answering(answer: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """A server for one connection; `answer` runs in a thread and may wait for the event, which says that the test is over."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                try:
                    answer(connection, over)
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n"])
def test_a_peer_that_drips_is_given_up(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_call, "TOTAL_SECONDS", 0.3)

    def drip(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(head)
        for _ in range(200):
            if over.wait(0.02):
                return
            connection.sendall(b"x")

    with answering(drip) as url, pytest.raises(Unavailable, match="within"):
        call(f"{url}/api/v1/ca", None, None)


def test_a_refusal_is_shown_without_control_characters_and_short() -> None:
    text = msgspec.json.encode({"error": "no\x1b]0;title\x07\x1b[2J" + "x" * 100_000})

    def refuse(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 400 No\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))

    with answering(refuse) as url, pytest.raises(HubRefused) as caught:
        call(f"{url}/api/v1/ca", None, None)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith("no")
    assert len(str(caught.value)) <= hub_call.MAX_TEXT_CHARS


@pytest.mark.parametrize("length", [b"100", b"5"])
def test_an_answer_that_ends_too_early_is_none(length: bytes) -> None:
    def cut(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: " + length + b"\r\n\r\n{}{}{}"[: 4 + int(length)])

    with answering(cut) as url:
        if length == b"5":
            assert call(f"{url}/x", None, None) == b"{}{}{"
        else:
            with pytest.raises(Unavailable):
                call(f"{url}/x", None, None)
