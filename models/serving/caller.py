"""Who asks, and what they may see. Frontends identify a caller once per connection or credential; the core checks.

The seam between frontends and `models.serving.access`, which knows tokens, certificates and tenants.
"""

from __future__ import annotations

import time
from math import inf
from typing import Protocol

import msgspec

from models.errors import Forbidden


class Peer(msgspec.Struct, frozen=True):
    """The other end of a connection. `address`: an IP address, or "unix". `certificate`: the verified subject of a TLS
    client certificate (its common name), None = none was shown. `encrypted`: whether the connection is TLS."""

    address: str = "127.0.0.1"
    certificate: str | None = None
    encrypted: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it can only be this machine."""
        return self.address in ("unix", "::1") or self.address.startswith("127.")


LOCAL_PEER = Peer()


class Caller(msgspec.Struct, frozen=True):
    """Who asks. `client`: a name for limits and logs; `tenant`: whose models and cache entries; None = not authenticated.
    `admin`: may load, unload and change settings. `models`: names that may be used, shell patterns, None = all.
    `expires`: monotonic seconds after which the caller must be identified again."""

    client: str | None = None
    tenant: str | None = None
    admin: bool = False
    models: tuple[str, ...] | None = None
    expires: float = inf

    @property
    def is_current(self) -> bool:
        return time.monotonic() < self.expires


class Access(Protocol):
    """Tells who a caller is and what they may see. Synchronous: called in the event loop, answers at once.

    `revision` grows whenever an earlier answer of any method may no longer hold (a revocation, new settings).
    """

    @property
    def revision(self) -> int: ...

    def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
        """`authorization`: the header's value as sent. Raises Unauthenticated."""
        ...

    def may_use(self, caller: Caller, model: str) -> bool:
        """Whether `caller` may know of `model` and use it."""
        ...


class OpenAccess:
    """Everybody may do everything: for loopback, where the operating system decides who can connect."""

    revision = 0

    def __init__(self) -> None:
        self._anybody = Caller(admin=True)

    def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
        return self._anybody

    def may_use(self, caller: Caller, model: str) -> bool:
        return True


def require_admin(caller: Caller) -> None:
    """Raises Forbidden."""
    if not caller.admin:
        raise Forbidden("this needs an administrator's credential")
