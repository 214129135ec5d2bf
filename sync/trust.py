"""Whom we believe: pinned keys, signed documents, and the one function that verifies them. Pure.

Bytes, floor and time come in as arguments; a verified document comes out or a refusal is raised. A signature is checked
over the exact payload bytes received, kind and scope are inside them, and a key may sign only the kinds it is pinned for,
so a policy cannot be replayed as a desired document nor to another tenant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NoReturn, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sync.errors import BadSignature, Expired, Malformed, Replayed, WrongScope
from sync.messages import MAX_MESSAGE_BYTES, MAX_SIGNATURES, Document, Envelope, Signature, decode, encode

CLOCK_LEEWAY = 300.0
"""Seconds two honest clocks may differ."""
MAX_KEYS = 64
"""Keys one node may pin: two hub keys and their successors are a handful."""
MAX_KEYRING_BYTES = 64 * 1024
MAX_REVISION = 2**53
"""Largest integer every JSON reader keeps exactly."""

T = TypeVar("T")

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest_of(data: bytes) -> str:
    """`sha256:<hex>` of `data`."""
    return f"sha256:{sha256(data).hexdigest()}"


def check_digest(digest: str) -> str:
    """Return `digest` when it is `sha256:` and 64 lower-case hexadecimal digits. Raises Malformed."""
    if not _DIGEST.fullmatch(digest):
        raise Malformed(f"digest {digest[:100]!r} is not 'sha256:' and 64 hexadecimal digits")
    return digest


class Key(msgspec.Struct, frozen=True):
    """A pinned public key. `public`: 32 raw Ed25519 bytes (base64 in JSON). `kinds`: document kinds it may sign."""

    kid: str
    public: bytes
    kinds: tuple[str, ...]


class Keyring(msgspec.Struct, frozen=True):
    """The keys a node believes."""

    keys: tuple[Key, ...]

    def find(self, kid: str) -> Key | None:
        return next((key for key in self.keys if key.kid == kid), None)


class SigningKey:
    """An Ed25519 private key. `kid` is derived from the public key, so the two cannot be mixed up."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw()
        self.kid = sha256(self.public).hexdigest()[:16]

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, seed: bytes) -> SigningKey:
        """From the 32 bytes of `to_bytes`. Raises Malformed."""
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(seed))
        except ValueError as error:
            raise Malformed(f"signing key: {error}") from error

    def to_bytes(self) -> bytes:
        """The 32 secret bytes."""
        return self._private.private_bytes_raw()

    def key(self, *kinds: str) -> Key:
        """The public half as a node pins it, good for `kinds`."""
        return Key(self.kid, self.public, kinds)

    def sign(self, payload: bytes) -> Signature:
        return Signature(self.kid, self._private.sign(payload))


@dataclass(frozen=True, slots=True)
class Verified:
    """A document that was verified. `digest`: of its payload bytes, which names it among equals."""

    document: Document
    digest: str


def encode_keyring(keyring: Keyring) -> bytes:
    """The keyring as JSON, the form of the file nodes pin."""
    return msgspec.json.format(encode(keyring), indent=2)


def decode_keyring(data: bytes) -> Keyring:
    """Read a keyring file. Raises Malformed naming the field."""
    keyring = decode(data, Keyring, MAX_KEYRING_BYTES)
    if not 1 <= len(keyring.keys) <= MAX_KEYS:
        raise Malformed(f"keys: {len(keyring.keys)} given, 1 to {MAX_KEYS} are accepted")
    if len({key.kid for key in keyring.keys}) != len(keyring.keys):
        raise Malformed("keys: a kid is given twice")
    for index, key in enumerate(keyring.keys):
        if len(key.public) != 32:
            raise Malformed(f"keys[{index}].public: {len(key.public)} bytes, an Ed25519 key has 32")
    return keyring


def sign(document: Document, keys: Sequence[SigningKey]) -> bytes:
    """The envelope to publish: the document's bytes and one signature of each key over them."""
    payload = encode(document)
    return encode(Envelope(payload, tuple(key.sign(payload) for key in keys)))


