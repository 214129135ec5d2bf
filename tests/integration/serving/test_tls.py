"""Real TLS clients against a real server, on asyncio's own loop and on uvloop: who gets in, who does not, what is renewed."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import warnings
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop
from certificates import Authority

from models.serving.access.settings import InvalidAccess
from models.serving.access.tls import grpc_credentials, server_context
from models.serving.access.watch import Watch
from models.serving.exchange import FileBody, HttpRequest, HttpResponse
from models.serving.http.server import HttpServer, serve_http

GET = b"GET /g HTTP/1.1\r\nhost: h\r\n\r\n"
SECONDS = 10.0

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    return request.param()


async def peers(request: HttpRequest) -> HttpResponse:
    peer = request.peer
    body = {"address": peer.address, "certificate": peer.certificate, "encrypted": peer.encrypted}
    return HttpResponse(200, body=json.dumps(body | {"size": len(request.body)}).encode())


class Place:
    """A server's certificate and a client's, each from its own authority."""

    def __init__(self, folder: Path) -> None:
        self.servers, self.clients = Authority(folder / "s"), Authority(folder / "c")
        self.cert, self.key = self.servers.issue("server")
        self.client = self.clients.issue("acme.n1")

    def context(self, **options: Any) -> ssl.SSLContext:
        return server_context(self.cert, self.key, **options)

    def trust(self, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.servers.path)
        if certificate is not None:
            context.load_cert_chain(*certificate)
        return context


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, message: bytes = GET) -> Any:
        self.writer.write(message)
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), SECONDS)
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return json.loads(await asyncio.wait_for(self.reader.readexactly(length), SECONDS))

    @property
    def tls(self) -> ssl.SSLObject:
        found = self.writer.get_extra_info("ssl_object")
        assert found is not None
        return found

    @property
    def serial(self) -> str:
        """Of the server's certificate."""
        return dict(self.tls.getpeercert() or {})["serialNumber"]

    async def close(self) -> None:
        self.writer.close()
        try:
            await asyncio.wait_for(self.writer.wait_closed(), SECONDS)
        except OSError:
            pass


async def connect(server: HttpServer, context: ssl.SSLContext | None, **options: Any) -> Client:
    opening = asyncio.open_connection("127.0.0.1", server.port, ssl=context, **options)
    return Client(*await asyncio.wait_for(opening, SECONDS))


async def refused(server: HttpServer, context: ssl.SSLContext) -> None:
    """Under TLS 1.3 a client learns with its first read that its certificate was not accepted."""
    try:
        client = await connect(server, context)
    except (ssl.SSLError, ConnectionError):
        return
    with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
        await client.ask()
    await client.close()


async def test_a_client_that_trusts_the_authority_is_answered(place: Place) -> None:
    async with serve_http(peers, tls=place.context()) as server:
        assert server.url == f"https://127.0.0.1:{server.port}"
        client = await connect(server, place.trust())
        assert await client.ask() == {"address": "127.0.0.1", "certificate": None, "encrypted": True, "size": 0}
        assert client.tls.version() == "TLSv1.3"
        large = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 3000000\r\n\r\n" + b"x" * 3_000_000
        assert (await client.ask(large))["size"] == 3_000_000
        assert (await client.ask())["size"] == 0
        await client.close()


async def test_requests_in_one_flight_are_answered_in_order_and_a_file_arrives_whole(
    place: Place, tmp_path: Path
) -> None:
    data = b"0123456789abcdef" * 50_000
    (tmp_path / "file").write_bytes(data)

    async def handler(request: HttpRequest) -> HttpResponse:
        if request.path == "/file":
            return HttpResponse(200, body=FileBody(tmp_path / "file", 0, len(data)))
        return HttpResponse(200, body=request.path.encode())

    async with serve_http(handler, tls=place.context()) as server:
        client = await connect(server, place.trust())
        paths = ["/1", "/file", "/2", "/3"]
        client.writer.write(b"".join(b"GET %b HTTP/1.1\r\nhost: h\r\n\r\n" % path.encode() for path in paths))
        for path in paths:
            head = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), SECONDS)
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = await asyncio.wait_for(client.reader.readexactly(length), SECONDS)
            assert body == (data if path == "/file" else path.encode())
        await client.close()


async def test_http_1_1_is_agreed_on_and_tls_1_2_is_the_oldest_spoken(place: Place) -> None:
    async with serve_http(peers, tls=place.context()) as server:
        context = place.trust()
        context.set_alpn_protocols(["h2", "http/1.1"])
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        client = await connect(server, context)
        assert client.tls.version() == "TLSv1.2"
        assert client.tls.selected_alpn_protocol() == "http/1.1"
        cipher = client.tls.cipher()
        assert cipher is not None
        assert "ECDHE" in cipher[0]
        assert "GCM" in cipher[0] or "CHACHA" in cipher[0]
        await client.close()


