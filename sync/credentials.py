"""How a node shows who it is: an identity (key and certificate), or a token for evaluation on one machine.

    identity/live -> pair-2        the pair in use; changed in one rename
    identity/pair-1/, pair-2/      key.pem (0600), cert.pem, ca.pem, hub.json: under which addresses its hub says it answers
    identity/{key,cert,ca}.pem     links into `live`, for programs that want files

The old pair stays until the new one has opened a connection once. A certificate that has expired is still shown: the broker
refuses it, renewal does not, and nothing else on the node asks.
"""

from __future__ import annotations

import secrets
import shutil
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from sync.clock import Clock, SystemClock
from sync.durable import flush, write_new, write_whole
from sync.errors import InvalidConfig, StoreFailed
from sync.origin import origins_of

AUDIENCE = "tierline-hub"
BEARER_SECONDS = 300.0
BEARER_REUSE_SECONDS = 120.0
"""A bearer token is used for so long and then made anew: most of its life is left for the request it goes with."""
MAX_PEM_BYTES = 64 * 1024
FILES = ("key.pem", "cert.pem", "ca.pem")
HUB = "hub.json"
PENDING = "joining.pem"
"""The key of a join that is not over: it is shown again when the hub's answer, or the power, was lost."""


class Credentials(Protocol):
    """What opens the link and the sources."""

    @property
    def password(self) -> str | None: ...
    @property
    def hub_origins(self) -> tuple[str, ...]: ...
    def bearer(self) -> str: ...
    def link_context(self) -> ssl.SSLContext: ...
    def http_context(self) -> ssl.SSLContext | None: ...
    def connected(self) -> None: ...


