"""Nobody reaches what their role does not reach."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator

import pytest
from fastapi.routing import APIRoute
from hub_in_memory import Bench, digest

from cloud_hub.app import create_api
from cloud_hub.auth import OPEN_PATHS, Role, broker_hash, roles_for

WHOS = ("nobody", "garbage", "node", "admin")


def routes_of(bench: Bench) -> list[tuple[str, str]]:
    """(method, path with every parameter filled in) of every route the API has."""
    document = create_api(bench.hub).openapi()
    return [
        (
            method.upper(),
            path.format(digest=digest(b"x"), package="p", version="1", name="d", tenant="t", node_id="a.b", number=1),
        )
        for path, operations in document["paths"].items()
        for method in operations
    ]


def headers_of(bench: Bench, who: str) -> dict[str, str]:
    tokens = {"garbage": "tla_wrong", "node": bench.tokens["acme.edge-1"]}
    if who == "admin":
        return {}
    return {"authorization": f"Bearer {tokens[who]}" if who in tokens else ""}


def test_a_path_nobody_thought_of_is_for_the_admin_alone() -> None:
    assert roles_for("/anything/else") == {Role.ADMIN}
    assert roles_for("/healthz/../api/v1/nodes") == {Role.ADMIN}


async def test_every_route_but_health_and_the_description_needs_a_role(bench: Bench) -> None:
    api = create_api(bench.hub)
    paths = {getattr(route, "path", None) for route in api.routes} | set(api.openapi()["paths"])
    assert {path for path in paths if path and not roles_for(path)} == OPEN_PATHS
    assert any(isinstance(route, APIRoute) for route in api.routes) or len(paths) > len(OPEN_PATHS)


@pytest.mark.parametrize("who", WHOS)
async def test_each_role_reaches_its_routes_and_no_other(bench: Bench, who: str) -> None:
    await bench.add_node("acme.edge-1")
    routes = routes_of(bench)
    assert len(routes) > 15
    for method, path in routes:
        answer = await bench.client.request(method, path, headers=headers_of(bench, who))
        shared = path.startswith(("/blobs/", "/tuf/", "/deltas/"))
        if path in OPEN_PATHS or who == "admin" or (who == "node" and shared):
            assert answer.status_code not in (401, 403), (method, path)
        else:
            assert answer.status_code == (403 if who == "node" else 401), (method, path)
            assert method == "HEAD" or list(answer.json()) == ["error"]


@pytest.mark.parametrize(
    "value", ["Basic dXNlcjpwYXNz", "Bearer", "Bearer ", "tla_x", "Bearer " + "x" * 10_000, "Bearer \xff\xfe"]
)
async def test_a_credential_that_is_none_is_refused(bench: Bench, value: str) -> None:
    answer = await bench.client.get("/api/v1/nodes", headers={"authorization": value.encode("latin-1")})  # type: ignore[dict-item]
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_nobody_is_heard_before_it_is_known_who_speaks(bench: Bench) -> None:
    async def unread() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    headers = {"authorization": "Bearer wrong"}
    answer = await bench.client.post("/api/v1/packages", content=unread(), headers=headers)
    assert answer.status_code == 401


async def test_a_nodes_token_is_shown_once_and_rotating_ends_the_old_one(bench: Bench) -> None:
    await bench.add_node("acme.edge-1")
    old = bench.tokens["acme.edge-1"]
    await bench.call("POST", "/api/v1/nodes", 409, json={"id": "acme.edge-1", "tier": "edge"})
    assert old not in (await bench.client.get("/api/v1/nodes/acme.edge-1")).text
    new = (await bench.call("POST", "/api/v1/nodes/acme.edge-1/token", 200))["token"]
    for token, status in ((old, 401), (new, 200)):
        await bench.call("GET", "/tuf/timestamp.json", status, headers={"authorization": f"Bearer {token}"})


async def test_no_token_lies_in_the_database_and_secret_files_are_private(bench: Bench) -> None:
    await bench.add_node("acme.edge-1")
    data = bench.hub.data
    stored = b"".join(path.read_bytes() for path in data.glob("hub.sqlite*"))
    assert bench.tokens["acme.edge-1"].encode() not in stored
    assert (data / "admin.token").read_bytes().strip() not in stored
    for path in (data / "admin.token", *(data / "keys").glob("*.key")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(data.stat().st_mode) == 0o700


async def test_the_broker_learns_users_rights_and_hashes_but_no_token(bench: Bench) -> None:
    body = {"id": "acme.edge-1", "tier": "edge", "groups": ["line-2"]}
    token = (await bench.call("POST", "/api/v1/nodes", 201, json=body))["token"]
    access = await bench.call("GET", "/api/v1/broker/access", 200)
    assert [user["id"] for user in access["users"]] == ["_hub-1", "acme.edge-1"]
    assert "user acme.edge-1\ntopic read tierline/v1/_t/acme/policy\n" in access["acl"]
    assert "topic read tierline/v1/_g/acme.line-2/policy" in access["acl"]
    assert access["passwords"].startswith("acme.edge-1:$7$101$")
    assert token not in str(access)


def test_two_hashes_of_one_password_share_nothing() -> None:
    assert broker_hash("secret").split("$")[3:] != broker_hash("secret").split("$")[3:]
