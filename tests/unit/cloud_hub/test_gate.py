"""Strangers cost little and keep nobody out."""

from __future__ import annotations

import asyncio
from typing import Any

from hub_in_memory import Bench

from cloud_hub import gate
from cloud_hub.app import create_app

HEADERS = [(b"content-type", b"application/json")]


def scope(address: str, path: str = "/api/v1/renew/challenge") -> dict[str, Any]:
    common = {"type": "http", "method": "POST", "http_version": "1.1", "scheme": "http", "root_path": ""}
    more = {"raw_path": path.encode(), "query_string": b"", "server": ("hub", 80), "client": (address, 1)}
    return {**common, **more, "path": path, "headers": HEADERS}


async def ask(application: gate.Application, address: str) -> int:
    """The status of a challenge asked for from `address`."""
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"node":"acme.edge-1"}', "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await application(scope(address), receive, send)
    return statuses[0]


async def test_bodies_that_do_not_come_keep_nobody_else_from_renewing(bench: Bench) -> None:
    application = create_app(bench.hub)
    for_ever = asyncio.Event()

    async def receive() -> Any:
        await for_ever.wait()

    async def send(message: Any) -> None:
        return None

    async def begin() -> None:
        await application(scope("10.0.0.9"), receive, send)

    slow = [asyncio.create_task(begin()) for _ in range(2 * gate.MAX_OPEN_CALLS)]
    await asyncio.sleep(0)
    assert await ask(application, "10.0.0.1") == 200
    assert await ask(application, "10.0.0.9") == 503
    for task in slow:
        task.cancel()
    await asyncio.wait(slow)
    assert await ask(application, "10.0.0.9") == 200


async def test_a_strangers_body_that_does_not_come_is_given_up(bench: Bench, monkeypatch: Any) -> None:
    monkeypatch.setattr(gate, "OPEN_BODY_SECONDS", 0.01)
    statuses: list[int] = []
    for_ever = asyncio.Event()

    async def receive() -> Any:
        await for_ever.wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await create_app(bench.hub)(scope("10.0.0.9"), receive, send)
    assert statuses == [400]
