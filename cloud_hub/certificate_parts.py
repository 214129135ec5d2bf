"""The certificates and revocation lists of an authority, as they are built and signed. Pure; RFC 5280."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from cloud_hub.certificate_requests import PublicKey

AUTHORITY_SECONDS = 7300 * 86_400.0
BACKDATE = 3600.0
"""Certificates are valid from an hour ago: the clocks of small machines run late."""
LIST_SECONDS = 3650 * 86_400.0
"""A revocation list past its nextUpdate locks out every healthy node. It is written where it is read, so it need not expire."""


@dataclass(frozen=True, slots=True)
class Signer:
    """One authority. `above`: certificates between it and what nodes trust. `roots`: what nodes trust because of it."""

    number: int
    cert: x509.Certificate
    key: EllipticCurvePrivateKey
    above: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]


def fingerprint(cert: x509.Certificate) -> str:
    return cert.fingerprint(SHA256()).hex()


def pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(Encoding.PEM)


def private_pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def new_key() -> EllipticCurvePrivateKey:
    return generate_key(SECP256R1())


def new_authority(
    name: str,
    key: EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: EllipticCurvePrivateKey,
    above: Signer | None,
    now: float,
) -> x509.Certificate:
    """An authority's certificate: signed by itself, or by the one `above` it."""
    builder = (
        new_certificate(name, key.public_key(), issuer, now, AUTHORITY_SECONDS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(key_usage(digital_signature=True, signs_certificates=True), critical=True)
    )
    if above is not None:
        builder = builder.add_extension(key_id_of(above), critical=False)
    return builder.sign(issuer_key, SHA256())


def new_certificate(
    name: str, key: PublicKey, issuer: x509.Name, now: float, seconds: float
) -> x509.CertificateBuilder:
    """What every certificate of ours begins with: one name, a random serial number, `seconds` to live."""
    start = datetime.fromtimestamp(now, UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - timedelta(seconds=BACKDATE))
        .not_valid_after(start + timedelta(seconds=seconds))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def key_usage(*, digital_signature: bool, signs_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def key_id_of(signer: Signer) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())


def list_of(signer: Signer, revoked: Iterable[tuple[int, str, float]], now: float) -> bytes:
    """The revocation list of one authority, PEM. `revoked`: issuer, serial, when; those of other issuers are left out."""
    at = datetime.fromtimestamp(now, UTC)
    # All entries at once: added one by one, each copies those before it, 0.4 s for 10,000.
    entries = [
        x509.RevokedCertificateBuilder(int(serial, 16), datetime.fromtimestamp(when, UTC).replace(tzinfo=None)).build()
        for issuer, serial, when in revoked
        if issuer == signer.number
    ]
    builder = (
        x509.CertificateRevocationListBuilder(signer.cert.subject, revoked_certificates=entries)
        .last_update(at - timedelta(seconds=BACKDATE))
        .next_update(at + timedelta(seconds=LIST_SECONDS))
        .add_extension(key_id_of(signer), critical=False)
        .add_extension(x509.CRLNumber(int(now)), critical=False)
    )
    return builder.sign(signer.key, SHA256()).public_bytes(Encoding.PEM)
