"""The client's URL, taken apart."""

from __future__ import annotations

from os import PathLike
from urllib.parse import unquote, urlsplit

import msgspec

from models.serving.endpoint import Endpoint, client_tls

_PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 8001}
"""Where a URL without a port leads: Triton's ports, which are ours; of https the web's."""
FORMS = "http://host:port, https://host:port, unix:///path.sock, grpc://host:port or grpcs://host:port"

PathText = str | PathLike[str]


class Address(msgspec.Struct, frozen=True):
    """`prefix`: of every path, without a '/' at its end. `authority`: the Host header. `grpc`: instead of HTTP."""

    endpoint: Endpoint
    prefix: str
    authority: str
    grpc: bool
    encrypted: bool


def parse_address(
    url: str, *, ca: PathText | None = None, certificate: PathText | None = None, key: PathText | None = None
) -> Address:
    """Raises ValueError for a URL or options that cannot be used, OSError for a file that cannot be read."""
    parts = urlsplit(url)
    scheme = parts.scheme
    encrypted = scheme in ("https", "grpcs")
    if (ca, certificate, key) != (None, None, None) and not encrypted:
        raise ValueError(f"ca, certificate and key belong to https:// and grpcs://, not to {url!r}")
    if key is not None and certificate is None:
        raise ValueError("key is given without its certificate")
    if scheme == "unix" and parts.path.startswith("/") and not (parts.netloc or parts.query or parts.fragment):
        return Address(Endpoint(path=unquote(parts.path)), "", "localhost", grpc=False, encrypted=False)
    grpc = scheme in ("grpc", "grpcs")
    if scheme not in _PORTS or not parts.hostname or parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is none of {FORMS}")
    prefix = parts.path.rstrip("/")
    if not (url.isascii() and url.isprintable()) or " " in url or (grpc and prefix):
        raise ValueError(f"{url!r} is none of {FORMS}")
    tls = client_tls(ca, certificate, key) if encrypted else None
    return Address(
        Endpoint(parts.hostname, parts.port or _PORTS[scheme], tls=tls), prefix, parts.netloc, grpc, encrypted
    )
