"""How the places a node talks to are reached: name, port, certificate, one request. Every wait is bounded."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from sync import tunnel
from sync.channel import broker_address
from sync.errors import InvalidConfig

CONNECT_SECONDS = 4.0
MAX_BODY = 64 * 1024

# OpenSSL's X509_V_ERR_*, from x509_vfy.h.
_EXPIRED, _NOT_YET = (10,), (9,)
_NAME = (62, 64)
_UNKNOWN = (2, 18, 19, 20, 21)


@dataclass(frozen=True)
class Place:
    """`uses`: what it is there for (broker, hub, ...). `tls`: makes the context of a connection, None = plain."""

    uses: tuple[str, ...]
    url: str
    host: str
    port: int
    tls: Callable[[], ssl.SSLContext] | None = field(default=None, repr=False)
    proxy: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'/'.join(self.uses)} {host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Reply:
    """`took`: seconds from the request to the head of the answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    took: float


def place_of(use: str, url: str, tls: Callable[[], ssl.SSLContext], proxy: str | None = None) -> Place:
    """Raises InvalidConfig for what is no URL of a broker or an HTTP server."""
    if url.startswith(("http://", "https://")):
        parts = urlsplit(url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidConfig(f"{use}: {error}") from error
        secure = parts.scheme == "https"
        return Place((use,), url, host or "localhost", port or (443 if secure else 80), tls if secure else None, proxy)
    address = broker_address(url)
    return Place((use,), url, address.host, address.port, tls if address.tls else None, proxy)


def resolve(host: str, port: int) -> list[str]:
    """Addresses, as the machine resolves them. Raises OSError."""
    return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})


def connect(place: Place, timeout: float = CONNECT_SECONDS) -> socket.socket:
    """A TCP connection, through the proxy if there is one. Raises OSError."""
    if place.proxy is not None:
        return tunnel.connect(tunnel.read_proxy(place.proxy), place.host, place.port, timeout)
    return socket.create_connection((place.host, place.port), timeout=timeout)


def shake_hands(place: Place, timeout: float = CONNECT_SECONDS) -> float:
    """Seconds until the other side's certificate expires. Raises OSError, of which ssl.SSLError says what is wrong with it."""
    assert place.tls is not None
    context = place.tls()
    with connect(place, timeout) as plain, context.wrap_socket(plain, server_hostname=place.host) as secure:
        shown = secure.getpeercert() or {}
        return ssl.cert_time_to_seconds(str(shown["notAfter"])) - time.time()


def get(
    place: Place, path: str, bearer: str | None = None, timeout: float = CONNECT_SECONDS, limit: int = MAX_BODY
) -> Reply:
    """GET `path`; of the body the first `limit` bytes. Raises OSError, or ValueError for an answer that is no HTTP."""
    sock: socket.socket = connect(place, timeout)
    try:
        if place.tls is not None:
            sock = place.tls().wrap_socket(sock, server_hostname=place.host)
        connection = http.client.HTTPConnection(place.host, place.port, timeout=timeout)
        connection.sock = sock
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        began = time.monotonic()
        connection.request("GET", urlsplit(place.url).path.rstrip("/") + path, headers=headers)
        answer = connection.getresponse()
        took = time.monotonic() - began
        return Reply(answer.status, answer.headers, answer.read(limit), took)
    except http.client.HTTPException as error:
        raise ValueError(f"no answer in HTTP: {type(error).__name__}") from error
    finally:
        sock.close()


def explain_tls(error: ssl.SSLError) -> tuple[str, str]:
    """(what is wrong, what to do) for a handshake that failed."""
    code = getattr(error, "verify_code", 0)
    if code in _EXPIRED:
        return "its certificate has expired", (
            "restart the hub (it renews its own certificates at the start and every hour), or renew the broker's; "
            "if many places look expired at once, this machine's clock is wrong"
        )
    if code in _NOT_YET:
        return "its certificate is not valid yet", "set this machine's clock: it is behind"
    if code in _NAME:
        return f"its certificate is for other names: {getattr(error, 'verify_message', '') or error}", (
            "start the hub with --public-name for the name used here, or use a name that its certificate has"
        )
    if code in _UNKNOWN:
        return "its certificate is signed by an authority this node does not trust", (
            "check that this is the right address; behind an inspecting proxy ask for an exception, and if the hub has a new "
            "authority join it again with a new token"
        )
    reason = getattr(error, "reason", None) or str(error)
    if "ALERT" in str(reason).upper():
        return (
            f"it ended the handshake: {reason}",
            "its log says why; mostly it does not accept this node's certificate",
        )
    return f"no TLS there: {reason}", "check the port and the scheme: does this port speak TLS?"


def explain_socket(error: OSError) -> str:
    """One phrase for a connection that was not made."""
    if isinstance(error, TimeoutError):
        return "no answer (a firewall that drops packets, or a machine that is off)"
    if isinstance(error, ConnectionRefusedError):
        return "refused: nothing listens there"
    return error.strerror or str(error) or type(error).__name__
