"""The certificate authority of a hub: its own, made once and never overwritten, or an external one given as files.

    ca/1/{cert.pem,key.pem}        the first authority
    ca/2/{...,cross.pem}           the next one; `cross.pem`: it, signed by the one before
    ca/issuing                     which of them issues

Nodes trust the whole bundle. A node that was away during a change of authority knows the old one only: the servers' chain
carries the cross certificate, which leads it from there to the new one. Files and signatures; no network, no database.
Sources: RFC 5280 (certificates, revocation lists), RFC 9325 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID

from cloud_hub.authority_files import create, read, read_external
from cloud_hub.certificate_parts import (
    BACKDATE,
    Signer,
    fingerprint,
    key_id_of,
    key_usage,
    list_of,
    new_certificate,
    pem,
)
from cloud_hub.certificate_requests import PublicKey, general_names
from cloud_hub.errors import Conflict
from models.errors import NotFound
from sync.durable import flush, write_whole
from sync.errors import InvalidConfig
from sync.topics import check_node_id

NODE_SECONDS = 7 * 86_400.0
"""Life of a node's certificate. Short, because revocation then has to be remembered for a week only."""
SERVER_SECONDS = 30 * 86_400.0
LEAD_SECONDS = 2 * NODE_SECONDS
"""How long the next authority must have been in the bundle before it may issue: every node in reach renews twice."""
MAX_AUTHORITIES = 8


@dataclass(frozen=True, slots=True)
class Certificate:
    """`chain`: PEM, leaf first. `serial`: hexadecimal. `issuer`: the authority's number. Times: Unix seconds."""

    chain: bytes
    serial: str
    issuer: int
    issued: float
    not_after: float


class Authority:
    """What the hub issues with. `folder` None = an external authority, which is not rolled over here."""

    def __init__(self, signers: Sequence[Signer], issuing: int, folder: Path | None) -> None:
        self._signers = {signer.number: signer for signer in signers}
        self._folder = folder
        self._changing = Lock()
        self._list: tuple[tuple[tuple[int, str, float], ...], tuple[int, ...], bytes] | None = None
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
        when. Signed again only when it changes: brokers ask every two seconds."""
        entries, signers, last = tuple(revoked), self._signers, self._list
        if last is not None and last[:2] == (entries, tuple(signers)):
            return last[2]
        made = b"".join(list_of(signer, entries, now) for signer in signers.values())
        self._list = entries, tuple(signers), made
        return made

    # --- rolling over -------------------------------------------------------------------------------------------

    def add_next(self, now: float) -> int:
        """Make the next authority and put it into the bundle; it does not issue yet. Raises Conflict."""
        folder = self._own()
        with self._changing:
            if max(self._signers) != self.issuing:
                raise Conflict(f"authority {max(self._signers)} is already waiting to issue")
            if len(self._signers) >= MAX_AUTHORITIES:
                raise Conflict(f"{MAX_AUTHORITIES} authorities are in the bundle: retire one first")
            number = max(self._signers) + 1
            create(folder, number, now, before=self.signer)
            # A new table, not a new entry: other threads may be going through this one.
            self._signers = {**self._signers, number: read(folder, number)}
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
        flush(folder)
        self._signers = {each: signer for each, signer in self._signers.items() if each != number}

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
            new_certificate(name, key, signer.cert.subject, now, seconds)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(key_id_of(signer), critical=False)
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
        return Authority([read_external(*external)], 1, None)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    if not numbers:
        if (folder / "issuing").exists():
            raise InvalidConfig(f"{folder}: the authority's files are gone; restore them from the backup")
        create(folder, 1, now, before=None)
        numbers = [1]
    issuing = folder / "issuing"
    said = issuing.read_bytes()[:20] if issuing.exists() else str(numbers[0]).encode()
    if not said.isdigit():
        raise InvalidConfig(
            f"{issuing}: damaged; write the number of the authority that issues into it: one of {numbers}"
        )
    current = int(said)
    if current not in numbers:
        raise InvalidConfig(f"{issuing}: authority {current} is gone; restore it from the backup")
    write_whole(issuing, str(current).encode(), mode=0o600)
    return Authority([read(folder, number) for number in numbers], current, folder)
