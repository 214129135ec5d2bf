"""A node's own doctor, asked through the broker: what is wrong there, and what to do about it."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel

from cloud_hub.api_context import OpenHub
from cloud_hub.errors import Conflict
from cloud_hub.hub import Hub
from cloud_hub.records import PRESENT, Member
from models.errors import NotFound, TryAgain
from sync.doctor.check import STATUSES, duration
from sync.errors import Unavailable
from sync.rpc import CallRefused

router = APIRouter(prefix="/api/v1", tags=["nodes"])

WAIT_SECONDS = 35.0
"""More than a node gives itself."""
AWAY_SECONDS = 5.0
MAX_CHECKS = 200


class CheckOut(BaseModel):
    """`status`: ok, warn, fail or skip. `fix`: what to do, empty when nothing is."""

    name: str
    status: str
    found: str
    fix: str = ""
    seconds: float = 0.0


class DoctorOut(BaseModel):
    """`about`: the node. `at`: by the node's clock, Unix seconds."""

    about: str
    tier: str
    software: str
    at: float
    counts: dict[str, int]
    checks: list[CheckOut]


class _Check(msgspec.Struct, frozen=True):
    name: str
    status: str
    found: str
    fix: str = ""
    seconds: float = 0.0


class _Report(msgspec.Struct, frozen=True):
    checks: tuple[_Check, ...]
    tier: str = ""
    software: str = ""
    at: float = 0.0


@router.post("/nodes/{node_id}/doctor")
async def ask_doctor(
    node_id: str, hub: OpenHub, seconds: Annotated[float, Query(ge=1.0, le=WAIT_SECONDS)] = WAIT_SECONDS
) -> DoctorOut:
    """Run the checks on a node and wait for what they find. 503 when it does not answer in time; nothing is changed there."""

    def read() -> Member | None:
        with hub.storage.read() as records:
            return records.member(node_id)

    member = await asyncio.to_thread(read)
    if member is None:
        raise NotFound(f"no node {node_id!r}")
    try:
        # Of one that is away the broker may be wrong, but not for long.
        wait = seconds if member.state in PRESENT else min(seconds, AWAY_SECONDS)
        result = await hub.rpc.ask(node_id, "doctor", wait)
    except Unavailable as error:
        raise TryAgain(f"{error}: {_standing(hub, member)}") from error
    except CallRefused as error:
        raise (TryAgain if error.code in ("busy", "late") else Conflict)(str(error)) from error
    return _read(node_id, result)


def _read(node_id: str, result: bytes) -> DoctorOut:
    try:
        report = msgspec.json.decode(result, type=_Report)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Conflict(f"{node_id} answered something that is no report: {error}") from error
    checks = [CheckOut(**msgspec.structs.asdict(each)) for each in report.checks[:MAX_CHECKS]]
    counts = {status: sum(each.status == status for each in checks) for status in STATUSES}
    return DoctorOut(
        about=node_id, tier=report.tier, software=report.software, at=report.at, counts=counts, checks=checks
    )


def _standing(hub: Hub, member: Member) -> str:
    if not member.seen:
        return "it was never seen here"
    ago = duration(max(hub.clock.wall() - member.seen, 0.0))
    if member.state in PRESENT:
        return (
            f"the broker says that it is here, it last said something {ago} ago; its release may be too old to answer"
        )
    return f"it is {member.state or 'away'}, it last said something {ago} ago; on the machine itself: tierline doctor"