@dataclass(frozen=True)
class TokenCredentials:
    """A token is the MQTT password and the HTTP bearer token; TLS goes by the machine's own trust."""

    token: str

    @property
    def password(self) -> str | None:
        return self.token

    @property
    def hub_origins(self) -> tuple[str, ...]:
        return ()

    def bearer(self) -> str:
        return self.token

    def link_context(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def http_context(self) -> ssl.SSLContext | None:
        return None

    def connected(self) -> None:
        """Nothing waits for it."""


@dataclass(frozen=True)
class Pair:
    """A key, its certificate and whom it trusts. Times: Unix seconds. `issued` leaves out that certificates are backdated.

    `hub_origins`: as `sync.origin` writes them, of the hub that issued it; None = it was kept by a release that did not ask.
    """

    folder: Path
    key: EllipticCurvePrivateKey
    node: str
    not_before: float
    not_after: float
    hub_origins: tuple[str, ...] | None = None


class _Hub(msgspec.Struct, frozen=True):
    origins: tuple[str, ...]


class Identity:
    """The folder of a node's certificates; meets `Credentials`. Used from one thread, its contexts from any."""

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        """Raises InvalidConfig when there is no usable pair in it."""
        self._folder = folder
        self._clock = clock or SystemClock()
        self._bearer: tuple[str, float] = ("", 0.0)
        self._attempts = 0
        self._shown: Path | None = None
        self.pair = self._read_live()

    @property
    def password(self) -> str | None:
        return None

    @property
    def hub_origins(self) -> tuple[str, ...]:
        """Where, besides the URL by which it joined, the hub that issued the certificate said it answers."""
        return self.pair.hub_origins or ()

    @property
    def ca(self) -> Path:
        return self.pair.folder / "ca.pem"

    def bearer(self) -> str:
        """A JSON Web Token signed by the node's key, good for five minutes. Raises InvalidConfig without PyJWT."""
        token, made = self._bearer
        now = self._clock.wall()
        if not token or not 0 <= now - made < BEARER_REUSE_SECONDS:
            token = self._sign_bearer(now)
            self._bearer = (token, now)
        return token

    def link_context(self) -> ssl.SSLContext:
        """For one connection. While a new pair has never worked, every third attempt shows the one before."""
        shown = self.pair.folder
        before = self._before()
        if before is not None:
            self._attempts += 1
            shown = before if self._attempts % 3 == 0 else shown
        self._shown = shown
        context = _context(shown / "ca.pem" if shown == self.pair.folder else self.ca)
        try:
            context.load_cert_chain(shown / "cert.pem", shown / "key.pem")
        except OSError as error:
            raise InvalidConfig(f"{shown}: {error}") from error
        return context

    def http_context(self) -> ssl.SSLContext | None:
        return _context(self.ca)

    def connected(self) -> None:
        """A connection stands. When it was made with the newest pair, older ones are not needed any more."""
        if self._shown == self.pair.folder:
            self.forget_older()

    def forget_older(self) -> None:
        # Nor what is in use on the disk: a renewal that outlives its node, in an application say, may just have put it there.
        kept = {self.pair.folder, (self._folder / "live").resolve()}
        for path in self._pairs():
            if path.resolve() not in kept:
                shutil.rmtree(path, ignore_errors=True)
        self._attempts = 0

    def replace(
        self, key: EllipticCurvePrivateKey, certificate: str, bundle: str, hub_urls: Iterable[str] = ()
    ) -> None:
        """Put a new pair in use, all of it or nothing. Raises StoreFailed."""
        write_pair(self._folder, key, certificate, bundle, hub_urls)
        self.pair = self._read_live()
        self._bearer = ("", 0.0)
        self._attempts = 0

    def sign(self, message: bytes) -> bytes:
        return self.pair.key.sign(message, ECDSA(SHA256()))

    def forget(self) -> None:
        """Delete every key. The node cannot come back under this name without a new token."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _before(self) -> Path | None:
        # Not what is newer: that was begun and never finished.
        older = [path for path in self._pairs() if _number(path) < _number(self.pair.folder)]
        return older[-1] if older else None

    def _pairs(self) -> list[Path]:
        return sorted(self._folder.glob("pair-[0-9]*"), key=_number)

    def _sign_bearer(self, now: float) -> str:
        try:
            import jwt
        except ModuleNotFoundError as error:
            raise InvalidConfig("an identity needs PyJWT: pip install PyJWT") from error
        claims = {
            "sub": self.pair.node,
            "aud": AUDIENCE,
            "iat": int(now),
            "exp": int(now + BEARER_SECONDS),
            "jti": secrets.token_urlsafe(12),
        }
        return jwt.encode(claims, self.pair.key, algorithm="ES256")

    def _read_live(self) -> Pair:
        """Through the link once, so that key and certificate are of one pair."""
        try:
            return read_pair((self._folder / "live").resolve(strict=True))
        except OSError as error:
            raise InvalidConfig(f"node.identity: {self._folder}: {error.strerror}: run 'tierline ... join'") from error


def read_pair(folder: Path) -> Pair:
    """Raises InvalidConfig for a damaged pair or a key that others may read, OSError when it is not there."""
    path = folder / "key.pem"
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise InvalidConfig(f"node.identity: {path}: others may read it (mode {mode:04o}), 0600 is needed")
    try:
        key = load_pem_private_key(_bounded(path), None)
        cert = x509.load_pem_x509_certificates(_bounded(folder / "cert.pem"))[0]
        name = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    except (ValueError, TypeError, IndexError) as error:
        raise InvalidConfig(f"node.identity: {folder}: {error}") from error
    if not isinstance(key, EllipticCurvePrivateKey) or cert.public_key() != key.public_key():
        raise InvalidConfig(f"node.identity: {folder}: the certificate is not that of the key")
    begin, end = cert.not_valid_before_utc.timestamp(), cert.not_valid_after_utc.timestamp()
    return Pair(folder, key, str(name), begin, end, _read_origins(folder / HUB))


def _read_origins(path: Path) -> tuple[str, ...] | None:
    """None when it is missing or damaged: renewal brings it again, and no source is shown more for it meanwhile."""
    try:
        return origins_of(msgspec.json.decode(_bounded(path), type=_Hub).origins)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def write_pair(
    folder: Path,
    key: EllipticCurvePrivateKey,
    certificate: str,
    bundle: str,
    hub_urls: Iterable[str] = (),
) -> None:
    """A new pair below `folder`, put in use when all of it is on the disk. Raises StoreFailed.

    `hub_urls`: where the hub that issued the certificate says it is.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        numbers = [_number(path) for path in folder.glob("pair-[0-9]*")]
        pair = folder / f"pair-{max(numbers, default=0) + 1}"
        pair.mkdir(mode=0o700)
        write_new(pair / "key.pem", private_pem(key), 0o600)
        write_new(pair / "cert.pem", certificate.encode(), 0o644)
        write_new(pair / "ca.pem", bundle.encode(), 0o644)
        write_new(pair / HUB, msgspec.json.encode(_Hub(origins_of(hub_urls))), 0o644)
        flush(pair)
        flush(folder)
        _point(folder / "live", pair.name)
        for name in FILES:
            if not (folder / name).is_symlink():
                _point(folder / name, f"live/{name}")
        flush(folder)
    except OSError as error:
        raise StoreFailed(f"could not keep the new certificate in {folder}: {error}") from error


def new_key() -> EllipticCurvePrivateKey:
    return generate_private_key(SECP256R1())


def pending_key(folder: Path) -> EllipticCurvePrivateKey:
    """The key of an unfinished join, else a new one, on the disk before anybody hears of it. Raises StoreFailed."""
    path = folder / PENDING
    with suppress(OSError, ValueError, TypeError):
        key = load_pem_private_key(_bounded(path), None)
        if isinstance(key, EllipticCurvePrivateKey):
            return key
    made = new_key()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, private_pem(made))
    except OSError as error:
        raise StoreFailed(f"could not keep a key in {path}: {error}") from error
    return made


def forget_pending_key(folder: Path) -> None:
    (folder / PENDING).unlink(missing_ok=True)


def request(key: EllipticCurvePrivateKey, node: str = "node") -> str:
    """A certificate request, PEM. The hub takes nothing but the key from it."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


def private_pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_der(key: EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def trusting(pem: str) -> Callable[[], ssl.SSLContext]:
    """Contexts that trust the certificates in `pem` and nothing else."""

    def make() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=pem)
        return context

    return make


def _context(ca: Path) -> ssl.SSLContext:
    try:
        return trusting(_bounded(ca).decode("ascii"))()
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"{ca}: {error}") from error


def _bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_PEM_BYTES)


def _number(path: Path) -> int:
    tail = path.name.removeprefix("pair-")
    return int(tail) if tail.isdecimal() else 0


def _point(link: Path, target: str) -> None:
    staged = link.with_name(f".{link.name}.new")
    staged.unlink(missing_ok=True)
    staged.symlink_to(target)
    staged.replace(link)
