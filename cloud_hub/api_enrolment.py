"""Identities over HTTP: what nodes ask without a credential (they bring a token or a proof), and what operators decide."""

from __future__ import annotations

import asyncio
import binascii
from base64 import b64decode
from typing import Annotated

import msgspec
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from cloud_hub.api_context import OpenHub
from cloud_hub.api_types import MAX_LABELS, Input, Label, Name, Tier, Value
from cloud_hub.certificate_requests import MAX_REQUEST_BYTES, read_request
from cloud_hub.enrolment import MAX_NAMES, TOKEN_SECONDS
from cloud_hub.identity_records import Invitation
from models.errors import InvalidRequest
from sync.enrol_messages import Enrol, Enrolled, Leave, Renew
from sync.topics import DOWN, RETAINED, UP, check_node_id, down, up

router = APIRouter(prefix="/api/v1", tags=["identity"])

NodeId = Annotated[str, Field(max_length=64, examples=["acme.gateway-1"])]
Csr = Annotated[str, Field(max_length=MAX_REQUEST_BYTES, description="certificate request, PEM")]
Host = Annotated[str, Field(min_length=1, max_length=253)]
Short = Annotated[str, Field(max_length=200)]


class CaOut(BaseModel):
    bundle: str = Field(description="PEM of every authority to trust")
    pin: str = Field(description="sha256 of the first one, as enrolment tokens carry it")


class EnrolIn(Input):
    token: Short
    csr: Csr
    hardware: Annotated[str | None, Field(max_length=128)] = None


class ChallengeIn(Input):
    node: NodeId


class ChallengeOut(BaseModel):
    nonce: str


class RenewIn(Input):
    node: NodeId
    nonce: Short
    csr: Csr
    proof: Annotated[str, Field(max_length=400, description="signature, base64")]


class LeaveIn(Input):
    node: NodeId
    nonce: Short
    proof: Annotated[str, Field(max_length=400)]


class InvitationIn(Input):
    """`names`: host names and addresses the node may prove to its neighbours. `hardware`: the only machine it may be."""

    id: NodeId
    tier: Tier
    labels: Annotated[dict[Label, Value], Field(max_length=MAX_LABELS)] = {}
    groups: Annotated[list[Name], Field(max_length=32)] = []
    names: Annotated[list[Host], Field(max_length=MAX_NAMES)] = []
    hardware: Annotated[str | None, Field(min_length=1, max_length=128)] = None
    seconds: Annotated[float, Field(gt=0, le=30 * TOKEN_SECONDS)] = TOKEN_SECONDS


class InvitationOut(BaseModel):
    id: str
    token: str
    seconds: float


class RevokeIn(Input):
    reason: Annotated[str, Field(max_length=200)] = "revoked"


class DenialOut(BaseModel):
    id: str
    reason: str


class BrokerCertificateIn(Input):
    csr: Csr
    names: Annotated[list[Host], Field(min_length=1, max_length=32)]


class BrokerCertificateOut(BaseModel):
    certificate: str
    bundle: str
    not_after: float


class AuthorityOut(BaseModel):
    number: int
    issuing: bool
    fingerprint: str
    since: float
    until: float


class SwitchIn(Input):
    force: bool = False


# --- open: the request itself carries what it is judged by ----------------------------------------------------------


@router.get("/ca")
async def authorities(hub: OpenHub) -> CaOut:
    """Whom nodes trust. Believe it only when its first certificate has the fingerprint you were given."""
    authority = hub.enrolment.authority
    return CaOut(bundle=authority.bundle().decode(), pin=authority.pin())


@router.post("/enrol")
async def enrol(body: EnrolIn, hub: OpenHub) -> Response:
    """A certificate for a token, once. 401 unknown, used or too old; 409 a key that was enrolled before."""
    enrolled, documents = await asyncio.to_thread(
        hub.enrolment.enrol, Enrol(token=body.token, csr=body.csr, hardware=body.hardware)
    )
    hub.fleet.admit(enrolled.node)
    hub.kicker.readmit(enrolled.node)
    hub.publisher.send(documents)
    return _answer(enrolled)


@router.post("/renew/challenge")
async def challenge(body: ChallengeIn, hub: OpenHub) -> ChallengeOut:
    """A nonce for one renewal or leave, good for two minutes."""
    return ChallengeOut(nonce=hub.enrolment.challenge(body.node))


@router.post("/renew")
async def renew(body: RenewIn, hub: OpenHub) -> Response:
    """The next certificate, for a proof by a key of the node's; also long after the last certificate expired."""
    request = Renew(node=check_node_id(body.node), nonce=body.nonce, csr=body.csr, proof=_bytes(body.proof))
    return _answer(await asyncio.to_thread(hub.enrolment.renew, request))


