"""A small certificate authority for tests."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID


class Authority:
    """Signs certificates for names; files go under `folder`. `path`: its own certificate."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self._name = name
        self._key = generate_private_key(SECP256R1())
        self._serial = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(self._sign(name, self._key, authority=True, valid=(-1, 1)))

    def issue(
        self, name: str, *, stem: str | None = None, password: bytes | None = None, valid: tuple[int, int] = (-1, 1)
    ) -> tuple[Path, Path]:
        """Certificate and key for 127.0.0.1 with this common name. `valid`: from and to, in days from now."""
        key = generate_private_key(SECP256R1())
        cert, private = self.folder / f"{stem or name}.crt", self.folder / f"{stem or name}.key"
        cert.write_bytes(self._sign(name, key, authority=False, valid=valid))
        locked: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
        return cert, private

    def _sign(self, name: str, key: EllipticCurvePrivateKey, *, authority: bool, valid: tuple[int, int]) -> bytes:
        now = datetime.now(UTC)
        self._serial += 1
        issuer = self._key
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self._name)]))
            .public_key(key.public_key())
            .serial_number(self._serial)
            .not_valid_before(now + timedelta(days=valid[0]))
            .not_valid_after(now + timedelta(days=valid[1]))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
        )
        if not authority:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(issuer, SHA256()).public_bytes(Encoding.PEM)
