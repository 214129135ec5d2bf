"""What every route of the API receives: the open hub."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from cloud_hub.hub import Hub
from cloud_hub.rollout import PackageRef, parse_reference


def hub_of(request: Request) -> Hub:
    return cast(Hub, request.app.state.hub)


OpenHub = Annotated[Hub, Depends(hub_of)]


def cursor(after: str | None) -> PackageRef | None:
    """The `after` of a page of packages. Raises InvalidRequest."""
    return parse_reference(after) if after else None
