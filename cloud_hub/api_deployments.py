"""Deployments: which nodes run what, and how far they have got."""

from __future__ import annotations

import asyncio
from collections import Counter

from fastapi import APIRouter, Response

from cloud_hub.api_context import OpenHub
from cloud_hub.api_types import (
    DeploymentDetail,
    DeploymentIn,
    DeploymentList,
    DeploymentOut,
    Name,
    NodeProgressOut,
    ProgressOut,
)
from cloud_hub.documents import node_scope
from cloud_hub.hub import Hub
from cloud_hub.records import Issued, Records
from cloud_hub.rollout import Deployment, NodeProgress, check_deployment, decided_by, parse_reference, progress
from models.errors import InvalidRequest, NotFound

router = APIRouter(prefix="/api/v1/deployments", tags=["deployments"])


@router.put("/{name}", response_model=DeploymentDetail, responses={201: {"model": DeploymentDetail}})
async def put_deployment(name: Name, body: DeploymentIn, response: Response, hub: OpenHub) -> DeploymentDetail:
    """Create (201) or replace (200). The nodes hear of it at once.

    409 when it and another deployment would decide the same model on a node with equally specific selectors.
    """
    models = {}
    for model, reference in body.models.items():
        try:
            models[model] = parse_reference(reference)
        except InvalidRequest as error:
            raise InvalidRequest(f"models.{model}: {error}") from error
    deployment = Deployment(name, body.tenant, body.selector, models)
    check_deployment(deployment)
    created, changed, detail = await asyncio.to_thread(_put, hub, deployment)
    hub.publisher.send(changed)
    response.status_code = 201 if created else 200
    return detail


@router.get("")
async def list_deployments(hub: OpenHub) -> DeploymentList:
    """Every deployment with the count of nodes in each state."""
    return DeploymentList(items=[DeploymentOut(**entry.model_dump(exclude={"nodes"})) for entry in await _details(hub)])


@router.get("/{name}")
async def get_deployment(name: Name, hub: OpenHub) -> DeploymentDetail:
    """One deployment with each node's state."""
    for entry in await _details(hub):
        if entry.name == name:
            return entry
    raise NotFound(f"no deployment {name!r}")


@router.delete("/{name}", status_code=204)
async def delete_deployment(name: Name, hub: OpenHub) -> None:
    """Nodes stop serving what no other deployment gives them."""

    def remove() -> list[Issued]:
        with hub.storage.write() as records:
            if not records.delete_deployment(name):
                raise NotFound(f"no deployment {name!r}")
            return hub.documents.desired(records, records.nodes())

    hub.publisher.send(await asyncio.to_thread(remove))


def _put(hub: Hub, deployment: Deployment) -> tuple[bool, list[Issued], DeploymentDetail]:
    with hub.storage.write() as records:
        for model, ref in deployment.models.items():
            if records.package(ref) is None:
                raise InvalidRequest(f"models.{model}: package {ref} has not been published")
            if not records.is_approved(ref):
                raise InvalidRequest(f"models.{model}: package {ref} was withdrawn")
        created = records.put_deployment(deployment, hub.clock.wall())
        changed = hub.documents.desired(records, records.nodes())
        detail = next(entry for entry in _describe(records, hub.clock.wall()) if entry.name == deployment.name)
    return created, changed, detail


async def _details(hub: Hub) -> list[DeploymentDetail]:
    def read() -> list[DeploymentDetail]:
        with hub.storage.read() as records:
            return _describe(records, hub.clock.wall())

    return await asyncio.to_thread(read)


def _describe(records: Records, now: float) -> list[DeploymentDetail]:
    deployments, members = records.deployments(), records.members()
    issued = {document.scope: document for document in records.documents("desired")}
    standings = {
        member.node.id: member.standing("desired", issued.get(node_scope(member.node.id)), now) for member in members
    }
    decided = decided_by([member.node for member in members], deployments)
    return [_detail(entry, progress(decided[entry.name], standings)) for entry in deployments]


def _detail(deployment: Deployment, nodes: list[NodeProgress]) -> DeploymentDetail:
    counts = Counter(entry.sync.value for entry in nodes)
    return DeploymentDetail(
        name=deployment.name,
        tenant=deployment.tenant,
        selector=dict(deployment.selector),
        models={model: str(ref) for model, ref in deployment.models.items()},
        progress=ProgressOut(total=len(nodes), **counts),
        nodes=[NodeProgressOut(node=entry.node, sync=entry.sync, reason=entry.reason) for entry in nodes],
    )
