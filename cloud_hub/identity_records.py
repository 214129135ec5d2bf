"""The queries about identities within one open transaction: invitations, certificates, denials."""

from __future__ import annotations

from typing import Any, cast

import msgspec
from sqlalchemy import CursorResult, delete, func, select, update
from sqlalchemy.orm import Session

from cloud_hub.rollout import Node
from cloud_hub.tables import CertificateRow, DenialRow, InvitationRow, NodeRow

NODE_KEYS = 2
"""Keys of a node that count at once: the one in use and the one it is changing to."""


class Invitation(msgspec.Struct, frozen=True):
    """What a token lets in. `expires`: Unix seconds. `hardware`: serial number that must be shown, None = any."""

    node: str
    tier: str
    labels: dict[str, str]
    groups: tuple[str, ...]
    names: tuple[str, ...]
    hardware: str | None
    expires: float = 0.0


class Known(msgspec.Struct, frozen=True):
    """A certificate. `public_key`: DER."""

    serial: str
    node: str
    fingerprint: str
    public_key: bytes
    issuer: int
    names: tuple[str, ...]
    issued: float
    not_after: float
    ended: float = 0.0


class IdentityRecords:
    def __init__(self, session: Session) -> None:
        self._session = session

    # --- invitations ---

    def invite(self, token_hash: str, invitation: Invitation, at: float) -> None:
        """A new invitation takes the place of unused older ones of the same node."""
        self.uninvite(invitation.node)
        row = msgspec.structs.asdict(invitation) | {"groups": list(invitation.groups), "names": list(invitation.names)}
        self._session.add(InvitationRow(token_hash=token_hash, created=at, **row))
        self._session.flush()

    def invitation(self, token_hash: str) -> tuple[Invitation, float] | None:
        """It, and when it was used (0 = not yet)."""
        row = self._session.get(InvitationRow, token_hash)
        if row is None:
            return None
        found = Invitation(
            row.node, row.tier, dict(row.labels), tuple(row.groups), tuple(row.names), row.hardware, row.expires
        )
        return found, row.used

    def use(self, token_hash: str, at: float) -> bool:
        """False when another one was faster."""
        query = update(InvitationRow).where(InvitationRow.token_hash == token_hash, InvitationRow.used == 0)
        return cast(CursorResult[Any], self._session.execute(query.values(used=at))).rowcount == 1

    def uninvite(self, node: str) -> bool:
        """End what was not used yet. False when there was nothing."""
        query = delete(InvitationRow).where(InvitationRow.node == node, InvitationRow.used == 0)
        return cast(CursorResult[Any], self._session.execute(query)).rowcount > 0

    def forget_invitations(self, before: float) -> None:
        """Drop those that ended before `before`."""
        self._session.execute(delete(InvitationRow).where(InvitationRow.expires < before))

    # --- certificates ---

    def add(self, known: Known) -> None:
        self._session.add(CertificateRow(**msgspec.structs.asdict(known) | {"names": list(known.names)}))
        self._session.flush()

    def by_key(self, fingerprint: str) -> list[Known]:
        """Every certificate that was ever issued for a key."""
        return self._found(CertificateRow.fingerprint == fingerprint)

    def current(self, node: str) -> list[Known]:
        """Those whose keys count as the node's, newest first."""
        return self._found(CertificateRow.node == node, CertificateRow.ended == 0)

    def former(self, node: str, limit: int) -> list[Known]:
        """The newest of those whose keys do not count any more."""
        return self._found(CertificateRow.node == node, CertificateRow.ended > 0)[:limit]

    def issued_since(self, node: str, at: float) -> int:
        """How many certificates the node got since `at`."""
        query = select(func.count()).where(CertificateRow.node == node, CertificateRow.issued > at)
        return self._session.scalar(query) or 0

    def keep_only(self, node: str, fingerprints: set[str], at: float) -> None:
        """End every other key of the node."""
        query = update(CertificateRow).where(
            CertificateRow.node == node, CertificateRow.ended == 0, CertificateRow.fingerprint.not_in(fingerprints)
        )
        self._session.execute(query.values(ended=at))

    def ended_alive(self, now: float) -> list[Known]:
        """Those that were ended and would still be accepted by their dates: what a revocation list must name."""
        return self._found(CertificateRow.ended > 0, CertificateRow.not_after > now)

    def in_use(self, issuer: int, now: float) -> bool:
        query = select(CertificateRow.serial).where(CertificateRow.issuer == issuer, CertificateRow.not_after > now)
        return self._session.execute(query.limit(1)).first() is not None

    def enrolled(self) -> set[str]:
        """Ids of the nodes that have a key which counts."""
        return set(self._session.scalars(select(CertificateRow.node).where(CertificateRow.ended == 0).distinct()))

    def _found(self, *where: Any) -> list[Known]:
        query = select(CertificateRow).where(*where).order_by(CertificateRow.issued.desc())
        return [
            Known(
                row.serial,
                row.node,
                row.fingerprint,
                row.public_key,
                row.issuer,
                tuple(row.names),
                row.issued,
                row.not_after,
                row.ended,
            )
            for row in self._session.scalars(query)
        ]

    # --- denials ---

    def deny(self, node: str, reason: str, at: float) -> None:
        self._session.merge(DenialRow(node=node, at=at, reason=reason))
        self._session.flush()

    def denied(self) -> dict[str, str]:
        """Node id -> reason."""
        return {row.node: row.reason for row in self._session.scalars(select(DenialRow).order_by(DenialRow.node))}

    def is_denied(self, node: str) -> bool:
        return self._session.get(DenialRow, node) is not None

    def admit(self, node: str) -> None:
        self._session.execute(delete(DenialRow).where(DenialRow.node == node))

    # --- nodes ---

    def fleet(self) -> int:
        """How many nodes are registered."""
        return self._session.scalar(select(func.count()).select_from(NodeRow)) or 0

    def describe(self, node: Node) -> None:
        """Replace what is known of a registered node by what an invitation says."""
        values = {"tier": node.tier, "labels": dict(node.labels), "groups": list(node.groups)}
        self._session.execute(update(NodeRow).where(NodeRow.id == node.id).values(**values))

    def forget_node(self, node: str) -> None:
        """Remove what was said by and about a node. Its certificates' rows stay: their keys must not come back."""
        row = self._session.get(NodeRow, node)
        if row is not None:
            self._session.delete(row)
        self._session.execute(delete(InvitationRow).where(InvitationRow.node == node))
        self._session.flush()
