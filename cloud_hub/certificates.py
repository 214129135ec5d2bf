"""The hub's own certificates: of its API, and of its connection to the broker. Renewed in place; their keys stay.

tls/server.{key,crt}     every public name and address of the hub
tls/broker.{key,crt}     the broker user `_hub-1`
tls/ca.pem               whom nodes trust
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cloud_hub.authority import Authority, Certificate
from cloud_hub.certificate_parts import new_key, private_pem
from cloud_hub.certificate_requests import PublicKey, general_names
from sync.clock import Clock
from sync.durable import write_whole
from sync.errors import InvalidConfig
from sync.topics import HUB_USER

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
CHECK_SECONDS = 3600.0

log = logging.getLogger(__name__)


class HubCertificates:
    """`names`: by which nodes reach the hub, beside the loopback ones."""

    def __init__(self, folder: Path, authority: Authority, names: Sequence[str], clock: Clock) -> None:
        self._folder = folder
        self._authority = authority
        self._names = tuple(dict.fromkeys((*names, *LOCAL_NAMES)))
        self._clock = clock
        self.server = folder / "server.crt", folder / "server.key"
        self.broker = folder / "broker.crt", folder / "broker.key"
        self.bundle = folder / "ca.pem"

    def refresh(self) -> None:
        """Issue what is missing, is two thirds through its life, has other names or comes from an older authority.

        Raises InvalidConfig for a damaged file or a name that is none, OSError.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        now = self._clock.wall()
        names = general_names(self._names)
        self._keep(*self.server, names, lambda key: self._authority.issue_server(key, self._names, now), now)
        self._keep(*self.broker, [], lambda key: self._authority.issue_client(key, HUB_USER, now), now)
        bundle = self._authority.bundle()
        if not self.bundle.exists() or self.bundle.read_bytes() != bundle:
            write_whole(self.bundle, bundle, mode=0o644)

    async def keep_fresh(self) -> None:
        """Until cancelled."""
        while True:
            await self._clock.sleep(random.uniform(0.5, 1.5) * CHECK_SECONDS)  # noqa: S311 - jitter, not a secret
            try:
                await asyncio.to_thread(self.refresh)
            except Exception:
                # Whatever it was: this loop is all that keeps the hub's certificates from running out.
                log.exception("the hub's own certificates could not be renewed; tried again within two hours")

    def _keep(
        self,
        cert: Path,
        key_file: Path,
        names: list[x509.GeneralName],
        issue: Callable[[PublicKey], Certificate],
        now: float,
    ) -> None:
        if not key_file.exists():
            write_whole(key_file, private_pem(new_key()), mode=0o600)
        key = _read_key(key_file)
        if cert.exists() and self._is_good(cert, key, names, now):
            return
        write_whole(cert, issue(key.public_key()).chain, mode=0o644)
        log.info("issued %s", cert.name)

    def _is_good(self, path: Path, key: EllipticCurvePrivateKey, names: list[x509.GeneralName], now: float) -> bool:
        try:
            cert = x509.load_pem_x509_certificates(path.read_bytes())[0]
        except ValueError:
            return False
        start, end = cert.not_valid_before_utc.timestamp(), cert.not_valid_after_utc.timestamp()
        fresh = start <= now < start + (end - start) * 2 / 3
        ours = cert.issuer == self._authority.signer.cert.subject and cert.public_key() == key.public_key()
        return fresh and ours and _names_of(cert) == names


def _names_of(cert: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _read_key(path: Path) -> EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise InvalidConfig(f"{path}: {error}") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise InvalidConfig(f"{path}: not an elliptic curve key")
    return key
