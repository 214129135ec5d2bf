"""Keys, tokens and access files for tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from models.serving.access.keys import kid_of
from models.serving.access.tokens import jws


class AccessWriter:
    """An access file under `folder`, one key that it trusts, and tokens signed with that key."""

    def __init__(self, folder: Path, text: str = "") -> None:
        self.folder = folder
        self.private = Ed25519PrivateKey.generate()
        self.kid = kid_of(self.private.public_key())
        self.path = folder / "access.toml"
        self.revoked = folder / "revoked.txt"
        (folder / "keys").mkdir(parents=True)
        self.add_key(self.private)
        self.revoked.touch()
        self.write(text)

    def add_key(self, private: Ed25519PrivateKey) -> Path:
        public = private.public_key()
        path = self.folder / "keys" / f"{kid_of(public)}.pem"
        path.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        return path

    def write(self, text: str = "") -> None:
        self.path.write_text(f'keys = "keys"\nrevoked = "revoked.txt"\n{text}')

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Good claims; a claim changed to None is left out."""
        now = int(time.time())
        found = {"sub": "c", "aud": "tierline", "iat": now, "exp": now + 3600, "jti": "j1"} | changed
        return {name: value for name, value in found.items() if value is not None}

    def token(self, *, header: dict[str, Any] | None = None, key: Any = None, **changed: Any) -> str:
        return self.signed(msgspec.json.encode(self.claims(**changed)), header=header, key=key)

    def signed(self, payload: bytes, *, header: dict[str, Any] | None = None, key: Any = None) -> str:
        token: str = jws().encode(
            payload, key or self.private, algorithm="EdDSA", headers={"kid": self.kid} | (header or {})
        )
        return token

    def bearer(self, **changed: Any) -> bytes:
        return b"Bearer " + self.token(**changed).encode()
