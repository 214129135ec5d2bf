"""The certificate authority of a hub: its own, made once and never overwritten, or an external one given as files.

    ca/1/{cert.pem,key.pem}        the first authority
    ca/2/{...,cross.pem}           the next one; `cross.pem`: it, signed by the one before
    ca/issuing                     which of them issues

Nodes trust the whole bundle. A node that was away during a change of authority knows the old one only: the servers' chain
carries the cross certificate, which leads it from there to the new one. Files and signatures; no network, no database.
Sources: RFC 5280 (certificates, revocation lists), RFC 9325 4.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud_hub.errors import Conflict
from cloud_hub.files import flush_folder, write_whole
from models.errors import InvalidRequest, NotFound
from sync.errors import InvalidConfig
from sync.topics import check_node_id

NODE_SECONDS = 7 * 86_400.0
"""Life of a node's certificate. Short, because revocation then has to be remembered for a week only."""
SERVER_SECONDS = 30 * 86_400.0
AUTHORITY_SECONDS = 7300 * 86_400.0
BACKDATE = 3600.0
"""Certificates are valid from an hour ago: the clocks of small machines run late."""
LEAD_SECONDS = 2 * NODE_SECONDS
"""How long the next authority must have been in the bundle before it may issue: every node in reach renews twice."""
LIST_SECONDS = 3650 * 86_400.0
"""A revocation list past its nextUpdate locks out every healthy node. It is written where it is read, so it need not expire."""
MAX_REQUEST_BYTES = 8192
"""Longest certificate request. One with an RSA key of 4096 bits, which is refused, takes 1.7 kB."""
MAX_AUTHORITIES = 8

_HOST = re.compile(r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")

PublicKey: TypeAlias = EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Certificate:
    """`chain`: PEM, leaf first. `serial`: hexadecimal. `issuer`: the authority's number. Times: Unix seconds."""

    chain: bytes
    serial: str
    issuer: int
    issued: float
    not_after: float


@dataclass(frozen=True, slots=True)
class Signer:
    """One authority. `above`: certificates between it and what nodes trust. `roots`: what nodes trust because of it."""

    number: int
    cert: x509.Certificate
    key: EllipticCurvePrivateKey
    above: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]


