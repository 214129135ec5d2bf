"""Events: what the nodes sent up, the hub's half of each node's ledger, and the alarms that are raised."""

from __future__ import annotations

import asyncio
import base64
from itertools import chain
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from cloud_hub.api_context import OpenHub
from cloud_hub.api_types import MAX_PAGE
from cloud_hub.event_records import Arrived
from models.errors import NotFound

MAX_DEPTH = 100
"""Of a body that is shown as JSON. What is nested deeper is shown as bytes: many readers of the page could not take it."""

router = APIRouter(prefix="/api/v1", tags=["events"])


class EventOut(BaseModel):
    """`at`: by the node's clock, `received`: by the hub's, Unix seconds. The body is `json` when it is JSON that is not
    nested too deep, else `base64`."""

    position: int
    node: str
    id: str
    kind: str
    priority: int
    at: float
    received: float
    json_body: Any = Field(default=None, serialization_alias="json")
    base64_body: str | None = Field(default=None, serialization_alias="base64")


class EventPage(BaseModel):
    items: list[EventOut]
    next: int | None = Field(description="pass as `after` for the next page; null = this was the last")


class KindCounts(BaseModel):
    received: int
    duplicates: int
    dead_letters: int


class DeadLetterOut(BaseModel):
    """What was no event. `head`: its first bytes, base64."""

    at: float
    reason: str
    head: str


class HubLedger(BaseModel):
    """The hub's half. `streams`: by kind; "" is what was too broken to have one. `low`: events of the node with a smaller
    number are settled. `starts`: how often its outbox was opened."""

    node: str
    streams: dict[str, KindCounts]
    low: int
    starts: int
    dead_letters: list[DeadLetterOut]


class AlarmOut(BaseModel):
    node: str
    alarm: str
    text: str
    since: float


class AlarmList(BaseModel):
    items: list[AlarmOut]


@router.get("/events", response_model=EventPage)
async def list_events(
    hub: OpenHub,
    node: Annotated[str | None, Query(max_length=64)] = None,
    kind: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    after: Annotated[int, Query(ge=0, lt=1 << 62)] = 0,
) -> Response:
    """Events in the order in which they arrived, after position `after`."""

    def read() -> bytes:
        with hub.storage.read() as records:
            found = records.events.page(limit + 1, after, node, kind)
        # Written here and not by FastAPI: bodies go out as they came, and megabytes of them do not hold up the event loop.
        items = [_describe(event) for event in found[:limit]]
        return msgspec.json.encode({"items": items, "next": found[limit - 1].position if len(found) > limit else None})

    return Response(await asyncio.to_thread(read), media_type="application/json")


@router.get("/nodes/{node_id}/ledger")
async def node_ledger(node_id: str, hub: OpenHub) -> HubLedger:
    """What the hub received of a node: to be held against `tierline ledger` on the node."""

    def read() -> HubLedger | None:
        with hub.storage.read() as records:
            if records.member(node_id) is None:
                return None
            stream = records.events.stream(node_id)
            return HubLedger(
                node=node_id,
                streams={
                    kind: KindCounts(**msgspec.structs.asdict(counts))
                    for kind, counts in records.events.counts(node_id).items()
                },
                low=stream.low if stream else 1,
                starts=stream.starts if stream else 0,
                dead_letters=[
                    DeadLetterOut(at=letter.at, reason=letter.reason, head=base64.b64encode(letter.head).decode())
                    for letter in records.events.dead_letters(node_id)
                ],
            )

    found = await asyncio.to_thread(read)
    if found is None:
        raise NotFound(f"no node {node_id!r}")
    return found


@router.get("/alarms")
async def list_alarms(hub: OpenHub, node: Annotated[str | None, Query(max_length=64)] = None) -> AlarmList:
    """Alarms that are raised now."""

    def read() -> list[AlarmOut]:
        with hub.storage.read() as records:
            return [
                AlarmOut(node=alarm.node, alarm=alarm.alarm, text=alarm.text, since=alarm.since)
                for alarm in records.events.alarms(node)
            ]

    return AlarmList(items=await asyncio.to_thread(read))


def _describe(event: Arrived) -> dict[str, object]:
    """An `EventOut`."""
    fields = msgspec.structs.asdict(event)
    body = fields.pop("body")
    if _showable(body):
        return {**fields, "json": msgspec.Raw(body), "base64": None}
    return {**fields, "json": None, "base64": base64.b64encode(body).decode()}


def _showable(body: bytes) -> bool:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        tables, lists = [item for item in level if type(item) is dict], [item for item in level if type(item) is list]
        if not tables and not lists:
            return True
        level = [*chain.from_iterable(table.values() for table in tables), *chain.from_iterable(lists)]
    return False
