"""How nodes update: windows, bandwidth, holds, quality. A tenant's settings hold for its nodes that have none of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from cloud_hub.api_context import OpenHub
from cloud_hub.api_types import Name, SettingsOut, SettingsStored
from cloud_hub.documents import node_scope, settings_of, tenant_scope
from cloud_hub.hub import Hub
from cloud_hub.records import Issued
from models.errors import InvalidRequest, NotFound, TooLarge
from models.serving.quality import Rules, read_rules
from sync.errors import Malformed
from sync.settings import Settings, decode_settings, too_short
from sync.states import DEADLINES, MIN_DEADLINES
from sync.topics import tenant_of
from sync.windows import Window

MAX_BODY = 32 * 1024

router = APIRouter(prefix="/api/v1/settings", tags=["settings"])

BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Settings"}}},
    }
}


@router.put("/{tenant}", openapi_extra=BODY)
async def put_settings(tenant: Name, request: Request, hub: OpenHub) -> SettingsStored:
    """Set them for every node of the tenant that has none of its own."""
    given = checked(await request.body())

    def store() -> tuple[Issued, list[Issued]]:
        with hub.storage.write() as records:
            issued = hub.documents.set_settings(records, tenant_scope(tenant), given)
            nodes = [node for node in records.nodes() if tenant_of(node.id) == tenant]
            return issued, hub.documents.settings(records, nodes)

    issued, changed = await asyncio.to_thread(store)
    hub.publisher.send(changed)
    return SettingsStored(scope=issued.scope, revision=issued.revision)


@router.put("/nodes/{node_id}", openapi_extra=BODY)
async def put_node_settings(node_id: str, request: Request, hub: OpenHub) -> SettingsStored:
    """Set them for one node, in place of its tenant's."""
    given = checked(await request.body())

    def store() -> Issued:
        with hub.storage.write() as records:
            if records.member(node_id) is None:
                raise NotFound(f"no node {node_id!r}")
            return hub.documents.set_settings(records, node_scope(node_id), given)

    issued = await asyncio.to_thread(store)
    hub.publisher.send([issued])
    return SettingsStored(scope=issued.scope, revision=issued.revision)


@router.get("/{tenant}")
async def get_settings(tenant: Name, hub: OpenHub) -> SettingsOut:
    """Those of a tenant."""
    return await _read(hub, tenant_scope(tenant))


@router.get("/nodes/{node_id}")
async def get_node_settings(node_id: str, hub: OpenHub) -> SettingsOut:
    """Those that a node is sent; `settings.of` says whether they are its own or its tenant's."""
    return await _read(hub, node_scope(node_id))


@router.delete("/{tenant}")
async def delete_settings(tenant: Name, hub: OpenHub) -> SettingsOut:
    """Its nodes that have none of their own then go by their own configuration. 404 when nothing was set."""

    def remove() -> tuple[Issued, list[Issued]]:
        with hub.storage.write() as records:
            issued = hub.documents.remove_settings(records, tenant_scope(tenant))
            nodes = [node for node in records.nodes() if tenant_of(node.id) == tenant]
            return issued, hub.documents.settings(records, nodes)

    issued, changed = await asyncio.to_thread(remove)
    hub.publisher.send(changed)
    return _out(issued)


@router.delete("/nodes/{node_id}")
async def delete_node_settings(node_id: str, hub: OpenHub) -> SettingsOut:
    """The node then has its tenant's: they are the answer. 404 when nothing was set for this node alone."""

    def remove() -> Issued:
        with hub.storage.write() as records:
            if records.member(node_id) is None:
                raise NotFound(f"no node {node_id!r}")
            return hub.documents.remove_settings(records, node_scope(node_id))

    issued = await asyncio.to_thread(remove)
    hub.publisher.send([issued])
    return _out(issued)


async def _read(hub: Hub, scope: str) -> SettingsOut:
    def read() -> Issued | None:
        with hub.storage.read() as records:
            return records.document("settings", scope)

    issued = await asyncio.to_thread(read)
    if issued is None or settings_of(issued) == "none":
        raise NotFound(f"there are no settings for {scope}: the nodes' own apply")
    return _out(issued)


def _out(issued: Issued) -> SettingsOut:
    return SettingsOut(scope=issued.scope, revision=issued.revision, settings=msgspec.json.decode(issued.body))


def checked(body: bytes) -> Mapping[str, object]:
    """What was given, once every field is known and makes sense. Raises InvalidRequest naming the field, TooLarge."""
    if len(body) > MAX_BODY:
        raise TooLarge(f"settings take {len(body)} bytes, at most {MAX_BODY} are accepted")
    try:
        settings = decode_settings(body)
        given = msgspec.json.decode(body, type=dict[str, object])
    except Malformed as error:
        raise InvalidRequest(str(error)) from error
    _check_names("", given, Settings)
    for index, window in enumerate(_of(given, "windows")):
        _check_names(f"windows[{index}].", window, Window)
    _check_names("deadlines.", _of(given, "deadlines"), DEADLINES)
    _check_names("quality.", _of(given, "quality"), Rules)
    for state, seconds in too_short(settings).items():
        least = MIN_DEADLINES[state]
        raise InvalidRequest(f"deadlines.{state}: {seconds:g} s is too short for any update, at least {least:g} s")
    read_rules(settings.quality)
    return given


def _of(given: Mapping[str, Any], name: str) -> Any:
    return given.get(name, ())


def _check_names(prefix: str, given: Iterable[str], known: type[msgspec.Struct] | Iterable[str]) -> None:
    """Nodes pass over what they do not know: a slip of the pen would quietly count for nothing."""
    names = known.__struct_fields__ if isinstance(known, type) else tuple(known)
    for name in given:
        if name not in names:
            raise InvalidRequest(f"{prefix}{name[:60]}: no such setting; there are {', '.join(names)}")
