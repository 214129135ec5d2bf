"""The queries of one open transaction: rows in, domain values out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import msgspec
from sqlalchemy import CursorResult, delete, select, update
from sqlalchemy.orm import Session

from cloud_hub.event_records import EventRecords
from cloud_hub.identity_records import IdentityRecords
from cloud_hub.rollout import Deployment, Node, PackageRef, Standing
from cloud_hub.software_records import SoftwareRecords
from cloud_hub.tables import (
    CredentialRow,
    DeploymentModelRow,
    DeploymentRow,
    DocumentRow,
    NodeRow,
    PackageFileRow,
    PackageRow,
)
from sync.messages import Capabilities, DocumentReport, Reported

PRESENT = ("init", "ready", "alert", "sleeping")
"""States of a node that has not left."""
MAX_NAMED = 1_000
"""Rows asked for by name in one query: SQLite takes 32,766 values at most."""


class Package(msgspec.Struct, frozen=True):
    """A published version. `digest` names the exact bytes of `manifest`; `published` in Unix seconds."""

    ref: PackageRef
    digest: str
    manifest: bytes
    published: float


class Issued(msgspec.Struct, frozen=True):
    """The newest revision of a document. `digest`: of the signed payload; `kid`: the key that signed it."""

    kind: str
    scope: str
    revision: int
    floor: int
    kid: str
    digest: str
    body: bytes
    envelope: bytes
    issued: float


class Member(msgspec.Struct, frozen=True):
    """A registered node and the last it said. `left`: Unix seconds when it went away, 0 = here or never seen."""

    node: Node
    created: float
    state: str = ""
    boot: str = ""
    seen: float = 0.0
    left: float = 0.0
    reported: Reported | None = None
    capabilities: Capabilities | None = None
    broker_hash: str = ""

    def standing(self, kind: str, issued: Issued | None, now: float) -> Standing:
        """How this node stands towards `issued`, its newest document of `kind`."""
        report: DocumentReport | None = self.reported.documents.get(kind) if self.reported else None
        silent = max(now - self.left, 0.0) if self.left else 0.0
        if issued is None:
            return Standing(report=report, silent=silent)
        return Standing(issued.revision, issued.digest, report, silent)


class Observation(msgspec.Struct, frozen=True):
    """One thing a node said at `at`; only what is not None changes."""

    node: str
    at: float
    state: str | None = None
    boot: str | None = None
    reported: bytes | None = None
    capabilities: bytes | None = None


class Records:
    def __init__(self, session: Session) -> None:
        self._session = session
        self._foreseen: dict[tuple[str, str], DocumentRow | None] = {}
        self.identities = IdentityRecords(session)
        self.events = EventRecords(session)
        self.software = SoftwareRecords(session)

    # --- credentials ---

    def credential(self, role: str) -> str | None:
        row = self._session.get(CredentialRow, role)
        return row.hash if row else None

    def set_credential(self, role: str, digest: str) -> None:
        self._session.merge(CredentialRow(role=role, hash=digest))

    # --- packages ---

    def package(self, ref: PackageRef) -> Package | None:
        row = self._session.get(PackageRow, (ref.package, ref.version))
        return _package(row) if row else None

    def packages(self, limit: int, after: PackageRef | None = None) -> list[Package]:
        """Up to `limit` versions in (package, version) order, after `after`."""
        query = select(PackageRow).order_by(PackageRow.package, PackageRow.version).limit(limit)
        if after is not None:
            query = query.where(
                (PackageRow.package > after.package)
                | ((PackageRow.package == after.package) & (PackageRow.version > after.version))
            )
        return [_package(row) for row in self._session.scalars(query)]

    def add_package(self, package: Package, files: Mapping[str, int]) -> None:
        """`files`: digest -> size of every file the version names."""
        key = {"package": package.ref.package, "version": package.ref.version}
        rows = [PackageFileRow(**key, digest=digest, size=size) for digest, size in files.items()]
        self._session.add(
            PackageRow(**key, digest=package.digest, manifest=package.manifest, published=package.published, files=rows)
        )
        self._session.flush()

    def unapprove(self, ref: PackageRef) -> None:
        """Take the version's files off the list; those that another version names stay on it."""
        self._session.execute(
            delete(PackageFileRow).where(PackageFileRow.package == ref.package, PackageFileRow.version == ref.version)
        )

    def is_approved(self, ref: PackageRef) -> bool:
        """Whether the version is published and was not withdrawn."""
        query = select(PackageFileRow.digest).where(
            PackageFileRow.package == ref.package, PackageFileRow.version == ref.version
        )
        return self._session.execute(query.limit(1)).first() is not None

    def approved_files(self) -> dict[str, int]:
        """Digest -> size of every file that a published version names, unless the version was withdrawn."""
        query = select(PackageFileRow.digest, PackageFileRow.size).distinct().order_by(PackageFileRow.digest)
        files = {row.digest: row.size for row in self._session.execute(query)}
        return files | self.software.approved_files()

    def approved_among(self, digests: Collection[str]) -> dict[str, int]:
        """`approved_files`, of these alone; at most some hundreds."""
        query = select(PackageFileRow.digest, PackageFileRow.size).where(PackageFileRow.digest.in_(digests)).distinct()
        files = {row.digest: row.size for row in self._session.execute(query)}
        software = self.software.approved_files()
        return files | {digest: software[digest] for digest in digests if digest in software}

    # --- deployments ---

    def deployment(self, name: str) -> Deployment | None:
        row = self._session.get(DeploymentRow, name)
        return _deployment(row) if row else None

    def deployments(self) -> list[Deployment]:
        return [_deployment(row) for row in self._session.scalars(select(DeploymentRow).order_by(DeploymentRow.name))]

    def put_deployment(self, deployment: Deployment, at: float) -> bool:
        """Create or replace; True when it is new. Every version it names must have been published."""
        created = not self.delete_deployment(deployment.name)
        rows = [
            DeploymentModelRow(model=model, package=ref.package, version=ref.version)
            for model, ref in deployment.models.items()
        ]
        self._session.add(
            DeploymentRow(
                name=deployment.name,
                tenant=deployment.tenant,
                selector=dict(deployment.selector),
                updated=at,
                models=rows,
            )
        )
        self._session.flush()
        return created

    def delete_deployment(self, name: str) -> bool:
        row = self._session.get(DeploymentRow, name)
        if row is None:
            return False
        self._session.delete(row)
        self._session.flush()
        return True

    # --- nodes ---

    def add_node(self, node: Node, token_hash: str, broker_hash: str, at: float) -> None:
        self._session.add(
            NodeRow(
                id=node.id,
                tier=node.tier,
                labels=dict(node.labels),
                groups=list(node.groups),
                token_hash=token_hash,
                broker_hash=broker_hash,
                created=at,
            )
        )
        self._session.flush()

    def set_token(self, node_id: str, token_hash: str, broker_hash: str) -> bool:
        """False when there is no such node."""
        query = update(NodeRow).where(NodeRow.id == node_id).values(token_hash=token_hash, broker_hash=broker_hash)
        return cast(CursorResult[Any], self._session.execute(query)).rowcount == 1

    def node_by_token(self, token_hash: str) -> tuple[str, str] | None:
        """(node id, stored hash) of the node whose token has this hash."""
        row = self._session.execute(
            select(NodeRow.id, NodeRow.token_hash).where(NodeRow.token_hash == token_hash)
        ).first()
        return (row[0], row[1]) if row else None

    def member(self, node_id: str) -> Member | None:
        row = self._session.get(NodeRow, node_id)
        return _member(row) if row else None

    def members(self, limit: int | None = None, after: str = "") -> list[Member]:
        """In id order, after `after`; `limit` None = all of them."""
        query = select(NodeRow).where(NodeRow.id > after).order_by(NodeRow.id).limit(limit)
        return [_member(row) for row in self._session.scalars(query)]

    def nodes(self) -> list[Node]:
        query = select(NodeRow.id, NodeRow.tier, NodeRow.labels, NodeRow.groups).order_by(NodeRow.id)
        return [Node(id_, tier, labels, tuple(groups)) for id_, tier, labels, groups in self._session.execute(query)]

    def present(self) -> list[str]:
        """Ids of the nodes that are here."""
        return list(self._session.scalars(select(NodeRow.id).where(NodeRow.state.in_(PRESENT)).order_by(NodeRow.id)))

    def members_named(self, node_ids: Sequence[str]) -> list[Member]:
        """Those of them that exist, in id order. One query: a thousand nodes that report at once ask for each other's time."""
        query = select(NodeRow).where(NodeRow.id.in_(node_ids)).order_by(NodeRow.id)
        return [_member(row) for row in self._session.scalars(query)]

    def observe(self, *observations: Observation) -> int:
        """Remember what nodes said, in this order. Returns how many of them were of nodes that exist."""
        query = select(NodeRow).where(NodeRow.id.in_({each.node for each in observations}))
        rows = {row.id: row for row in self._session.scalars(query)}
        return sum(self._observe(rows.get(each.node), each) for each in observations)

    def _observe(self, row: NodeRow | None, observation: Observation) -> bool:
        if row is None:
            return False
        row.seen = max(row.seen, observation.at)
        if observation.state is not None:
            if observation.state in PRESENT:
                row.left = 0.0
            elif row.state in PRESENT or not row.left:
                row.left = observation.at
            row.state, row.boot = observation.state, observation.boot or row.boot
        row.reported = observation.reported or row.reported
        row.capabilities = observation.capabilities or row.capabilities
        return True

    # --- documents ---

    def document(self, kind: str, scope: str) -> Issued | None:
        key = (kind, scope)
        row = self._foreseen[key] if key in self._foreseen else self._session.get(DocumentRow, key)
        return _issued(row) if row else None

    def foresee(self, kinds: Collection[str], scopes: Collection[str]) -> None:
        """Read documents that `document` will be asked for: one by one they cost a fleet's worth of queries."""
        self._foreseen.update({(kind, scope): None for kind in kinds for scope in scopes})
        self._foreseen.update({(row.kind, row.scope): row for row in self._document_rows(kinds, scopes)})

    def documents_of(self, kinds: Collection[str], scopes: Iterable[str]) -> dict[tuple[str, str], Issued]:
        """By kind and scope, the newest documents. Kinds are asked for too because the key begins with them."""
        return {(row.kind, row.scope): _issued(row) for row in self._document_rows(kinds, scopes)}

    def _document_rows(self, kinds: Collection[str], scopes: Iterable[str]) -> Iterator[DocumentRow]:
        left = iter(scopes)
        while part := list(islice(left, MAX_NAMED)):
            query = select(DocumentRow).where(DocumentRow.kind.in_(kinds), DocumentRow.scope.in_(part))
            yield from self._session.scalars(query)

    def documents(self, kind: str) -> list[Issued]:
        """Every scope's newest document of one kind."""
        query = select(DocumentRow).where(DocumentRow.kind == kind).order_by(DocumentRow.scope)
        return [_issued(row) for row in self._session.scalars(query)]

    def put_document(self, issued: Issued) -> None:
        self._foreseen.pop((issued.kind, issued.scope), None)
        self._session.merge(DocumentRow(**msgspec.structs.asdict(issued)))

    def drop_documents(self, scope: str) -> None:
        """Forget what was said to a node that is gone."""
        self._foreseen.clear()
        self._session.execute(delete(DocumentRow).where(DocumentRow.scope == scope))

    def burn(self, kind: str, scope: str, revision: int) -> None:
        """Never issue `revision` or a lower one again."""
        self._foreseen.pop((kind, scope), None)
        row = self._session.get(DocumentRow, (kind, scope))
        if row is not None:
            row.floor = max(row.floor, revision)


def _package(row: PackageRow) -> Package:
    return Package(PackageRef(row.package, row.version), row.digest, row.manifest, row.published)


def _deployment(row: DeploymentRow) -> Deployment:
    models = {entry.model: PackageRef(entry.package, entry.version) for entry in row.models}
    return Deployment(row.name, row.tenant, row.selector, dict(sorted(models.items())))


def _member(row: NodeRow) -> Member:
    return Member(
        Node(row.id, row.tier, row.labels, tuple(row.groups)),
        created=row.created,
        state=row.state,
        boot=row.boot,
        seen=row.seen,
        left=row.left,
        reported=msgspec.json.decode(row.reported, type=Reported) if row.reported else None,
        capabilities=msgspec.json.decode(row.capabilities, type=Capabilities) if row.capabilities else None,
        broker_hash=row.broker_hash,
    )


def _issued(row: DocumentRow) -> Issued:
    return Issued(row.kind, row.scope, row.revision, row.floor, row.kid, row.digest, row.body, row.envelope, row.issued)
