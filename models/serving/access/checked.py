"""The callers of a server with an access file: who they are by token or certificate, what they may see by tenant."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from models.errors import Overloaded, Unauthenticated
from models.serving.access.files import Files, State
from models.serving.access.settings import InvalidAccess
from models.serving.access.tokens import CLOCK_SKEW_SECONDS, MAX_TOKEN_BYTES, Claims, find_key, require_valid, verify
from models.serving.buckets import Bucket, Recent
from models.serving.caller import Caller, Peer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

log = logging.getLogger("tierline.access")

MAX_REMEMBERED = 4096
"""Verified tokens that are remembered; only who holds one can fill this."""
FAILURES_PER_SECOND = 20.0
FAILURES_AT_ONCE = 100
MAX_ADDRESSES = 1024
"""Tokens of one address that may fail once their signature was looked at, which costs four times what serving a small model
does; what has not the form of a token or names no key of ours costs little and is not counted. Counted for so many addresses,
the latest. Tokens known to be good are not held up."""
RETRY_SECONDS = 1.0
"""When to come back after that: others may then be looked at, `FAILURES_PER_SECOND` of them."""


class _Verified(msgspec.Struct, frozen=True):
    """A token whose signature held under `key`. `caller`: who that was when the access had this `revision`."""

    kid: str
    key: Ed25519PublicKey
    claims: Claims
    caller: Caller
    revision: int


class CheckedAccess:
    """`models.serving.caller.Access` by the access file at `path`, read again whenever it or a file it names changes.

    `listening`: the hosts that this server listens on, "unix" for a Unix socket; what is open to local clients depends on
    it. `clock`: seconds of the epoch. A file that becomes unreadable while the server runs changes nothing: the error is
    logged, what it said last holds on, and the other files count. Raises InvalidAccess.
    """

    def __init__(
        self,
        path: Path,
        *,
        listening: Sequence[str] = ("127.0.0.1",),
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._listening = tuple(listening)
        self._clock = clock
        self._monotonic = monotonic
        self._revision = 0
        self._trouble = ""  # the last error that was logged
        self._failures: Recent[str, Bucket] = Recent(
            lambda address: Bucket(FAILURES_PER_SECOND, FAILURES_AT_ONCE), MAX_ADDRESSES
        )
        self._known: OrderedDict[bytes, _Verified] = OrderedDict()
        self._files = Files(path, monotonic)
        state = self._files.read()
        if state.wrong:
            raise InvalidAccess(state.wrong[0])
        self._apply(state)

    @property
    def revision(self) -> int:
        if self._monotonic() >= self._files.due:
            self._refresh()
        return self._revision

    @property
    def takes_tokens(self) -> bool:
        """Whether the access file names keys."""
        return bool(self._state.keys)

    def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
        """A token counts before a certificate, a certificate before being local.

        Raises Unauthenticated, and Overloaded where too many tokens of the same address did not verify lately: that says
        nothing about this one.
        """
        if self._monotonic() >= self._files.due:
            self._refresh()
        if authorization is not None:
            return self._by_token(peer, authorization)
        if peer.certificate is not None:
            return self._by_certificate(peer.certificate)
        if self._is_open(peer):
            return self._local
        raise Unauthenticated(self._wanted)

    def may_use(self, caller: Caller, model: str) -> bool:
        if not _matches(caller.models, model):
            return False
        settings = self.settings
        client = None if caller.client is None else settings.clients.get(caller.client)
        if client is not None and client.models is not None:
            return _matches(client.models, model)
        tenant = settings.tenant(caller.tenant)
        return tenant is None or _matches(tenant.models, model)

    # --- who ---------------------------------------------------------------------------------------------------------------

    def _by_token(self, peer: Peer, authorization: bytes) -> Caller:
        scheme, _, credential = authorization.partition(b" ")
        credential = credential.strip()
        if scheme.lower() != b"bearer" or not credential:
            raise Unauthenticated("the authorization header is not 'Bearer TOKEN'")
        if not self._state.keys:
            raise Unauthenticated("tokens are not taken here")
        if self.settings.require_tls and not (peer.encrypted or peer.is_local):
            raise Unauthenticated("a token must not travel unencrypted: connect with TLS, and replace this token")
        if len(credential) > MAX_TOKEN_BYTES:
            raise Unauthenticated(f"the bearer token is malformed: more than {MAX_TOKEN_BYTES} bytes")
        digest = hashlib.sha256(credential).digest()
        known = self._known.get(digest)
        if known is None or self._state.keys.get(known.kid) != known.key:
            known = self._known[digest] = self._verified(peer.address, credential.decode("latin-1"))
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
            return known.caller
        if known.revision != self._revision or self._monotonic() >= known.caller.expires:
            # The same bytes under the same key: the signature holds, what else there is to say may have changed.
            known = self._known[digest] = self._entry(known.kid, known.key, known.claims)
        self._known.move_to_end(digest)
        return known.caller

    def _verified(self, address: str, token: str) -> _Verified:
        """Raises Unauthenticated, and Overloaded before a signature is looked at."""
        state = self._state
        kid, key = find_key(token, state.keys)
        failures = self._failures.known(address)
        if failures is not None and failures.is_empty(self._monotonic()):
            raise Overloaded("too many tokens from this address did not verify", RETRY_SECONDS)
        try:
            return self._entry(kid, key, verify(token, key, state.settings.audience, self._clock()))
        except Unauthenticated:
            self._failures[address].take(self._monotonic())
            raise

    def _entry(self, kid: str, key: Ed25519PublicKey, claims: Claims) -> _Verified:
        now = self._clock()
        require_valid(claims, self.settings.audience, now)
        if self._state.revoked.covers(claims.sub, claims.jti, claims.iat):
            raise Unauthenticated("the token has been revoked")
        return _Verified(kid, key, claims, self._caller_of(claims, now), self._revision)

    def _caller_of(self, claims: Claims, now: float) -> Caller:
        listed = self.settings.clients.get(claims.sub)
        tenant = claims.tenant
        admin = claims.admin
        if listed is not None:
            if tenant is not None and listed.tenant is not None and tenant != listed.tenant:
                raise Unauthenticated("the token's tenant is not the one that its client belongs to here")
            tenant = tenant or listed.tenant
            admin = admin or listed.admin
        self._check_tenant(tenant, admin, "the token")
        expires = self._monotonic() + (claims.exp + CLOCK_SKEW_SECONDS - now)
        return Caller(claims.sub, tenant, admin, claims.models, expires)

    def _by_certificate(self, name: str) -> Caller:
        if self._state.revoked.covers(name):
            raise Unauthenticated("the certificate's client has been revoked")
        settings = self.settings
        listed = settings.clients.get(name)
        tenant = None if listed is None else listed.tenant
        if tenant is None and settings.tenant_from_certificate:
            tenant = name.partition(".")[0] if "." in name else None
        if listed is None and tenant is None:
            raise Unauthenticated(f"the certificate is good, but its name '{name}' is no client's of this server")
        admin = listed is not None and listed.admin
        self._check_tenant(tenant, admin, "the certificate")
        return Caller(name, tenant, admin)

    def _check_tenant(self, tenant: str | None, admin: bool, what: str) -> None:
        # An administrator belongs to no tenant; anybody else without one would see every tenant's models.
        if not self.settings.tenants or (tenant is None and admin) or self.settings.tenant(tenant) is not None:
            return
        if tenant is None:
            raise Unauthenticated(f"{what} names no tenant, and this server serves those of its tenants alone")
        raise Unauthenticated(f"{what}'s tenant is not known here")

    def _is_open(self, peer: Peer) -> bool:
        return self._open and peer.is_local and (peer.address != "unix" or "unix" in self._listening)

    # --- what was read -----------------------------------------------------------------------------------------------------

    def _apply(self, state: State) -> None:
        self._state = state
        self.settings = state.settings
        settings = state.settings
        local_only = all(_is_local(host) for host in self._listening)
        self._open = local_only if settings.open_loopback is None else settings.open_loopback
        self._local = Caller(admin=settings.loopback_admin)
        self._wanted = "this needs a credential: " + (
            "a bearer token in the authorization header" if state.keys else "a TLS client certificate"
        )
        self._revision += 1

    def _refresh(self) -> None:
        if not self._files.changed():
            return
        before = self._state
        try:
            state = self._files.read()
        except InvalidAccess:
            state = before
        trouble = self._files.troubles
        if trouble and trouble != self._trouble:
            log.warning("what was read before holds on: %s", trouble)
        self._trouble = trouble
        if state.revoked is not before.revoked:
            for each in state.wrong:
                log.warning("left out: %s", each)
        if (state.settings, state.keys, state.revoked) != (before.settings, before.keys, before.revoked):
            self._apply(state)
            log.info("access: read again, revision %d", self._revision)


def _matches(patterns: tuple[str, ...] | None, model: str) -> bool:
    return patterns is None or any(fnmatchcase(model, pattern) for pattern in patterns)


def _is_local(host: str) -> bool:
    return host == "localhost" or Peer(host).is_local
