"""Which web pages may ask. A browser sends what any page says, from its user's machine: being local is no sign of consent.

Sources: the Fetch standard ("Origin header"), W3C Fetch Metadata Request Headers, RFC 9110 7.2 (Host).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from models.errors import Forbidden
from models.serving.exchange import Handler, HttpHead, HttpRequest, HttpResponse, error_response

_OWN_SITES = (None, b"none", b"same-origin")
_HOST = re.compile(rb"(\[[^\]]*\]|[^:]*)(?::\d*)?")
# Digits and dots are an address to every browser: no name looks like that.
_LOOPBACK = re.compile(rb"127(\.\d{1,3}){1,3}")


class Pages:
    """`origins`: of pages whose scripts may ask, as browsers send them ("https://example.org"). `host`: that this server is
    bound to. Clients that are no browsers say nothing of a page and are not concerned."""

    def __init__(self, origins: Collection[str] = (), host: str = "") -> None:
        self._origins = frozenset(origin.encode("latin-1") for origin in origins)
        bound = f"[{host}]" if ":" in host else host
        listed = (_name_of(origin.partition(b"://")[2]) for origin in self._origins)
        self._names = frozenset((b"", b"localhost", b"[::1]", bound.lower().encode("latin-1"), *listed))

    def require(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises Forbidden for what a page sends that is not on the list."""
        origin = headers.get(b"origin")
        if origin is None:
            if headers.get(b"sec-fetch-site") not in _OWN_SITES:
                raise Forbidden("pages of other sites may not ask here")
        elif origin not in self._origins:
            raise Forbidden(f"pages of {origin.decode('latin-1')!r} may not ask here")

    def is_misnamed(self, head: HttpHead) -> bool:
        """Whether a client on this machine calls this server by a name that is not this machine's: what a page does once
        its own name has been pointed here (DNS rebinding). TLS compares the name itself."""
        peer = head.peer
        if not peer.is_local or peer.encrypted or peer.address == "unix":
            return False
        name = _name_of(head.headers.get(b"host", b""))
        return name not in self._names and not _LOOPBACK.fullmatch(name)

    def require_name(self, head: HttpHead) -> None:
        """Raises Forbidden for a request without a credential that `is_misnamed`."""
        if self.is_misnamed(head):
            host = head.headers[b"host"].decode("latin-1")
            raise Forbidden(f"without a credential this server is asked as localhost or 127.0.0.1, not as {host!r}")

    def around(self, handler: Handler) -> Handler:
        """`handler`, which knows no credentials, without the requests of other pages."""

        async def handle(request: HttpRequest) -> HttpResponse:
            try:
                self.require(request.headers)
                self.require_name(request.head)
            except Forbidden as error:
                return error_response(error)
            return await handler(request)

        return handle


def _name_of(host: bytes) -> bytes:
    """The host without its port, in lower case."""
    found = _HOST.fullmatch(host)
    return (host if found is None else found[1]).lower()