class Authority:
    """What the hub issues with. `folder` None = an external authority, which is not rolled over here."""

    def __init__(self, signers: Sequence[Signer], issuing: int, folder: Path | None) -> None:
        self._signers = {signer.number: signer for signer in signers}
        self._folder = folder
        self.issuing = issuing

    @property
    def signer(self) -> Signer:
        return self._signers[self.issuing]

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(self._signers)

    def bundle(self) -> bytes:
        """PEM of everything a node should trust, the issuing authority's first."""
        order = [self.signer, *(s for s in self._signers.values() if s.number != self.issuing)]
        roots = {fingerprint(root): root for signer in order for root in signer.roots}
        return b"".join(pem(root) for root in roots.values())

    def pin(self) -> str:
        """What an enrolment token carries: sha256 of the trusted certificate that the server's chain leads to."""
        return fingerprint(self.signer.roots[0])

    def describe(self) -> list[dict[str, object]]:
        return [
            {
                "number": signer.number,
                "issuing": signer.number == self.issuing,
                "fingerprint": fingerprint(signer.roots[0]),
                "since": signer.cert.not_valid_before_utc.timestamp() + BACKDATE,
                "until": signer.cert.not_valid_after_utc.timestamp(),
            }
            for signer in self._signers.values()
        ]

    def issue_node(self, key: PublicKey, node_id: str, names: Sequence[str], now: float) -> Certificate:
        """For a node. `names`: host names and addresses an operator granted it, for serving its own neighbours.

        Raises Malformed for an id no node may have: the hub's own names among them.
        """
        check_node_id(node_id)
        alternatives = [x509.UniformResourceIdentifier(f"urn:tierline:node:{node_id}"), *general_names(names)]
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if names else [])]
        return self._issue(key, node_id, alternatives, uses, now, NODE_SECONDS)

    def issue_server(self, key: PublicKey, names: Sequence[str], now: float) -> Certificate:
        """For the hub's API or a broker, under every name and address it may be reached by."""
        return self._issue(
            key, "tierline server", general_names(names), [ExtendedKeyUsageOID.SERVER_AUTH], now, SERVER_SECONDS
        )

    def issue_client(self, key: PublicKey, name: str, now: float, seconds: float = SERVER_SECONDS) -> Certificate:
        """For a broker user of the hub's own choosing: no request from outside reaches this."""
        return self._issue(key, name, [], [ExtendedKeyUsageOID.CLIENT_AUTH], now, seconds)

    def revocation_list(self, revoked: Iterable[tuple[int, str, float]], now: float) -> bytes:
        """PEM: one list of each authority, empty ones included (a missing one refuses everybody). `revoked`: issuer, serial,
        when."""
        entries = list(revoked)
        return b"".join(_list_of(signer, entries, now) for signer in self._signers.values())

    # --- rolling over -------------------------------------------------------------------------------------------

    def add_next(self, now: float) -> int:
        """Make the next authority and put it into the bundle; it does not issue yet. Raises Conflict."""
        folder = self._own()
        if max(self._signers) != self.issuing:
            raise Conflict(f"authority {max(self._signers)} is already waiting to issue")
        if len(self._signers) >= MAX_AUTHORITIES:
            raise Conflict(f"{MAX_AUTHORITIES} authorities are in the bundle: retire one first")
        number = max(self._signers) + 1
        _create(folder, number, now, before=self.signer)
        self._signers[number] = _read(folder, number)
        return number

    def switch(self, now: float, *, force: bool = False) -> int:
        """Issue with the newest authority from now on. Raises Conflict before nodes can know it, unless `force`."""
        folder = self._own()
        number = max(self._signers)
        since = self._signers[number].cert.not_valid_before_utc.timestamp() + BACKDATE
        if number == self.issuing:
            raise Conflict("no newer authority is waiting: add the next one first")
        if now < since + LEAD_SECONDS and not force:
            days = (since + LEAD_SECONDS - now) / 86_400
            raise Conflict(f"authority {number} is too young: nodes need {days:.1f} more days to hear of it")
        write_whole(folder / "issuing", str(number).encode(), mode=0o600)
        self.issuing = number
        return number

    def retire(self, number: int, now: float, *, in_use: bool) -> None:
        """Take an old authority out of the bundle. `in_use`: a certificate of its is still valid. Raises Conflict, NotFound."""
        folder = self._own()
        if number not in self._signers:
            raise NotFound(f"no authority {number}")
        if number >= self.issuing or in_use:
            raise Conflict(f"authority {number} is still in use")
        # Kept on the disk: a certificate that turns up later can still be explained.
        (folder / str(number)).rename(folder / f"{number}.retired-{int(now)}")
        flush_folder(folder)
        del self._signers[number]

    def _own(self) -> Path:
        if self._folder is None:
            raise Conflict("this hub uses an external authority: roll it over where it is kept, then restart the hub")
        return self._folder

    def _issue(
        self,
        key: PublicKey,
        name: str,
        alternatives: Sequence[x509.GeneralName],
        uses: Sequence[x509.ObjectIdentifier],
        now: float,
        seconds: float,
    ) -> Certificate:
        signer = self.signer
        builder = (
            _builder(name, key, signer.cert.subject, now, seconds)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(_key_id_of(signer), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        cert = builder.sign(signer.key, SHA256())
        chain = b"".join(pem(each) for each in (cert, *signer.above))
        return Certificate(chain, f"{cert.serial_number:x}", signer.number, now, now + seconds)


def open_authority(folder: Path, now: float, external: tuple[Path, Path] | None = None) -> Authority:
    """The authority below `folder`, made when there is none. `external`: (chain, key) of another one, PEM.

    Raises InvalidConfig for files that do not fit together.
    """
    if external is not None:
        return Authority([_read_external(*external)], 1, None)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    if not numbers:
        if (folder / "issuing").exists():
            raise InvalidConfig(f"{folder}: the authority's files are gone; restore them from the backup")
        _create(folder, 1, now, before=None)
        numbers = [1]
    issuing = folder / "issuing"
    current = int(issuing.read_text()) if issuing.exists() else numbers[0]
    if current not in numbers:
        raise InvalidConfig(f"{issuing}: authority {current} is gone; restore it from the backup")
    write_whole(issuing, str(current).encode(), mode=0o600)
    return Authority([_read(folder, number) for number in numbers], current, folder)


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


def fingerprint(cert: x509.Certificate) -> str:
    return cert.fingerprint(SHA256()).hex()


def pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(Encoding.PEM)


def general_names(names: Iterable[str]) -> list[x509.GeneralName]:
    """Host names and IP addresses as a certificate holds them, each once. Raises InvalidConfig."""
    found: list[x509.GeneralName] = []
    for name in dict.fromkeys(names):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name.strip("[]"))))
        except ValueError:
            if not _HOST.fullmatch(name):
                raise InvalidConfig(f"name {name[:100]!r} is neither a host name nor an IP address") from None
            found.append(x509.DNSName(name.lower()))
    return found


