"""Packages: publish a version, see what is published and which model names use it."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request, Response

from cloud_hub.api_context import OpenHub, cursor
from cloud_hub.api_types import MAX_PAGE, ModelList, ModelOut, ModelUse, PackageDetail, PackageOut, PackagePage
from cloud_hub.records import Package
from cloud_hub.registry import files_of
from cloud_hub.rollout import Deployment, PackageRef
from models.errors import NotFound
from models.manifest import decode_manifest

router = APIRouter(prefix="/api/v1", tags=["packages"])

MANIFEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Manifest"}}},
    }
}


@router.post(
    "/packages", response_model=PackageOut, responses={201: {"model": PackageOut}}, openapi_extra=MANIFEST_BODY
)
async def publish(request: Request, response: Response, hub: OpenHub) -> PackageOut:
    """Publish a version: the body is the manifest, its exact bytes are what is signed; its files must be uploaded before.

    201 when it is new, 200 when the same version with the same bytes exists, 409 when its bytes differ.
    """
    package, created = await hub.registry.publish(await request.body())
    response.status_code = 201 if created else 200
    return _summary(package)


@router.get("/packages")
async def list_packages(
    hub: OpenHub, limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100, after: str | None = None
) -> PackagePage:
    """Published versions in (package, version) order."""

    def read() -> list[Package]:
        with hub.storage.read() as records:
            return records.packages(limit + 1, cursor(after))

    found = await asyncio.to_thread(read)
    more = len(found) > limit
    return PackagePage(
        items=[_summary(entry) for entry in found[:limit]], next=str(found[limit - 1].ref) if more else None
    )


@router.get("/packages/{package}/{version}")
async def get_package(package: str, version: str, hub: OpenHub) -> PackageDetail:
    """One version with its manifest and files."""
    ref = PackageRef(package, version)

    def read() -> Package | None:
        with hub.storage.read() as records:
            return records.package(ref)

    found = await asyncio.to_thread(read)
    if found is None:
        raise NotFound(f"package {ref} has not been published")
    files = {blob.digest: blob.size for blob in files_of(decode_manifest(found.manifest)).values()}
    return PackageDetail(
        **_summary(found).model_dump(),
        files={**files, found.digest: len(found.manifest)},
        contents=msgspec.json.decode(found.manifest),
    )


@router.post("/packages/{package}/{version}/unapprove", status_code=204)
async def unapprove(package: str, version: str, hub: OpenHub) -> None:
    """Withdraw a version found bad: no node installs it from then on. 409 while a deployment names it."""
    await hub.registry.unapprove(PackageRef(package, version))


@router.get("/models", tags=["models"])
async def list_models(hub: OpenHub) -> ModelList:
    """The model names callers can use, and which deployment gives them which package where."""

    def read() -> list[Deployment]:
        with hub.storage.read() as records:
            return records.deployments()

    uses: dict[str, list[ModelUse]] = {}
    for deployment in await asyncio.to_thread(read):
        for model, ref in deployment.models.items():
            uses.setdefault(model, []).append(
                ModelUse(
                    deployment=deployment.name,
                    tenant=deployment.tenant,
                    selector=dict(deployment.selector),
                    package=ref.package,
                    version=ref.version,
                )
            )
    return ModelList(items=[ModelOut(model=model, uses=uses[model]) for model in sorted(uses)])


def _summary(package: Package) -> PackageOut:
    manifest = decode_manifest(package.manifest)
    return PackageOut(
        package=package.ref.package,
        version=package.ref.version,
        manifest=package.digest,
        published=package.published,
        description=manifest.description,
        engines=sorted({f"{variant.engine} {variant.precision}" for variant in manifest.variants}),
        accuracy=manifest.contract.accuracy,
    )
