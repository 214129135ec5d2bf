"""What every route of the API receives: the open hub."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from cloud_hub.auth import Principal
from cloud_hub.hub import Hub
from cloud_hub.rollout import PackageRef, parse_reference


def hub_of(request: Request) -> Hub:
    return cast(Hub, request.app.state.hub)


def sender_of(request: Request) -> Principal:
    """Whom the gate let in; there is somebody on every route that is not open."""
    return cast(Principal, request.state.principal)


OpenHub = Annotated[Hub, Depends(hub_of)]
Sender = Annotated[Principal, Depends(sender_of)]


def cursor(after: str | None) -> PackageRef | None:
    """The `after` of a page of packages. Raises InvalidRequest."""
    return parse_reference(after) if after else None
