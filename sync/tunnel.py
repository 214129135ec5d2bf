"""A TCP connection through an HTTP proxy: one CONNECT request (RFC 9110, 9.3.6). For brokers and files alike.

Own code because the one alternative, PySocks, is 20 kB more to carry for these thirty lines and knows no bound on what a proxy
answers.
"""

from __future__ import annotations

import base64
import socket
import time
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from sync.errors import InvalidConfig

MAX_ANSWER_BYTES = 16 * 1024
"""Longest head of a proxy's answer. Those seen have 100 to 500 bytes."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """`credentials`: the value of Proxy-Authorization."""

    host: str
    port: int
    credentials: str | None = field(default=None, repr=False)


def read_proxy(url: str) -> Proxy:
    """From http://[user:password@]host:port. Raises InvalidConfig, without repeating the password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidConfig("proxy: not http://host:port") from error
    if parts.scheme != "http" or not host or not port or parts.path.strip("/") or parts.query:
        raise InvalidConfig("proxy: not http://[user:password@]host:port")
    credentials = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        credentials = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return Proxy(host, port, credentials)


def connect(proxy: Proxy, host: str, port: int, timeout: float) -> socket.socket:
    """A socket that leads to `host:port`, within `timeout` seconds. Raises OSError when the proxy is away or refuses."""
    end = time.monotonic() + timeout
    connected = socket.create_connection((proxy.host, proxy.port), timeout=timeout)
    try:
        _ask(connected, proxy, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", end)
    except BaseException:
        connected.close()
        raise
    connected.settimeout(timeout)
    return connected


def _ask(connected: socket.socket, proxy: Proxy, target: str, end: float) -> None:
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.credentials is not None:
        lines.append(f"Proxy-Authorization: {proxy.credentials}")
    connected.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    head = b""
    # Byte by byte: what follows the head belongs to the connection behind the proxy.
    while not head.endswith(b"\r\n\r\n"):
        left = end - time.monotonic()
        if left <= 0 or len(head) > MAX_ANSWER_BYTES:
            raise OSError(f"the proxy {proxy.host}:{proxy.port} did not finish its answer")
        connected.settimeout(left)
        byte = connected.recv(1)
        if not byte:
            raise OSError(f"the proxy {proxy.host}:{proxy.port} closed the connection")
        head += byte
    status = head.split(b"\r\n", 1)[0].split(b" ", 2)
    if len(status) < 2 or status[1] != b"200":
        answer = b" ".join(status[1:]).decode("latin-1")[:100]
        raise OSError(f"the proxy {proxy.host}:{proxy.port} refused {target}: {answer}")
