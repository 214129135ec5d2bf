"""Routing policies, one per tenant. The shortest path of the hub: one transaction, one signature, one publish."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter, Request

from cloud_hub.api_context import OpenHub
from cloud_hub.api_types import Name, PolicyOut, PolicyStored
from cloud_hub.documents import tenant_scope
from cloud_hub.records import Issued
from models.errors import NotFound
from models.policy import decode_policy

router = APIRouter(prefix="/api/v1/policies", tags=["policies"])

POLICY_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Policy"}}},
    }
}


@router.put("/{tenant}", openapi_extra=POLICY_BODY)
async def put_policy(tenant: Name, request: Request, hub: OpenHub) -> PolicyStored:
    """Set the policy. It is on its way to the nodes when this answers; the same policy again keeps its revision."""
    # Written anew, so that spelling and spacing neither spend a revision nor the message's size.
    body = msgspec.json.encode(decode_policy(await request.body()))

    def store() -> Issued:
        with hub.storage.write() as records:
            return hub.documents.policy(records, tenant, body)

    issued = await asyncio.to_thread(store)
    hub.publisher.send([issued])
    return PolicyStored(tenant=tenant, revision=issued.revision)


@router.get("/{tenant}")
async def get_policy(tenant: Name, hub: OpenHub) -> PolicyOut:
    """The policy in force."""

    def read() -> Issued | None:
        with hub.storage.read() as records:
            return records.document("policy", tenant_scope(tenant))

    issued = await asyncio.to_thread(read)
    if issued is None:
        raise NotFound(f"tenant {tenant!r} has no policy: the defaults apply")
    policy = msgspec.json.decode(issued.body)
    return PolicyOut(tenant=tenant, revision=issued.revision, issued=issued.issued, policy=policy)