def old_server(place: Place) -> ssl.SSLContext:
    """A server that still speaks everything: what shows that the clients below fail for the right reason."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place.cert, place.key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@pytest.mark.parametrize(
    ("version", "ciphers"),
    [
        (ssl.TLSVersion.TLSv1, "ALL:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-SHA:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES256-SHA384:@SECLEVEL=0"),
    ],
)
async def test_an_old_version_or_a_weak_cipher_is_refused(place: Place, version: ssl.TLSVersion, ciphers: str) -> None:
    context = place.trust()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    # Level 0, or this client's own library would refuse to try.
    context.set_ciphers(ciphers)
    async with serve_http(peers, tls=old_server(place)) as server:
        client = await connect(server, context)
        assert (await client.ask())["encrypted"]
        await client.close()
    ours = place.context()
    # OpenSSL's security level would refuse old versions too, where a distribution did not lower it.
    assert ours.minimum_version is ssl.TLSVersion.TLSv1_2
    async with serve_http(peers, tls=ours) as server:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await connect(server, context)


async def test_plain_http_on_a_tls_port_gets_no_answer_and_disturbs_nobody(place: Place) -> None:
    async with serve_http(peers, tls=place.context()) as server:
        client = await connect(server, None)
        client.writer.write(GET)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            assert b"HTTP" not in await asyncio.wait_for(client.reader.readexactly(8), SECONDS)
        await client.close()
        good = await connect(server, place.trust())
        assert (await good.ask())["encrypted"]
        await good.close()


async def test_a_certificate_that_is_required_must_come_from_the_authority(place: Place, tmp_path: Path) -> None:
    async with serve_http(peers, tls=place.context(client_ca=place.clients.path)) as server:
        client = await connect(server, place.trust(place.client))
        assert (await client.ask())["certificate"] == "acme.n1"
        await client.close()
        await refused(server, place.trust())
        await refused(server, place.trust(Authority(tmp_path / "x").issue("acme.n1")))
        await refused(server, place.trust(place.clients.issue("acme.n2", valid=(-3, -1))))


async def test_a_certificate_that_may_be_left_out_is_verified_when_it_comes(place: Place, tmp_path: Path) -> None:
    context = place.context(client_ca=place.clients.path, client_required=False)
    async with serve_http(peers, tls=context) as server:
        for certificate, name in ((place.client, "acme.n1"), (None, None)):
            client = await connect(server, place.trust(certificate))
            assert (await client.ask())["certificate"] == name
            await client.close()
        await refused(server, place.trust(Authority(tmp_path / "x").issue("acme.n1")))


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at with every connection instead of once a second."""
    plain = Watch.changed

    def changed(self: Watch) -> bool:
        self.due = 0.0
        return plain(self)

    monkeypatch.setattr(Watch, "changed", changed)