def private_pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def new_key() -> EllipticCurvePrivateKey:
    return generate_key(SECP256R1())


def _create(folder: Path, number: int, now: float, before: Signer | None) -> None:
    """All files or none, and never over existing ones: the folder gets its name in one rename, which fails when it exists."""
    staged = folder / f".{number}.new"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(mode=0o700)
    key = new_key()
    name = f"tierline authority {os.urandom(4).hex()}"
    own = _authority(name, key, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, None, now)
    write_whole(staged / "key.pem", private_pem(key), mode=0o600)
    write_whole(staged / "cert.pem", pem(own), mode=0o644)
    if before is not None:
        cross = _authority(name, key, before.cert.subject, before.key, before, now)
        write_whole(staged / "cross.pem", pem(cross), mode=0o644)
    os.rename(staged, folder / str(number))
    flush_folder(folder)


def _authority(
    name: str,
    key: EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: EllipticCurvePrivateKey,
    above: Signer | None,
    now: float,
) -> x509.Certificate:
    builder = (
        _builder(name, key.public_key(), issuer, now, AUTHORITY_SECONDS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True, signs_certificates=True), critical=True)
    )
    if above is not None:
        builder = builder.add_extension(_key_id_of(above), critical=False)
    return builder.sign(issuer_key, SHA256())


def _builder(name: str, key: PublicKey, issuer: x509.Name, now: float, seconds: float) -> x509.CertificateBuilder:
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


def _usage(*, digital_signature: bool, signs_certificates: bool = False) -> x509.KeyUsage:
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


def _key_id_of(signer: Signer) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())


def _read(folder: Path, number: int) -> Signer:
    own, cross = folder / str(number) / "cert.pem", folder / str(number) / "cross.pem"
    cert, key = _load(own, folder / str(number) / "key.pem")
    above = tuple(x509.load_pem_x509_certificates(cross.read_bytes())) if cross.exists() else ()
    return Signer(number, cert[0], key, above, (cert[0],))


def _read_external(chain: Path, key_file: Path) -> Signer:
    certs, key = _load(chain, key_file)
    roots = tuple(cert for cert in certs if cert.subject == cert.issuer)
    if not roots:
        raise InvalidConfig(f"{chain}: no self-signed certificate: nodes need the one the chain begins with")
    if not all(_signs(cert) for cert in certs):
        raise InvalidConfig(f"{chain}: holds a certificate that may not sign others")
    above = tuple(cert for cert in certs if cert not in roots)
    return Signer(1, certs[0], key, above, roots)


def _load(chain: Path, key_file: Path) -> tuple[list[x509.Certificate], EllipticCurvePrivateKey]:
    try:
        certs = x509.load_pem_x509_certificates(chain.read_bytes())
        key = load_pem_private_key(key_file.read_bytes(), None)
    except OSError as error:
        raise InvalidConfig(f"{error.filename}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise InvalidConfig(f"{chain} and {key_file}: {error}") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise InvalidConfig(f"{key_file}: not an elliptic curve key")
    if certs[0].public_key() != key.public_key():
        raise InvalidConfig(f"{chain}: its first certificate is not that of {key_file}")
    return certs, key


def _signs(cert: x509.Certificate) -> bool:
    try:
        return cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _list_of(signer: Signer, revoked: Iterable[tuple[int, str, float]], now: float) -> bytes:
    at = datetime.fromtimestamp(now, UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.cert.subject)
        .last_update(at - timedelta(seconds=BACKDATE))
        .next_update(at + timedelta(seconds=LIST_SECONDS))
        .add_extension(_key_id_of(signer), critical=False)
        .add_extension(x509.CRLNumber(int(now)), critical=False)
    )
    for issuer, serial, when in revoked:
        if issuer == signer.number:
            entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16))
            builder = builder.add_revoked_certificate(entry.revocation_date(datetime.fromtimestamp(when, UTC)).build())
    return builder.sign(signer.key, SHA256()).public_bytes(Encoding.PEM)
