"""Signs what the hub states: which body is the newest of each (kind, scope), under which revision.

A revision is spent only when the body or the signing key changed: the same statement keeps its bytes, so publishing it
again is free of consequence. Runs inside an open transaction, so a statement exists exactly when what it was made of does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from cloud_hub.keys import DOCUMENT_KINDS, HubKeys
from cloud_hub.records import Issued, Records
from cloud_hub.rollout import Deployment, Node, PackageRef, Standing, desired_models
from cloud_hub.software_records import SLOT
from models.desired import Assignment, Desired, assignment_of, decode_desired, digests_of, encode_desired
from models.errors import InvalidRequest, NotFound, TooLarge
from models.manifest import Blob, decode_manifest
from sync.clock import Clock
from sync.errors import Replayed
from sync.messages import MAX_MESSAGE_BYTES, Document, Envelope, decode
from sync.software import decode_software
from sync.topics import tenant_of
from sync.trust import MAX_REVISION, digest_of, sign

MAX_REVISION_JUMP = 1_000_000
"""A report further above our own revision is a lie or a fault: believing it would let one node burn its tenant's revisions."""

UPGRADED = ("edge",)
"""Tiers whose own software is upgraded: a device's is part of its application, a worker's comes with the hub's."""


def node_scope(node_id: str) -> str:
    return f"node:{node_id}"


def tenant_scope(tenant: str) -> str:
    return f"tenant:{tenant}"


class _Origin(msgspec.Struct, frozen=True):
    """`of`: whose settings a body holds, `tenant`, `node` or `none`; nodes ignore the field."""

    of: str = "tenant"


NO_SETTINGS = b'{"of":"none"}'
"""What is said where settings were removed. A document that went away would leave its nodes with what it said, and the next
one would begin again with a revision that they refuse."""


def settings_of(issued: Issued) -> str:
    """Whose settings a document of that kind holds: `tenant`, `node` or `none`."""
    return msgspec.json.decode(issued.body, type=_Origin).of