@pytest.mark.usefixtures("no_pause")
async def test_a_renewed_certificate_is_used_for_new_connections_while_old_ones_go_on(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve_http(peers, tls=place.context()) as server:
        old = await connect(server, place.trust())
        place.servers.issue("server")
        new = await connect(server, place.trust())
        assert new.serial != old.serial
        assert (await old.ask())["encrypted"]
        assert (await new.ask())["encrypted"]
        # A key that does not belong to the certificate: written in two steps, or by mistake.
        good = place.key.read_bytes()
        place.key.write_bytes(place.servers.issue("stray")[1].read_bytes())
        with caplog.at_level(logging.WARNING, "tierline.tls"):
            for _ in range(3):
                kept = await connect(server, place.trust())
                assert kept.serial == new.serial
                await kept.close()
        assert len([record for record in caplog.records if record.name == "tierline.tls"]) == 1
        place.key.write_bytes(good)
        named = await connect(server, place.trust(), server_hostname="localhost")
        assert named.serial == new.serial
        for client in (old, new, named):
            await client.close()


@pytest.mark.usefixtures("no_pause")
async def test_a_new_client_authority_replaces_the_old_one(place: Place, tmp_path: Path) -> None:
    async with serve_http(peers, tls=place.context(client_ca=place.clients.path)) as server:
        client = await connect(server, place.trust(place.client))
        await client.close()
        other = Authority(tmp_path / "n")
        place.clients.path.write_bytes(other.path.read_bytes())
        await refused(server, place.trust(place.client))
        client = await connect(server, place.trust(other.issue("acme.n9")))
        assert (await client.ask())["certificate"] == "acme.n9"
        await client.close()


async def test_a_server_ends_while_a_client_is_in_the_middle_of_its_handshake(place: Place) -> None:
    async with serve_http(peers, tls=place.context(), drain_seconds=0.2) as server:
        mute = await connect(server, None)
    await mute.close()


def test_files_that_make_no_server_are_named(place: Place, tmp_path: Path) -> None:
    stray = place.servers.issue("stray")[1]
    locked = place.servers.issue("locked", password=b"x")
    empty = tmp_path / "empty"
    empty.touch()
    for cert, key, authority, words in (
        (tmp_path / "absent", place.key, None, "absent: No such file"),
        (place.cert, tmp_path / "absent", None, "absent: No such file"),
        (place.cert, stray, None, "(?i)mismatch"),
        (empty, place.key, None, "empty and"),
        (*locked, None, "locked.key: the private key is encrypted"),
        (place.cert, place.key, empty, "empty: holds no certificate"),
    ):
        with pytest.raises(InvalidAccess, match=words):
            server_context(cert, key, authority)
        with pytest.raises(InvalidAccess, match=words):
            grpc_credentials(cert, key, authority)


# --- gRPC ------------------------------------------------------------------------------------------------------------------


def grpc_answer(place: Place, port: int, certificate: tuple[Path, Path] | None) -> str | None:
    """The common name that the server saw, "" = none; None = no connection."""
    client = None if certificate is None else tuple(path.read_bytes() for path in reversed(certificate))
    credentials = grpc.ssl_channel_credentials(place.servers.path.read_bytes(), *(client or ()))
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
        answer = channel.unary_unary("/t/who").future(b"", timeout=SECONDS)
        if answer.exception(SECONDS) is None:
            found: bytes = answer.result(SECONDS)
            return found.decode()
        assert answer.code() is grpc.StatusCode.UNAVAILABLE
        return None


@pytest.mark.usefixtures("no_pause")
def test_grpc_asks_for_the_same_certificates_and_takes_renewed_ones(place: Place, tmp_path: Path) -> None:
    def who(request: bytes, context: Any) -> bytes:
        return b"".join(context.auth_context().get("x509_common_name", ()))

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(who)

    for options, without in (({}, ""), ({"client_ca": place.clients.path}, None)):
        server = grpc.server(ThreadPoolExecutor(2), handlers=[Handler()])
        port = server.add_secure_port("127.0.0.1:0", grpc_credentials(place.cert, place.key, **options))
        server.start()
        try:
            assert grpc_answer(place, port, None) == without
            if options:
                assert grpc_answer(place, port, place.client) == "acme.n1"
            else:
                place.servers = Authority(tmp_path / "renewed")
                for new, old in zip(place.servers.issue("server"), (place.cert, place.key), strict=True):
                    old.write_bytes(new.read_bytes())
                assert grpc_answer(place, port, None) == ""
        finally:
            server.stop(0).wait(SECONDS)


# --- Unix sockets ----------------------------------------------------------------------------------------------------------


async def ask_unix(path: Path) -> Any:
    client = Client(*await asyncio.wait_for(asyncio.open_unix_connection(str(path)), SECONDS))
    answer = await client.ask()
    await client.close()
    return answer


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[Path]:
    found = tmp_path / "t.sock"
    yield found
    assert not found.exists(), "a socket's file was left behind"


async def test_one_server_answers_on_tcp_and_on_a_unix_socket(path: Path) -> None:
    async with serve_http(peers, unix=path) as server:
        assert server.urls == (f"http://127.0.0.1:{server.port}", f"unix://{path}")
        assert path.stat().st_mode & 0o777 == 0o600
        assert (await ask_unix(path))["address"] == "unix"
        client = await connect(server, None)
        assert (await client.ask())["address"] == "127.0.0.1"
        await client.close()


async def test_a_server_may_listen_on_a_unix_socket_alone(path: Path) -> None:
    async with serve_http(peers, host=None, unix=path, unix_mode=0o660) as server:
        assert server.urls == (server.url,) == (f"unix://{path}",)
        assert path.stat().st_mode & 0o777 == 0o660
        assert (await ask_unix(path))["encrypted"] is False
    with pytest.raises(ValueError, match="neither"):
        async with serve_http(peers, host=None):
            pass


async def test_tls_is_for_tcp_the_unix_socket_beside_it_stays_plain(place: Place, path: Path) -> None:
    async with serve_http(peers, tls=place.context(), unix=path) as server:
        assert server.urls[0].startswith("https://")
        assert (await ask_unix(path))["address"] == "unix"


async def test_the_file_of_a_dead_server_is_replaced_and_that_of_a_live_one_is_not(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serve_http(peers, host=None, unix=path):
        with pytest.raises(OSError, match="another server answers here"):
            async with serve_http(peers, unix=path):
                pass
        assert (await ask_unix(path))["address"] == "unix"


async def test_what_is_no_socket_is_never_removed(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_text("keep")
    for name, words in (("data", "not a socket"), ("absent/t.sock", "No such file"), ("x" * 120, "too long")):
        with pytest.raises(OSError, match=words) as error:
            async with serve_http(peers, unix=tmp_path / name):
                pass
        assert "cannot listen on" in str(error.value)
    assert file.read_text() == "keep"


async def test_the_file_of_a_successor_is_left_in_place(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    async with serve_http(peers, host=None, unix=path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
    assert path.exists()


async def test_a_unix_socket_lets_a_request_finish_before_the_server_ends(path: Path) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def handler(request: HttpRequest) -> HttpResponse:
        started.set()
        await release.wait()
        return await peers(request)

    async with serve_http(handler, host=None, unix=path):
        asking = asyncio.ensure_future(ask_unix(path))
        await asyncio.wait_for(started.wait(), SECONDS)
        asyncio.get_running_loop().call_later(0.05, release.set)
    assert (await asking)["address"] == "unix"
