"""Ed25519 keys that sign and verify tokens, as files.

A server is given public keys alone: a folder of `<kid>.pem` files, or one JSON Web Key Set (RFC 7517; RFC 8037 for Ed25519).
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from models.serving.access.settings import InvalidAccess

MAX_KEYS = 64
"""Keys a server knows at once: two live ones per issuer are enough to rotate."""
MAX_KEY_FILE_BYTES = 256 * 1024
"""A set of 64 keys takes a tenth of this."""
_KID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PUBLIC_BYTES = 32


class _Jwk(msgspec.Struct):
    kty: str
    crv: str = ""
    x: str = ""
    kid: str = ""
    d: str | None = None


class _JwkSet(msgspec.Struct):
    keys: list[_Jwk]


def kid_of(public: Ed25519PublicKey) -> str:
    """A short name for a key that follows from the key: 8 bytes of its thumbprint (RFC 7638) in hexadecimal."""
    x = base64.urlsafe_b64encode(public.public_bytes_raw()).rstrip(b"=")
    return hashlib.sha256(b'{"crv":"Ed25519","kty":"OKP","x":"%b"}' % x).hexdigest()[:16]


def load_keys(path: Path) -> Mapping[str, Ed25519PublicKey]:
    """The public keys at `path`, a folder or a JSON file, by their kid. Raises InvalidAccess naming the file."""
    try:
        if path.is_dir():
            named = [(file.stem, _load_public(file)) for file in sorted(path.glob("*.pem"))[: MAX_KEYS + 1]]
        else:
            named = _load_set(path)
    except OSError as error:
        raise InvalidAccess(f"keys: {path}: {error.strerror}") from error
    keys = dict(named)
    if len(keys) != len(named):
        raise InvalidAccess(f"keys: {path}: two keys have the same kid")
    if not keys:
        raise InvalidAccess(f"keys: {path}: no public key here; `tierline token new-key` makes one")
    if len(keys) > MAX_KEYS:
        raise InvalidAccess(f"keys: {path}: more than {MAX_KEYS} keys")
    for kid in keys:
        if not _KID.fullmatch(kid):
            raise InvalidAccess(f"keys: {path}: kid {kid!r} is not 1 to 64 letters, digits, '.', '_' or '-'")
    return keys


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Raises InvalidAccess naming the file; also when others than its owner may read it."""
    try:
        if path.stat().st_mode & 0o077:
            raise InvalidAccess(f"{path}: others may read this private key; chmod 600 it")
        key = load_pem_private_key(_read(path), password=None)
    except OSError as error:
        raise InvalidAccess(f"{path}: {error.strerror}") from error
    except TypeError as error:
        raise InvalidAccess(f"{path}: the private key is encrypted") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidAccess(f"{path}: not a private key in PEM form") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidAccess(f"{path}: not an Ed25519 key")
    return key


def new_key(folder: Path) -> tuple[Path, Path]:
    """Make a key: `<kid>.key` (private, mode 0600) and `<kid>.pem` (public) in `folder`. Raises OSError."""
    private = Ed25519PrivateKey.generate()
    public = private.public_key()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret, shown = folder / f"{kid_of(public)}.key", folder / f"{kid_of(public)}.pem"
    # Created with its mode, not given it afterwards: nobody may open it in between.
    with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    shown.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return secret, shown


def _load_public(path: Path) -> Ed25519PublicKey:
    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise InvalidAccess(f"keys: {path}: a private key; give servers the public one alone")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidAccess(f"keys: {path}: not a public key in PEM form") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidAccess(f"keys: {path}: not an Ed25519 key")
    return key


def _load_set(path: Path) -> list[tuple[str, Ed25519PublicKey]]:
    try:
        found = msgspec.json.decode(_read(path), type=_JwkSet).keys
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidAccess(f"keys: {path}: not a JSON Web Key Set: {error}") from error
    return [(jwk.kid, _public_of(path, jwk)) for jwk in found]


def _public_of(path: Path, jwk: _Jwk) -> Ed25519PublicKey:
    if jwk.d is not None:
        raise InvalidAccess(f"keys: {path}: key {jwk.kid!r} is a private key; give servers the public one alone")
    if (jwk.kty, jwk.crv) != ("OKP", "Ed25519"):
        raise InvalidAccess(f"keys: {path}: key {jwk.kid!r} is not an Ed25519 key (kty OKP, crv Ed25519)")
    try:
        raw = base64.b64decode(jwk.x + "=" * (-len(jwk.x) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raw = b""
    if len(raw) != _PUBLIC_BYTES:
        raise InvalidAccess(f"keys: {path}: x of key {jwk.kid!r} is not {_PUBLIC_BYTES} bytes in base64url")
    return Ed25519PublicKey.from_public_bytes(raw)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_KEY_FILE_BYTES + 1)
    if len(data) > MAX_KEY_FILE_BYTES:
        raise InvalidAccess(f"{path}: more than {MAX_KEY_FILE_BYTES} bytes, no file of keys is that large")
    return data