def verify(
    envelope: bytes,
    keyring: Keyring,
    *,
    kind: str,
    scope: str,
    floor: int,
    now: float,
    seen: str = "",
    limit: int = MAX_MESSAGE_BYTES,
) -> Verified:
    """The document inside `envelope`, when every check holds.

    `floor`: lowest acceptable revision. `seen`: digest accepted at the floor; another payload under the same revision is a
    replay too. `now`: Unix seconds. `limit`: bytes of the envelope.
    Raises Malformed, BadSignature, WrongScope, Expired or Replayed, in this order of checking.
    """
    sealed = decode(envelope, Envelope, limit)
    _check_signatures(sealed, keyring, kind)
    verified = _open(sealed)
    document = verified.document
    if document.kind != kind:
        raise WrongScope(f"a document of kind {document.kind[:40]!r} came where {kind!r} is expected")
    if document.scope != scope:
        raise WrongScope(f"a document for {document.scope[:100]!r} came to {scope!r}")
    if document.expires is not None and now > document.expires + CLOCK_LEEWAY:
        raise Expired(f"revision {document.revision} expired {now - document.expires:.0f} s ago")
    if document.issued > now + CLOCK_LEEWAY:
        raise Expired(
            f"revision {document.revision} is issued {document.issued - now:.0f} s in the future of this clock"
        )
    if document.revision < floor:
        raise Replayed(f"revision {document.revision} is below {floor}, which was already accepted")
    if document.revision == floor and seen and verified.digest != seen:
        raise Replayed(f"revision {floor} was already accepted with other contents")
    return verified


def signer_of(envelope: bytes, limit: int = MAX_MESSAGE_BYTES) -> str:
    """The kid of the first signature, as claimed: which key to look for. Raises Malformed."""
    sealed = decode(envelope, Envelope, limit)
    return sealed.sigs[0].kid if sealed.sigs else ""


def unseal(envelope: bytes, limit: int = MAX_MESSAGE_BYTES) -> Verified:
    """The document inside an envelope that was verified before it was stored on this node: no check is repeated.

    Why none: what is in force must start again offline, after its expiry and after its key was retired. Raises Malformed.
    """
    return _open(decode(envelope, Envelope, limit))


def _open(sealed: Envelope) -> Verified:
    document = decode(sealed.payload, Document, len(sealed.payload))
    if not 1 <= document.revision <= MAX_REVISION:
        raise Malformed(f"revision: {document.revision} is not between 1 and 2**53")
    for digest in document.digests:
        check_digest(digest)
    return Verified(document, digest_of(sealed.payload))


def _check_signatures(sealed: Envelope, keyring: Keyring, kind: str) -> None:
    """One good signature of a pinned key that may sign `kind` is enough."""
    if not 1 <= len(sealed.sigs) <= MAX_SIGNATURES:
        raise Malformed(f"sigs: {len(sealed.sigs)} given, 1 to {MAX_SIGNATURES} are accepted")
    for signature in sealed.sigs:
        key = keyring.find(signature.kid)
        if key is not None and kind in key.kinds and _is_good(key, signature, sealed.payload):
            return
    _explain(sealed, keyring, kind)


def _is_good(key: Key, signature: Signature, payload: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(signature.sig, payload)
    except (InvalidSignature, ValueError):
        return False
    return True


def _explain(sealed: Envelope, keyring: Keyring, kind: str) -> NoReturn:
    kids = ", ".join(repr(signature.kid[:32]) for signature in sealed.sigs)
    known = [key for signature in sealed.sigs if (key := keyring.find(signature.kid)) is not None]
    if not known:
        raise BadSignature(f"signed by {kids}, none of which is pinned here")
    if not any(kind in key.kinds for key in known):
        raise BadSignature(f"the key {kids} may not sign documents of kind {kind!r}")
    raise BadSignature(f"the signature by {kids} does not match the bytes received")
