"""Sessions of TLS: a client certificate counts as long as its authority does, however the client comes back."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from certificates import Authority

from models.serving.access.tls import server_context
from models.serving.access.watch import Watch

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


class Place:
    def __init__(self, folder: Path) -> None:
        self.servers, self.clients = Authority(folder / "s", "servers"), Authority(folder / "c", "clients")
        self.cert = self.servers.issue("server")
        self.client = self.clients.issue("acme.n1")

    def trust(self, version: ssl.TLSVersion) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.servers.path)
        context.maximum_version = version
        context.load_cert_chain(*self.client)
        return context


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Files are looked at with every connection instead of once a second."""
    plain = Watch.changed

    def changed(self: Watch) -> bool:
        self.due = 0.0
        return plain(self)

    monkeypatch.setattr(Watch, "changed", changed)
    return Place(tmp_path)


def connect(
    server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> tuple[ssl.SSLObject, ssl.SSLSession | None]:
    """The server's end of a connection that both sides have closed, and the session to come back with."""
    bios = [ssl.MemoryBIO() for _ in range(4)]
    near = client.wrap_bio(bios[0], bios[1], server_hostname="127.0.0.1", session=session)
    far = server.wrap_bio(bios[2], bios[3], server_side=True)

    def exchange() -> None:
        bios[2].write(bios[1].read())
        bios[0].write(bios[3].read())

    for _ in range(4):
        for end in (near, far):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            exchange()
    far.write(b"x")
    exchange()
    near.read(1)
    found = near.session
    # A session that did not end well is forgotten: this one does.
    for _ in range(2):
        for end in (near, far):
            try:
                end.unwrap()
            except (ssl.SSLWantReadError, ssl.SSLSyscallError):
                pass
            exchange()
    return far, found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("required", [True, False])
def test_no_session_outlives_the_client_authority_it_began_under(
    place: Place, tmp_path: Path, version: ssl.TLSVersion, required: bool
) -> None:
    server = server_context(*place.cert, place.clients.path, client_required=required)
    client = place.trust(version)
    far, session = connect(server, client)
    assert not far.session_reused
    place.clients.path.write_bytes(Authority(tmp_path / "n", "new").path.read_bytes())
    with pytest.raises(ssl.SSLError, match=r"(?i)verify failed|unknown.ca"):
        connect(server, client, session)


def test_a_certificate_is_asked_for_again_with_every_connection_of_tls_1_3(place: Place) -> None:
    server = server_context(*place.cert, place.clients.path)
    client = place.trust(VERSIONS[1])
    _, session = connect(server, client)
    assert not connect(server, client, session)[0].session_reused


@pytest.mark.parametrize("version", VERSIONS)
def test_no_ticket_is_given_to_who_shows_a_certificate(place: Place, version: ssl.TLSVersion) -> None:
    _, session = connect(server_context(*place.cert, place.clients.path), place.trust(version))
    assert session is None or not session.has_ticket


@pytest.mark.parametrize("version", VERSIONS)
def test_sessions_are_resumed_where_nobody_is_known_by_a_certificate(place: Place, version: ssl.TLSVersion) -> None:
    server, client = server_context(*place.cert), place.trust(version)
    _, session = connect(server, client)
    assert connect(server, client, session)[0].session_reused
