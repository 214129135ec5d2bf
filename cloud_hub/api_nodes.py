"""Nodes: register one, see what it should run and what it says it runs; and what the broker must know of them."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query

from cloud_hub.api_context import OpenHub
from cloud_hub.api_types import (
    MAX_PAGE,
    BrokerAccess,
    BrokerUser,
    DocumentOut,
    NodeDetail,
    NodeIn,
    NodeOut,
    NodePage,
    TokenOut,
)
from cloud_hub.auth import broker_hash, hash_token, new_token
from cloud_hub.documents import models_of
from cloud_hub.errors import Conflict
from cloud_hub.hub import Hub
from cloud_hub.identity_records import Known
from cloud_hub.publisher import wanted_by
from cloud_hub.records import Issued, Member, Records
from cloud_hub.rollout import Node, Sync, sync_of
from models.errors import InvalidRequest, NotFound
from sync.topics import HUB_USER, access_list, check_node_id

router = APIRouter(prefix="/api/v1", tags=["nodes"])

RESERVED_LABELS = ("id", "tier", "group")


@router.post("/nodes", status_code=201)
async def add_node(body: NodeIn, hub: OpenHub) -> TokenOut:
    """Register a node. Its token is in the answer and nowhere else. 409 when the id is taken."""
    node = Node(check_node_id(body.id), body.tier, body.labels, tuple(body.groups))
    for label in RESERVED_LABELS:
        if label in node.labels:
            raise InvalidRequest(f"labels.{label}: every node has this label already")
    token = new_token("tln")
    hub.publisher.send(await asyncio.to_thread(_add, hub, node, token))
    hub.fleet.admit(node.id)
    return TokenOut(id=node.id, token=token)


def _add(hub: Hub, node: Node, token: str) -> list[Issued]:
    with hub.storage.write() as records:
        if records.member(node.id) is not None:
            raise Conflict(f"node {node.id} is registered; POST /api/v1/nodes/{node.id}/token makes it a new token")
        records.add_node(node, hash_token(token), broker_hash(token), hub.clock.wall())
        changed = hub.documents.settings(records, [node]) + hub.documents.desired(records, [node])
        return changed + hub.documents.software(records, [node])


@router.post("/nodes/{node_id}/token")
async def rotate_token(node_id: str, hub: OpenHub) -> TokenOut:
    """A new token; the old one ends at once here, and at the broker when it reads `/api/v1/broker/access` again."""
    token = new_token("tln")

    def store() -> bool:
        with hub.storage.write() as records:
            return records.set_token(node_id, hash_token(token), broker_hash(token))

    if not await asyncio.to_thread(store):
        raise NotFound(f"no node {node_id!r}")
    return TokenOut(id=node_id, token=token)


@router.get("/nodes")
async def list_nodes(hub: OpenHub, limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100, after: str = "") -> NodePage:
    """Registered nodes in id order."""

    def read() -> list[NodeDetail]:
        now = hub.clock.wall()
        with hub.storage.read() as records:
            return [_describe(records, member, now) for member in records.members(limit + 1, after)]

    found = await asyncio.to_thread(read)
    items = [NodeOut(**entry.model_dump(include=set(NodeOut.model_fields))) for entry in found[:limit]]
    return NodePage(items=items, next=items[-1].id if len(found) > limit else None)


@router.get("/nodes/{node_id}")
async def get_node(node_id: str, hub: OpenHub) -> NodeDetail:
    """One node: what it should run, what it reports, per document whether the two agree."""

    def read() -> NodeDetail | None:
        with hub.storage.read() as records:
            member = records.member(node_id)
            return _describe(records, member, hub.clock.wall()) if member else None

    found = await asyncio.to_thread(read)
    if found is None:
        raise NotFound(f"no node {node_id!r}")
    return found


def _describe(records: Records, member: Member, now: float) -> NodeDetail:
    issued = {document.kind: document for document in wanted_by(records, [member])[0]}
    documents = {kind: _document(member, document, now) for kind, document in issued.items()}
    return NodeDetail(
        id=member.node.id,
        tier=member.node.tier,
        labels=dict(member.node.labels),
        groups=list(member.node.groups),
        state=member.state,
        seen=member.seen or None,
        in_sync=all(entry.sync == Sync.IN_SYNC for entry in documents.values()),
        running=member.reported.running if member.reported else {},
        desired=dict(models_of(issued["desired"].body)) if "desired" in issued else {},
        documents=documents,
        reported=msgspec.to_builtins(member.reported) if member.reported else None,
        capabilities=msgspec.to_builtins(member.capabilities) if member.capabilities else None,
    )


def _document(member: Member, issued: Issued, now: float) -> DocumentOut:
    standing = member.standing(issued.kind, issued, now)
    sync, _ = sync_of(standing)
    report = standing.report
    return DocumentOut(
        revision=issued.revision,
        reported=report.revision if report else 0,
        applied=report.applied if report else 0,
        state=report.state if report else None,
        sync=sync,
        error=report.error if report else None,
    )


@router.get("/broker/access", tags=["broker"])
async def broker_access(hub: OpenHub, have: Annotated[str, Query(max_length=64)] = "") -> BrokerAccess:
    """Users, access list, password file and revocation list for the broker. Fetch again after any change of nodes.

    `have`: the `version` the broker works by now; once it is the newest, connections of revoked nodes are ended.
    """

    def read() -> tuple[list[Member], set[str], list[Known]]:
        with hub.storage.read() as records:
            identities = records.identities
            return records.members(), set(identities.denied()), identities.ended_alive(hub.clock.wall())

    members, refused, ended = await asyncio.to_thread(read)
    members = [member for member in members if member.node.id not in refused]
    # An id is named as long as a certificate of its could still open a connection.
    denied = refused & {known.node for known in ended}
    users = [BrokerUser(id=HUB_USER, password_hash=hub.broker_password_hash)]
    users += [BrokerUser(id=member.node.id, password_hash=member.broker_hash) for member in members]
    groups = [(member.node.id, group) for member in members for group in member.node.groups]
    passwords = "".join(f"{user.id}:{user.password_hash}\n" for user in users if user.password_hash)
    acl = access_list([member.node.id for member in members], groups, denied)
    revoked = [(known.issuer, known.serial, known.ended) for known in ended]
    authority = hub.enrolment.authority
    state = [acl, passwords, [entry[:2] for entry in revoked], authority.bundle()]
    version = sha256(msgspec.json.encode(state)).hexdigest()
    if have == version:
        hub.kicker.broker_knows(refused)
    revocations = await asyncio.to_thread(authority.revocation_list, revoked, hub.clock.wall())
    return BrokerAccess(
        version=version,
        users=users,
        acl=acl,
        passwords=passwords,
        bundle=authority.bundle().decode(),
        revocations=revocations.decode(),
    )
