"""Ports, certificates and clocks, against sockets of this machine that are each wrong in one way."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from doctor_nodes import NOW, make_node
from msgspec.structs import replace

from sync.doctor.check import Finding
from sync.doctor.node import NODE as TABLE
from sync.doctor.reach import Place, explain_tls, shake_hands
from sync.doctor.runner import run_checks
from sync.doctor.subject import NodeSubject


def ask(subject: NodeSubject, name: str) -> Finding:
    return run_checks([check for check in TABLE if check.name == name], subject)[0].finding


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None], tls: ssl.SSLContext | None = None) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=lambda: server.serve_forever(0.01))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub(at: float = NOW, status: int = 200, issued: float = NOW - 10) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        body = b'{"signed": {"version": 7, "x-issued": %d}}' % issued
        handler.send_response_only(status)
        handler.send_header("Date", formatdate(at, usegmt=True))
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.mark.parametrize(
    ("at", "issued", "status", "found"),
    [
        (NOW, NOW - 10, "ok", "within 1 s"),
        (NOW - 180, NOW - 200, "warn", "3 min ahead of"),
        (NOW - 86_400, NOW - 90_000, "fail", "24.0 h ahead of"),
        (NOW + 7200, NOW - 10, "fail", "2.0 h behind the hub's; more than 300 s"),
        (NOW, NOW + 3600, "fail", "60 min behind the hub's newest signature"),
    ],
)
def test_the_clock_is_held_against_the_hubs(tmp_path: Path, at: float, issued: float, status: str, found: str) -> None:
    with serving(hub(at, issued=issued)) as port:
        finding = ask(make_node(tmp_path, sources=(f"http://127.0.0.1:{port}",)), "clock.hub")
    assert finding.status == status
    assert found in finding.found
    assert ("set the clock" in finding.fix) == (status != "ok")


@pytest.mark.parametrize(
    ("status", "found"),
    [(200, ""), (401, "does not accept this node's credential (401)"), (404, "no update repository (404)")],
)
def test_a_source_of_files_must_answer_and_know_the_node(tmp_path: Path, status: int, found: str) -> None:
    with serving(hub(status=status)) as port:
        finding = ask(make_node(tmp_path, sources=(f"http://127.0.0.1:{port}",)), "network.files")
    assert finding.status == ("fail" if found else "ok")
    assert found in finding.found


def test_one_source_of_two_is_enough_but_told(tmp_path: Path) -> None:
    with serving(hub()) as port:
        node = make_node(tmp_path, sources=(f"http://127.0.0.1:{port}", "http://127.0.0.1:1"))
        assert ask(node, "network.files").status == "warn"


def test_a_port_where_nothing_listens_is_named(tmp_path: Path) -> None:
    finding = ask(make_node(tmp_path), "network.ports")
    assert finding.status == "fail"
    assert "broker 127.0.0.1:1: refused: nothing listens there" in finding.found
    assert "8883" in finding.fix


def test_a_name_that_is_not_resolved_is_named(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.membership = replace(node.node, broker="mqtts://no-such-host.invalid:8883")
    finding = ask(node, "network.names")
    assert finding.status == "fail"
    assert "no-such-host.invalid" in finding.found
    assert "resolver" in finding.fix


TLS: list[tuple[str, dict[str, Any], str, str, str]] = [
    # trusted authority, certificate, host asked for, what is wrong, what to do
    ("ca", {}, "127.0.0.1", "", ""),
    ("ca", {"valid": (-9, -1)}, "127.0.0.1", "has expired", "renew"),
    ("ca", {"valid": (1, 9)}, "127.0.0.1", "not valid yet", "it is behind"),
    ("ca", {}, "127.0.0.2", "for other names", "--public-name"),
    ("other", {}, "127.0.0.1", "does not trust", "join it again"),
]


@pytest.mark.parametrize(("trusted", "issued", "host", "found", "fix"), TLS, ids=[row[3] or "good" for row in TLS])
def test_a_handshake_that_fails_says_why(
    tmp_path: Path, trusted: str, issued: dict[str, Any], host: str, found: str, fix: str
) -> None:
    authorities = {name: Authority(tmp_path / name, name) for name in ("ca", "other")}
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*authorities["ca"].issue("broker", **issued))
    with serving(hub(), server) as port:
        place = Place(
            ("broker",), "", host, port, lambda: ssl.create_default_context(cafile=str(authorities[trusted].path))
        )
        if host == "127.0.0.2":
            place = Place(("broker",), "", "127.0.0.1", port, place.tls)
            with pytest.raises(ssl.SSLError) as raised, _asking_for("wrong.example", place) as asked:
                shake_hands(asked)
        elif not found:
            assert 0 < shake_hands(place) < 2 * 86_400
            return
        else:
            with pytest.raises(ssl.SSLError) as raised:
                shake_hands(place)
    what, remedy = explain_tls(raised.value)
    assert found in what
    assert fix in remedy


@contextmanager
def _asking_for(name: str, place: Place) -> Iterator[Place]:
    """The same port under a name that its certificate does not have."""
    import socket

    real = socket.create_connection
    patch = pytest.MonkeyPatch()
    patch.setattr(socket, "create_connection", lambda address, **more: real((place.host, place.port), **more))
    try:
        yield Place(place.uses, "", name, place.port, place.tls)
    finally:
        patch.undo()


def test_a_port_without_tls_is_told_apart(tmp_path: Path) -> None:
    with serving(hub()) as port:
        place = Place(("broker",), "", "127.0.0.1", port, ssl.create_default_context)
        with pytest.raises(ssl.SSLError) as raised:
            shake_hands(place)
    assert "no TLS there" in explain_tls(raised.value)[0]
