"""Authorities on the disk: made whole or not at all, never over one another, read back with every part checked."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from cloud_hub.certificate_parts import Signer, new_authority, new_key, pem, private_pem
from sync.durable import flush, write_whole
from sync.errors import InvalidConfig


def create(folder: Path, number: int, now: float, before: Signer | None) -> None:
    """All files or none, and never over existing ones: the folder gets its name in one rename, which fails when it exists."""
    staged = folder / f".{number}.new"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(mode=0o700)
    key = new_key()
    name = f"tierline authority {os.urandom(4).hex()}"
    own = new_authority(name, key, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, None, now)
    write_whole(staged / "key.pem", private_pem(key), mode=0o600)
    write_whole(staged / "cert.pem", pem(own), mode=0o644)
    if before is not None:
        cross = new_authority(name, key, before.cert.subject, before.key, before, now)
        write_whole(staged / "cross.pem", pem(cross), mode=0o644)
    os.rename(staged, folder / str(number))
    flush(folder)


def read(folder: Path, number: int) -> Signer:
    """Raises InvalidConfig for files that are damaged, do not fit together, or that everybody may read."""
    own, cross = folder / str(number) / "cert.pem", folder / str(number) / "cross.pem"
    cert, key = _load(own, folder / str(number) / "key.pem")
    try:
        above = tuple(x509.load_pem_x509_certificates(cross.read_bytes())) if cross.exists() else ()
    except ValueError as error:
        raise InvalidConfig(f"{cross}: {error}") from error
    return Signer(number, cert[0], key, above, (cert[0],))


def read_external(chain: Path, key_file: Path) -> Signer:
    """Raises InvalidConfig as `read`."""
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
        mode = stat.S_IMODE(key_file.stat().st_mode)
    except OSError as error:
        raise InvalidConfig(f"{error.filename}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise InvalidConfig(f"{chain} and {key_file}: {error}") from error
    if mode & 0o007:
        # A group may read it: that is how a machine, or Kubernetes, hands a secret to one account.
        raise InvalidConfig(f"{key_file}: everybody on this machine may use it (mode {mode:04o}): chmod 600")
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