@router.post("/leave", status_code=204)
async def leave(body: LeaveIn, hub: OpenHub) -> None:
    """A node asks to be forgotten."""
    request = Leave(node=check_node_id(body.node), nonce=body.nonce, proof=_bytes(body.proof))
    await asyncio.to_thread(hub.enrolment.leave, request)
    _gone(hub, body.node)


def _answer(enrolled: Enrolled) -> Response:
    return Response(msgspec.json.encode(enrolled), media_type="application/json")


def _bytes(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except binascii.Error as error:
        raise InvalidRequest(f"proof: {error}") from error


# --- for the admin --------------------------------------------------------------------------------------------------


@router.post("/invitations", status_code=201)
async def invite(body: InvitationIn, hub: OpenHub) -> InvitationOut:
    """A token that lets one node in, once. 409 while the node has a certificate."""
    invitation = Invitation(body.id, body.tier, dict(body.labels), tuple(body.groups), tuple(body.names), body.hardware)
    token = await asyncio.to_thread(hub.enrolment.invite, invitation, body.seconds)
    return InvitationOut(id=body.id, token=str(token), seconds=body.seconds)


@router.post("/nodes/{node_id}/revoke")
async def revoke(node_id: str, body: RevokeIn, hub: OpenHub) -> DenialOut:
    """Refuse a node at once: its tokens, its renewals, its messages; its live connection ends within a minute."""
    await asyncio.to_thread(hub.enrolment.revoke, node_id, body.reason)
    _refuse(hub, node_id)
    return DenialOut(id=node_id, reason=body.reason)


@router.delete("/nodes/{node_id}", status_code=204)
async def decommission(node_id: str, hub: OpenHub) -> None:
    """Revoke a node and delete what is known of it, here and at the broker."""
    await asyncio.to_thread(hub.enrolment.forget, node_id)
    _gone(hub, node_id)


@router.get("/denied")
async def denied(hub: OpenHub) -> list[DenialOut]:
    """Ids that are refused."""
    found = await asyncio.to_thread(hub.enrolment.denied)
    return [DenialOut(id=node, reason=reason) for node, reason in found.items()]


@router.post("/broker/certificate", tags=["broker"])
async def broker_certificate(body: BrokerCertificateIn, hub: OpenHub) -> BrokerCertificateOut:
    """A server certificate for a broker, 30 days. The broker keeps its key."""
    key, _ = await asyncio.to_thread(read_request, body.csr)
    authority = hub.enrolment.authority
    issued = authority.issue_server(key, body.names, hub.clock.wall())
    return BrokerCertificateOut(
        certificate=issued.chain.decode(), bundle=authority.bundle().decode(), not_after=issued.not_after
    )


@router.get("/authority")
async def show_authorities(hub: OpenHub) -> list[AuthorityOut]:
    """Every certificate authority that nodes trust, and which of them issues."""
    return [AuthorityOut.model_validate(entry) for entry in hub.enrolment.authority.describe()]


@router.post("/authority/next", status_code=201)
async def next_authority(hub: OpenHub) -> list[AuthorityOut]:
    """Make the next authority and let nodes hear of it with every renewal. It issues after `switch`."""
    await asyncio.to_thread(hub.enrolment.authority.add_next, hub.clock.wall())
    await asyncio.to_thread(hub.renew_own)
    return await show_authorities(hub)


@router.post("/authority/switch")
async def switch_authority(body: SwitchIn, hub: OpenHub) -> list[AuthorityOut]:
    """Issue with the newest authority. 409 in the first two weeks of its life, unless `force`."""
    hub.enrolment.authority.switch(hub.clock.wall(), force=body.force)
    await asyncio.to_thread(hub.renew_own)
    return await show_authorities(hub)


@router.post("/authority/{number}/retire")
async def retire_authority(number: int, hub: OpenHub) -> list[AuthorityOut]:
    """Stop trusting an old authority. 409 while a certificate of its is valid."""
    now = hub.clock.wall()

    def in_use() -> bool:
        with hub.storage.read() as records:
            return records.identities.in_use(number, now)

    used = await asyncio.to_thread(in_use)
    hub.enrolment.authority.retire(number, now, in_use=used)
    await asyncio.to_thread(hub.renew_own)
    return await show_authorities(hub)


def _refuse(hub: OpenHub, node_id: str) -> None:
    hub.fleet.deny(node_id)
    hub.kicker.add(node_id)


def _gone(hub: OpenHub, node_id: str) -> None:
    """Nothing of it stays at the broker either: an empty retained message deletes what is kept."""
    _refuse(hub, node_id)
    topics = [up(node_id, leaf) for leaf in RETAINED if leaf in UP]
    topics += [down(node_id, leaf) for leaf in RETAINED if leaf in DOWN]
    for topic in topics:
        hub.link.publish(topic, b"", qos=1, retain=True)
