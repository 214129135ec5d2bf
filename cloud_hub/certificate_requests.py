"""What a certificate may hold: keys from requests, names from operators. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from hashlib import sha256
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from models.errors import InvalidRequest
from sync.errors import InvalidConfig

MAX_REQUEST_BYTES = 8192
"""Longest certificate request. One with an RSA key of 4096 bits, which is refused, takes 1.7 kB."""

_HOST = re.compile(r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")

PublicKey: TypeAlias = EllipticCurvePublicKey | Ed25519PublicKey


def read_request(csr: str) -> tuple[PublicKey, str]:
    """The public key of a certificate request (PEM) and its fingerprint; nothing else of it counts. Raises InvalidRequest."""
    if len(csr) > MAX_REQUEST_BYTES:
        raise InvalidRequest(f"csr: longer than {MAX_REQUEST_BYTES} characters")
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        key = request.public_key()
        good = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise InvalidRequest(f"csr: {error}") from error
    if not good:
        raise InvalidRequest("csr: its signature does not hold: whoever sends it has not shown to have the key")
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return key, key_fingerprint(key)
    if isinstance(key, Ed25519PublicKey):
        return key, key_fingerprint(key)
    raise InvalidRequest("csr: the key is neither ECDSA P-256 nor Ed25519")


def key_fingerprint(key: PublicKey) -> str:
    """sha256, hexadecimal, over the key's SubjectPublicKeyInfo."""
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def general_names(names: Iterable[str]) -> list[x509.GeneralName]:
    """Host names and IP addresses as a certificate holds them, each once. Raises InvalidConfig."""
    found: list[x509.GeneralName] = []
    for name in dict.fromkeys(names):
        try:
            address = ipaddress.ip_address(name.strip("[]"))
            if getattr(address, "scope_id", None):
                raise InvalidConfig(f"name {name[:100]!r}: a certificate cannot hold the zone of an address")
            found.append(x509.IPAddress(address))
        except ValueError:
            if not _HOST.fullmatch(name):
                raise InvalidConfig(f"name {name[:100]!r} is neither a host name nor an IP address") from None
            found.append(x509.DNSName(name.lower()))
    return found
