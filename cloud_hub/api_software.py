"""The nodes' own software: publish a version as wheels, say which nodes run it."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from cloud_hub.api_context import OpenHub
from cloud_hub.api_types import Name, SoftwareList, SoftwareOut, SoftwareTargetIn, SoftwareTargetList, SoftwareTargetOut
from cloud_hub.rollout import Deployment, PackageRef
from cloud_hub.software_records import SLOT
from models.errors import TooLarge
from sync.version import DISTRIBUTION

MAX_BODY = 64 * 1024

router = APIRouter(prefix="/api/v1/software", tags=["software"])

BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Software"}}},
    }
}


@router.post("", response_model=SoftwareOut, responses={201: {"model": SoftwareOut}}, openapi_extra=BODY)
async def publish_software(request: Request, response: Response, hub: OpenHub) -> SoftwareOut:
    """Publish a version; its wheels must be uploaded before. 201 when it is new, 200 when it exists, 409 with other files."""
    body = await request.body()
    if len(body) > MAX_BODY:
        raise TooLarge(f"the body has {len(body)} bytes, at most {MAX_BODY} are accepted")
    software, created = await hub.software.publish(body)
    response.status_code = 201 if created else 200
    return SoftwareOut(version=software.version, wheels=[wheel.name for wheel in software.wheels], withdrawn=False)


@router.get("")
async def list_software(hub: OpenHub) -> SoftwareList:
    """Published versions, oldest first."""

    def read() -> list[SoftwareOut]:
        with hub.storage.read() as records:
            return [
                SoftwareOut(version=each.version, wheels=[wheel.name for wheel in each.wheels], withdrawn=withdrawn)
                for each, _, withdrawn in records.software.versions()
            ]

    return SoftwareList(items=await asyncio.to_thread(read))


@router.post("/versions/{version}/unapprove", status_code=204)
async def unapprove_software(version: str, hub: OpenHub) -> None:
    """Withdraw a version found bad: no node installs it from then on. 409 while a target names it."""
    await hub.software.withdraw(version)


@router.put("/targets/{name}", response_model=SoftwareTargetOut, responses={201: {"model": SoftwareTargetOut}})
async def put_target(name: Name, body: SoftwareTargetIn, response: Response, hub: OpenHub) -> SoftwareTargetOut:
    """Say which nodes run a version: create (201) or replace (200). 409 for two targets equally specific about a node."""
    target = Deployment(name, body.tenant, body.selector, {SLOT: PackageRef(DISTRIBUTION, body.version)})
    created, changed = await asyncio.to_thread(hub.software.target, target)
    hub.publisher.send(changed)
    response.status_code = 201 if created else 200
    return SoftwareTargetOut(name=name, **body.model_dump())


@router.get("/targets")
async def list_targets(hub: OpenHub) -> SoftwareTargetList:
    """Which nodes run which version."""

    def read() -> list[Deployment]:
        with hub.storage.read() as records:
            return records.software.targets()

    return SoftwareTargetList(
        items=[
            SoftwareTargetOut(
                name=each.name, tenant=each.tenant, selector=dict(each.selector), version=each.models[SLOT].version
            )
            for each in await asyncio.to_thread(read)
        ]
    )


@router.delete("/targets/{name}", status_code=204)
async def delete_target(name: Name, hub: OpenHub) -> None:
    """Nodes keep the version they run."""
    await asyncio.to_thread(hub.software.forget, name)
