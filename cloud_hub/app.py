"""The management API as one ASGI application: routes, error answers, the gate in front."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from math import ceil
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from cloud_hub import (
    api_blobs,
    api_bundles,
    api_deployments,
    api_doctor,
    api_enrolment,
    api_events,
    api_nodes,
    api_packages,
    api_policies,
    api_settings,
    api_software,
)
from cloud_hub.api_context import OpenHub
from cloud_hub.api_types import ErrorBody, Health, Readiness
from cloud_hub.gate import Application, Gate, status_of
from cloud_hub.hub import Hub
from models.errors import InvalidRequest, Overloaded, TierlineError
from models.manifest import Manifest
from models.policy import Policy
from sync.errors import SyncError
from sync.settings import Settings
from sync.software import Software

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 409, 413, 422, 503)
}
SECURED = [Depends(HTTPBearer(auto_error=False))]
"""Shows the lock and the token field in /docs; the gate has decided before."""

log = logging.getLogger(__name__)
health = APIRouter(tags=["health"])


@health.get("/healthz")
async def healthz() -> Health:
    """Whether the process answers."""
    return Health(status="ok")


@health.get("/readyz")
async def readyz(hub: OpenHub) -> Readiness:
    """Whether the database answers. A broker that is down is shown, but files and the API are there without it."""

    def read() -> None:
        with hub.storage.read() as records:
            records.credential("admin")

    await asyncio.to_thread(read)
    return Readiness(ready=True, broker=hub.link.connected)


def create_api(hub: Hub) -> FastAPI:
    """The routes, without the gate: what a test walks."""
    api = FastAPI(
        title="Tierline hub",
        summary="Publish models and policies, say which nodes run what, see what they run.",
        version="1",
        responses=ERRORS,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    api.state.hub = hub
    api.include_router(health)
    for module in (
        api_packages,
        api_deployments,
        api_policies,
        api_nodes,
        api_blobs,
        api_bundles,
        api_doctor,
        api_enrolment,
        api_events,
        api_settings,
        api_software,
    ):
        api.include_router(module.router, dependencies=SECURED)
    for kind in (TierlineError, SyncError):
        api.add_exception_handler(kind, _answer)
    api.add_exception_handler(RequestValidationError, _answer_invalid)
    api.add_exception_handler(HTTPException, _answer_http)
    api.add_exception_handler(Exception, _answer_unexpected)
    _describe_msgspec_bodies(api)
    return api


def create_app(hub: Hub) -> Application:
    """What the server runs."""
    return Gate(create_api(hub), hub.tokens)


async def _answer(_request: Request, error: Exception) -> JSONResponse:
    again = {"retry-after": str(ceil(error.retry_after))} if isinstance(error, Overloaded) else None
    return JSONResponse({"error": str(error)}, status_of(error), again)


async def _answer_invalid(_request: Request, error: Exception) -> JSONResponse:
    """Names the field: `body.selector.tier: ...`."""
    entries: Sequence[Any] = error.errors() if isinstance(error, RequestValidationError) else ()
    texts = [f"{'.'.join(str(part) for part in entry['loc'])}: {entry['msg']}" for entry in entries]
    if any(tuple(entry["loc"]) == ("body",) for entry in entries):
        texts.append("the body is JSON, sent with 'Content-Type: application/json'")
    return JSONResponse({"error": "; ".join(texts[:10])[:2000]}, InvalidRequest.http)


async def _answer_http(_request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses: no such route, wrong method, JSON that does not parse."""
    if not isinstance(error, HTTPException):
        raise error
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)


async def _answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    """Our fault: told to the log (the server prints the traceback), not to the caller."""
    log.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
    return JSONResponse({"error": "internal error"}, 500)


def _describe_msgspec_bodies(api: FastAPI) -> None:
    """Manifests and policies are read by `models`, exact bytes and all; their schemas come from the same types."""

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = get_openapi(title=api.title, version=api.version, summary=api.summary, routes=api.routes)
            _, components = msgspec.json.schema_components(
                (Manifest, Policy, Settings, Software), ref_template="#/components/schemas/{name}"
            )
            document["components"]["schemas"] |= components
            api.openapi_schema = document
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
