"""The callers of a server with an access file: who they are by token or certificate, what they may see by tenant."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from models.errors import Unauthenticated
from models.serving.access.revoked import NOTHING, Revoked, load_revoked
from models.serving.access.settings import InvalidAccess, Settings, load_settings
from models.serving.access.tokens import CLOCK_SKEW_SECONDS, MAX_TOKEN_BYTES, Claims, jws, verify
from models.serving.access.watch import Watch
from models.serving.buckets import Bucket, Recent
from models.serving.caller import Caller, Peer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

log = logging.getLogger("tierline.access")

MAX_REMEMBERED = 4096
"""Verified tokens and certificates that are remembered; only who holds one can fill this."""
FAILURES_PER_SECOND = 20.0
FAILURES_AT_ONCE = 100
MAX_ADDRESSES = 1024
"""Tokens of one address that may fail to verify: each costs four times what serving a small model does. Counted for so many
addresses, the latest."""


class _State(msgspec.Struct, frozen=True):
    """Everything that was read from files, replaced as a whole."""

    settings: Settings
    keys: Mapping[str, Ed25519PublicKey]
    revoked: Revoked
    wrong: tuple[str, ...]


class CheckedAccess:
    """`models.serving.caller.Access` by the access file at `path`, read again whenever it or a file it names changes.

    `listening`: the hosts that this server listens on, "unix" for a Unix socket; what is open to local clients depends on
    it. `clock`: seconds of the epoch. A file that becomes unreadable while the server runs changes nothing: the error is
    logged, what was read last holds on. Raises InvalidAccess.
    """

    def __init__(
        self,
        path: Path,
        *,
        listening: Sequence[str] = ("127.0.0.1",),
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._listening = tuple(listening)
        self._clock = clock
        self._monotonic = monotonic
        self._revision = 0
        self._trouble = ""  # the last error that was logged
        self._failures: Recent[str, Bucket] = Recent(
            lambda address: Bucket(FAILURES_PER_SECOND, FAILURES_AT_ONCE), MAX_ADDRESSES
        )
        self._watch = Watch(_files(path, load_settings(path)), monotonic)
        state = _load(path)
        if state.wrong:
            raise InvalidAccess(state.wrong[0])
        self._apply(state)

    @property
    def revision(self) -> int:
        if self._monotonic() >= self._watch.due:
            self._refresh()
        return self._revision

    @property
    def takes_tokens(self) -> bool:
        """Whether the access file names keys."""
        return bool(self._state.keys)

    def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
        """A token counts before a certificate, a certificate before being local. Raises Unauthenticated."""
        if self._monotonic() >= self._watch.due:
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
        if known is not None and self._monotonic() < known.expires:
            self._known.move_to_end(digest)
            return known
        caller = self._verified(peer.address, credential)
        self._remember(digest, caller)
        return caller

    def _verified(self, address: str, credential: bytes) -> Caller:
        failures = self._failures.known(address)
        if failures is not None and failures.is_empty(self._monotonic()):
            raise Unauthenticated("too many tokens from this address did not verify; wait a second")
        state, now = self._state, self._clock()
        try:
            claims = verify(credential.decode("latin-1"), state.keys, state.settings.audience, now)
        except Unauthenticated:
            self._failures[address].take(self._monotonic())
            raise
        if state.revoked.covers(claims.sub, claims.jti, claims.iat):
            raise Unauthenticated("the token has been revoked")
        return self._caller_of(claims, now)

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
        known = self._known.get(name)
        if known is not None:
            return known
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
        caller = Caller(name, tenant, admin)
        self._remember(name, caller)
        return caller

    def _check_tenant(self, tenant: str | None, admin: bool, what: str) -> None:
        # An administrator belongs to no tenant; anybody else without one would see every tenant's models.
        if not self.settings.tenants or (tenant is None and admin) or self.settings.tenant(tenant) is not None:
            return
        if tenant is None:
            raise Unauthenticated(f"{what} names no tenant, and this server serves those of its tenants alone")
        raise Unauthenticated(f"{what}'s tenant is not known here")

    def _is_open(self, peer: Peer) -> bool:
        return self._open and peer.is_local and (peer.address != "unix" or "unix" in self._listening)

    def _remember(self, key: bytes | str, caller: Caller) -> None:
        self._known[key] = caller
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    # --- what was read -----------------------------------------------------------------------------------------------------

    def _apply(self, state: _State) -> None:
        self._state = state
        self.settings = state.settings
        settings = state.settings
        local_only = all(_is_local(host) for host in self._listening)
        self._open = local_only if settings.open_loopback is None else settings.open_loopback
        self._local = Caller(admin=settings.loopback_admin)
        self._wanted = "this needs a credential: " + (
            "a bearer token in the authorization header" if state.keys else "a TLS client certificate"
        )
        self._known: OrderedDict[bytes | str, Caller] = OrderedDict()
        self._revision += 1

    def _refresh(self) -> None:
        if not self._watch.changed():
            return
        try:
            files = _files(self._path, load_settings(self._path))
            if files != self._watch.paths:
                self._watch.watch(files)  # before they are read, so that no change is missed
            state = _load(self._path)
        except InvalidAccess as error:
            self._watch.look_again()
            if str(error) != self._trouble:
                log.warning("what was read before holds on: %s", error)
            self._trouble = str(error)
            return
        self._trouble = ""
        for each in state.wrong:
            log.warning("left out: %s", each)
        self._apply(state)
        log.info("access: read again, revision %d", self._revision)


def _files(path: Path, settings: Settings) -> tuple[Path, ...]:
    named = (settings.keys, settings.revoked)
    return (path, *(path.parent / each for each in named if each is not None))


def _load(path: Path) -> _State:
    settings = load_settings(path)
    keys: Mapping[str, Ed25519PublicKey] = {}
    revoked, wrong = NOTHING, list[str]()
    if settings.keys is not None:
        # Here, not above: a server that knows certificates alone starts without loading cryptography.
        from models.serving.access.keys import load_keys

        jws()  # a missing package is an error now, not at the first token
        keys = load_keys(path.parent / settings.keys)
    if settings.revoked is not None:
        revoked, wrong = load_revoked(path.parent / settings.revoked)
    return _State(settings, keys, revoked, tuple(wrong))


def _matches(patterns: tuple[str, ...] | None, model: str) -> bool:
    return patterns is None or any(fnmatchcase(model, pattern) for pattern in patterns)


def _is_local(host: str) -> bool:
    return host == "localhost" or Peer(host).is_local