class Documents:
    def __init__(self, keys: HubKeys, clock: Clock) -> None:
        self._keys = keys
        self._clock = clock

    def policy(self, records: Records, tenant: str, body: bytes) -> Issued:
        """The routing policy of a tenant. Raises TooLarge when it does not fit a message."""
        return self._issue(records, "policy", tenant_scope(tenant), body, ())[0]

    def under_new_key(self, records: Records) -> None:
        """Sign what stands under an older key again, so that the older key can be withdrawn."""
        for kind in DOCUMENT_KINDS:
            for old in records.documents(kind):
                if old.kid != self._keys.signer(kind).kid:
                    self.again(records, kind, old.scope)

    def desired(self, records: Records, nodes: Sequence[Node]) -> list[Issued]:
        """Bring the desired document of each node up to date; the ones that changed.

        A node that has and had nothing to run gets none.
        Raises Conflict for two equally specific deployments, TooLarge when a node's list does not fit a message.
        """
        deployments = records.deployments()
        assignments: dict[PackageRef, Assignment] = {}
        found = []
        records.foresee(("desired",), {node_scope(node.id) for node in nodes})
        for node in nodes:
            issued, changed = self._desired_of(records, node, deployments, assignments)
            if issued is not None and changed:
                found.append(issued)
        return found

    def settings(self, records: Records, nodes: Sequence[Node]) -> list[Issued]:
        """Bring the settings of each node up to date: its own, else its tenant's; the ones that changed."""
        found = []
        nodes_and_tenants = {
            scope for node in nodes for scope in (node_scope(node.id), tenant_scope(tenant_of(node.id)))
        }
        records.foresee(("settings",), nodes_and_tenants)
        for node in nodes:
            own = records.document("settings", node_scope(node.id))
            if own is not None and settings_of(own) == "node":
                continue
            tenant = records.document("settings", tenant_scope(tenant_of(node.id)))
            if tenant is not None and (own is not None or settings_of(tenant) != "none"):
                issued, changed = self._issue(records, "settings", node_scope(node.id), tenant.body, ())
                if changed:
                    found.append(issued)
        return found

    def set_settings(self, records: Records, scope: str, given: Mapping[str, object]) -> Issued:
        """What a tenant's nodes, or one node, are told about updating. Raises TooLarge."""
        what, _, _ = scope.partition(":")
        body = msgspec.json.encode({**given, "of": what}, order="sorted")
        return self._issue(records, "settings", scope, body, ())[0]

    def remove_settings(self, records: Records, scope: str) -> Issued:
        """Take back what was set for a tenant, or for one node, which then has its tenant's. Raises NotFound."""
        what, _, name = scope.partition(":")
        old = records.document("settings", scope)
        if old is None or settings_of(old) != what:
            raise NotFound(f"no settings were set for {scope}")
        tenant = records.document("settings", tenant_scope(tenant_of(name))) if what == "node" else None
        return self._issue(records, "settings", scope, tenant.body if tenant is not None else NO_SETTINGS, ())[0]

    def software(self, records: Records, nodes: Sequence[Node]) -> list[Issued]:
        """Bring each edge node's software document up to date; the ones that changed. Without a target it keeps what it has.

        Raises Conflict for two equally specific targets.
        """
        targets, found = records.software.targets(), []
        records.foresee(("software",), {node_scope(node.id) for node in nodes})
        for node in nodes:
            if node.tier not in UPGRADED:
                continue
            ref = desired_models(node, targets).get(SLOT)
            body = None if ref is None else records.software.body(ref.version)
            if body is not None:
                digests = tuple(sorted(wheel.digest for wheel in decode_software(body).wheels))
                issued, changed = self._issue(records, "software", node_scope(node.id), body, digests)
                if changed:
                    found.append(issued)
        return found

    def again(self, records: Records, kind: str, scope: str) -> Issued:
        """The same statement under a fresh revision, when a report burnt its old one."""
        old = records.document(kind, scope)
        if old is None:
            raise NotFound(f"no {kind} document for {scope}")
        digests: tuple[str, ...] = ()
        if kind == "desired":
            digests = digests_of(decode_desired(old.body))
        elif kind == "software":
            digests = tuple(sorted(wheel.digest for wheel in decode_software(old.body).wheels))
        return self._issue(records, kind, scope, old.body, digests)[0]

    def _desired_of(
        self,
        records: Records,
        node: Node,
        deployments: Sequence[Deployment],
        assignments: dict[PackageRef, Assignment],
    ) -> tuple[Issued | None, bool]:
        models = desired_models(node, deployments)
        scope = node_scope(node.id)
        if not models and records.document("desired", scope) is None:
            return None, False
        for ref in models.values():
            if ref not in assignments:
                assignments[ref] = assignment(records, ref)
        desired = Desired({name: assignments[ref] for name, ref in models.items()})
        return self._issue(records, "desired", scope, encode_desired(desired), digests_of(desired))

    def _issue(
        self, records: Records, kind: str, scope: str, body: bytes, digests: tuple[str, ...]
    ) -> tuple[Issued, bool]:
        """(the newest document, whether it was issued just now)."""
        signer = self._keys.signer(kind)
        old = records.document(kind, scope)
        if old is not None and (old.body, old.kid) == (body, signer.kid) and old.revision > old.floor:
            return old, False
        floor = old.floor if old is not None else 0
        revision = max(old.revision if old is not None else 0, floor) + 1
        now = self._clock.wall()
        document = Document(kind, scope, revision, now, digests, msgspec.Raw(body))
        envelope = sign(document, (signer,))
        limit = MAX_MESSAGE_BYTES
        if len(envelope) > limit:
            raise TooLarge(
                f"{kind} for {scope} takes {len(envelope)} bytes signed, at most {limit} travel in one message"
            )
        digest = digest_of(decode(envelope, Envelope, limit).payload)
        issued = Issued(kind, scope, revision, floor, signer.kid, digest, body, envelope, now)
        records.put_document(issued)
        return issued, True


def assignment(records: Records, ref: PackageRef) -> Assignment:
    """What a desired document says about a published version. Raises InvalidRequest when it was never published."""
    package = records.package(ref)
    if package is None:
        raise InvalidRequest(f"package {ref} has not been published")
    return assignment_of(decode_manifest(package.manifest), Blob(package.digest, len(package.manifest)))


def must_resend(standing: Standing) -> bool:
    """Whether the node has not seen the newest revision. One it has seen and refused is not sent again."""
    return standing.wanted > 0 and (standing.report is None or standing.report.revision < standing.wanted)


def burnt_revision(standing: Standing) -> int | None:
    """A revision the node has seen that we never issued: a hub restored from a backup must go above it.

    The same revision under another digest is such a case too: applied, or refused as a replay because the node had
    accepted the other one, even if it then rolled back. None when all is well, or the claim is beyond belief.
    """
    report = standing.report
    if report is None or standing.wanted == 0:
        return None
    if report.applied == standing.wanted:
        other = report.digest not in ("", standing.digest)
    else:
        other = report.revision == standing.wanted and (report.error or "").startswith(f"{Replayed.code}:")
    seen = max(report.revision, report.applied)
    if not other and seen <= standing.wanted:
        return None
    return seen if seen - standing.wanted <= MAX_REVISION_JUMP and seen < MAX_REVISION else None


def models_of(body: bytes) -> Mapping[str, str]:
    """Model name -> `package/version` of a desired document's body."""
    desired = decode_desired(body)
    return {name: f"{entry.package}/{entry.version}" for name, entry in desired.models.items()}
