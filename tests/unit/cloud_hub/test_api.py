"""The management API: what it keeps, what it refuses, and in which words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hub_in_memory import Bench, digest, make_manifest

from cloud_hub.app import create_app
from cloud_hub.gate import MAX_BODY_BYTES
from cloud_hub.hub import open_hub
from models.desired import decode_desired
from models.manifest import encode_manifest
from sync.messages import MAX_MESSAGE_BYTES
from sync.testing import MemoryBroker, MemoryLink
from sync.trust import decode_keyring, verify

METADATA = re.compile(r"sha256/([0-9a-f]{64})")


async def approved(bench: Bench) -> dict[str, int]:
    """Digest -> size of every file that the update repository lists, read as a client would follow it."""
    timestamp = (await bench.client.get("/tuf/timestamp.json")).json()["signed"]
    version = timestamp["meta"]["snapshot.json"]["version"]
    snapshot = (await bench.client.get(f"/tuf/{version}.snapshot.json")).json()["signed"]
    found = {}
    for name, meta in snapshot["meta"].items():
        targets = (await bench.client.get(f"/tuf/{meta['version']}.{name}")).json()["signed"]["targets"]
        for target, file in targets.items():
            if (match := METADATA.fullmatch(target)) is not None:
                found[f"sha256:{match[1]}"] = file["length"]
    return found


POLICY = {"rules": [{"model": "digits", "min_confidence": 0.9}]}


async def test_a_published_package_is_listed_and_every_file_of_it_is_approved(bench: Bench) -> None:
    manifest = await bench.publish()
    (entry,) = (await bench.call("GET", "/api/v1/packages", 200))["items"]
    assert (entry["package"], entry["version"], entry["manifest"]) == ("digits-cnn", "1", manifest)
    detail = await bench.call("GET", "/api/v1/packages/digits-cnn/1", 200)
    assert set(detail["files"]) == {manifest, digest(b"golden"), digest(b"model 1")}
    assert await approved(bench) == detail["files"]


async def test_a_version_is_immutable_and_publishing_it_again_changes_nothing(bench: Bench) -> None:
    await bench.publish()
    before = (await bench.client.get("/tuf/timestamp.json")).content
    same = make_manifest("digits-cnn", "1", b"golden", b"model 1")
    await bench.call("POST", "/api/v1/packages", 200, content=encode_manifest(same))
    # The very same meaning in other bytes is another manifest: the bytes are what is signed.
    answer = await bench.call("POST", "/api/v1/packages", 409, content=msgspec.json.encode(same))
    assert "publish a new version" in answer["error"]
    assert (await bench.client.get("/tuf/timestamp.json")).content == before


async def test_a_version_found_bad_is_withdrawn_for_good_once_nothing_uses_it(bench: Bench) -> None:
    await bench.publish()
    await bench.publish(version="2")
    await bench.deploy("edges", {"digits": "digits-cnn/1"})
    path = "/api/v1/packages/digits-cnn/1/unapprove"
    answer = await bench.call("POST", path, 409)
    assert "edges" in answer["error"]
    await bench.deploy("edges", {"digits": "digits-cnn/2"}, expect=200)
    await bench.call("POST", path, 204)
    files = await approved(bench)
    assert digest(b"model 1") not in files
    assert {digest(b"golden"), digest(b"model 2")} <= set(files)  # what version 2 needs too stays
    await bench.deploy("edges", {"digits": "digits-cnn/1"}, expect=400)
    same = make_manifest("digits-cnn", "1", b"golden", b"model 1")
    await bench.call("POST", "/api/v1/packages", 409, content=encode_manifest(same))
    await bench.call("POST", "/api/v1/packages/digits-cnn/9/unapprove", 404)


async def test_a_package_whose_files_are_missing_or_of_another_size_is_refused(bench: Bench) -> None:
    manifest = make_manifest("digits-cnn", "1", b"golden", b"model 1")
    answer = await bench.call("POST", "/api/v1/packages", 422, content=encode_manifest(manifest))
    assert answer["error"].startswith("golden: sha256:")
    for content in (b"golden", b"model 1"):
        await bench.call("PUT", f"/api/v1/blobs/{digest(content)}", 201, content=content)
    lying = msgspec.json.decode(encode_manifest(manifest))
    lying["variants"][0]["blob"]["size"] = 8
    answer = await bench.call("POST", "/api/v1/packages", 422, json=lying)
    assert answer["error"].startswith("variants[0].blob: ")
    assert (await bench.call("GET", "/api/v1/packages", 200))["items"] == []


async def test_packages_come_in_pages(bench: Bench) -> None:
    for version in ("1", "2", "3"):
        await bench.publish(version=version)
    first = await bench.call("GET", "/api/v1/packages?limit=2", 200)
    rest = await bench.call("GET", "/api/v1/packages", 200, params={"limit": 2, "after": first["next"]})
    assert [entry["version"] for entry in first["items"] + rest["items"]] == ["1", "2", "3"]
    assert rest["next"] is None


async def test_a_deployment_reaches_the_nodes_it_selects_and_no_other(bench: Bench) -> None:
    manifest = await bench.publish()
    await bench.add_node("acme.edge-1", line="2")
    await bench.add_node("acme.cloud-1", "cloud")
    answer = await bench.deploy("edges", {"digits": "digits-cnn/1"}, tier="edge")
    assert answer["progress"] == {"total": 1, "in_sync": 0, "pending": 1, "applying": 0, "refused": 0, "stale": 0}
    (envelope,) = bench.broker.payloads("tierline/v1/acme.edge-1/down/desired")
    assert bench.broker.payloads("tierline/v1/acme.cloud-1/down/desired") == []
    keyring = decode_keyring((bench.hub.data / "keys" / "documents.json").read_bytes())
    now = bench.clock.wall()
    document = verify(envelope, keyring, kind="desired", scope="node:acme.edge-1", floor=0, now=now).document
    assigned = decode_desired(bytes(document.body)).models["digits"]
    assert (assigned.package, assigned.version, assigned.manifest.digest) == ("digits-cnn", "1", manifest)
    assert set(document.digests) == {manifest, digest(b"golden"), digest(b"model 1")}


async def test_a_revision_is_spent_only_when_a_nodes_models_change(bench: Bench) -> None:
    await bench.publish()
    await bench.publish(version="2")
    await bench.add_node("acme.edge-1")
    await bench.deploy("edges", {"digits": "digits-cnn/1"}, tier="edge")
    await bench.deploy("edges", {"digits": "digits-cnn/1"}, tier="edge", expect=200)
    node = await bench.call("GET", "/api/v1/nodes/acme.edge-1", 200)
    assert node["documents"]["desired"]["revision"] == 1
    await bench.deploy("edges", {"digits": "digits-cnn/2"}, tier="edge", expect=200)
    node = await bench.call("GET", "/api/v1/nodes/acme.edge-1", 200)
    assert (node["documents"]["desired"]["revision"], node["desired"]) == (2, {"digits": "digits-cnn/2"})


async def test_removing_a_deployment_takes_its_models_off_the_nodes(bench: Bench) -> None:
    await bench.publish()
    await bench.add_node("acme.edge-1")
    await bench.deploy("edges", {"digits": "digits-cnn/1"})
    await bench.call("DELETE", "/api/v1/deployments/edges", 204)
    await bench.call("DELETE", "/api/v1/deployments/edges", 404)
    node = await bench.call("GET", "/api/v1/nodes/acme.edge-1", 200)
    assert (node["desired"], node["documents"]["desired"]["revision"]) == ({}, 2)
    assert len(bench.broker.payloads("tierline/v1/acme.edge-1/down/desired")) == 2


async def test_a_tie_is_refused_and_leaves_no_deployment_behind(bench: Bench) -> None:
    await bench.publish()
    await bench.add_node("acme.edge-1", line="2")
    await bench.deploy("a", {"digits": "digits-cnn/1"}, tier="edge")
    answer = await bench.deploy("b", {"digits": "digits-cnn/1"}, expect=409, line="2")
    assert "'a' and 'b'" in answer["error"]
    assert [entry["name"] for entry in (await bench.call("GET", "/api/v1/deployments", 200))["items"]] == ["a"]


async def test_a_node_that_would_be_tied_is_not_registered(bench: Bench) -> None:
    await bench.publish()
    await bench.deploy("a", {"digits": "digits-cnn/1"}, tier="edge")
    await bench.deploy("b", {"digits": "digits-cnn/1"}, line="2")
    body = {"id": "acme.edge-1", "tier": "edge", "labels": {"line": "2"}}
    await bench.call("POST", "/api/v1/nodes", 409, json=body)
    assert (await bench.call("GET", "/api/v1/nodes", 200))["items"] == []


async def test_a_list_of_models_that_no_message_can_carry_is_refused_whole(bench: Bench) -> None:
    await bench.publish()
    await bench.add_node("acme.edge-1")
    answer = await bench.deploy("many", {f"m{index}": "digits-cnn/1" for index in range(128)}, expect=413)
    assert str(MAX_MESSAGE_BYTES) in answer["error"]
    assert (await bench.call("GET", "/api/v1/deployments", 200))["items"] == []


async def test_the_models_list_says_who_serves_a_name_with_what(bench: Bench) -> None:
    await bench.publish()
    await bench.deploy("edges", {"digits": "digits-cnn/1"}, tier="edge")
    (model,) = (await bench.call("GET", "/api/v1/models", 200))["items"]
    assert model["model"] == "digits"
    assert model["uses"][0] | {"tenant": "*"} == {
        "deployment": "edges",
        "tenant": "*",
        "selector": {"tier": "edge"},
        "package": "digits-cnn",
        "version": "1",
    }


async def test_a_policy_is_signed_for_its_tenant_and_published_by_the_time_of_the_answer(bench: Bench) -> None:
    answer = await bench.call("PUT", "/api/v1/policies/acme", 200, json=POLICY)
    assert answer == {"tenant": "acme", "revision": 1}
    (envelope,) = bench.broker.payloads("tierline/v1/_t/acme/policy")
    keyring = decode_keyring((bench.hub.data / "keys" / "documents.json").read_bytes())
    now = bench.clock.wall()
    body = verify(envelope, keyring, kind="policy", scope="tenant:acme", floor=0, now=now).document.body
    assert msgspec.json.decode(body)["rules"][0]["min_confidence"] == 0.9
    again = await bench.call("PUT", "/api/v1/policies/acme", 200, content=msgspec.json.encode(POLICY) + b"\n")
    assert again["revision"] == 1
    stored = await bench.call("GET", "/api/v1/policies/acme", 200)
    assert (stored["revision"], stored["policy"]["rules"][0]["model"]) == (1, "digits")
    await bench.call("GET", "/api/v1/policies/globex", 404)


async def test_the_hub_keeps_everything_across_a_restart(bench: Bench, tmp_path: Path) -> None:
    await bench.publish()
    await bench.add_node("acme.edge-1")
    await bench.deploy("edges", {"digits": "digits-cnn/1"})
    await bench.call("PUT", "/api/v1/policies/acme", 200, json=POLICY)
    paths = [
        "/api/v1/packages",
        "/api/v1/deployments",
        "/api/v1/nodes/acme.edge-1",
        "/api/v1/policies/acme",
        "/tuf/timestamp.json",
    ]
    before = [(await bench.client.get(path)).content for path in paths]
    root = (bench.hub.data / "root.json").read_bytes()
    token = (bench.hub.data / "admin.token").read_text()
    bench.hub.storage.close()
    async with (
        MemoryLink(MemoryBroker()) as link,
        open_hub(bench.hub.data, link, epoch="e2", clock=bench.clock) as hub,
        httpx.AsyncClient(transport=httpx.ASGITransport(create_app(hub)), base_url="http://hub") as client,
    ):
        headers = {"authorization": f"Bearer {token.strip()}"}
        assert [(await client.get(path, headers=headers)).content for path in paths] == before
        assert (hub.data / "root.json").read_bytes() == hub.root == root
        assert hub.first_run is False


BAD_REQUESTS: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("PUT", "/api/v1/blobs/sha256:short", {"content": b"x"}, 400, "sha256:short"),
    ("PUT", f"/api/v1/blobs/{digest(b'y')}", {"content": b"x"}, 400, "not sha256:"),
    ("PUT", f"/api/v1/blobs/{digest(b'')}", {"content": b""}, 400, "empty"),
    (
        "PUT",
        f"/api/v1/blobs/{digest(b'y')}",
        {"content": b"x", "headers": {"content-length": "9" * 18}},
        413,
        "more than",
    ),
    ("POST", "/api/v1/packages", {"content": b"not json"}, 422, "manifest"),
    ("POST", "/api/v1/packages", {"content": b"[" * 100_000}, 422, "manifest"),
    ("POST", "/api/v1/packages", {"json": {"package": "a"}}, 422, "version"),
    ("POST", "/api/v1/packages", {"content": b"x" * (MAX_BODY_BYTES + 1)}, 413, "more than"),
    ("GET", "/api/v1/packages?limit=0", {}, 400, "query.limit"),
    ("GET", "/api/v1/packages?limit=100000", {}, 400, "query.limit"),
    ("GET", "/api/v1/packages?after=x", {}, 400, "package/version"),
    ("GET", "/api/v1/packages/none/1", {}, 404, "none/1"),
    ("PUT", "/api/v1/deployments/Not%20A%20Name", {"json": {"selector": {}, "models": {"a": "b/1"}}}, 400, "path.name"),
    ("PUT", "/api/v1/deployments/d", {"json": {"selector": {}, "models": {}}}, 400, "body.models"),
    ("PUT", "/api/v1/deployments/d", {"json": {"selector": {}, "models": {"a": "b"}}}, 400, "models.a"),
    ("PUT", "/api/v1/deployments/d", {"json": {"selector": {}, "models": {"a": "b/1"}}}, 400, "models.a: package b/1"),
    ("PUT", "/api/v1/deployments/d", {"json": {"selector": {}, "models": {"a/b": "b/1"}}}, 400, "'a/b'"),
    (
        "PUT",
        "/api/v1/deployments/d",
        {"json": {"selector": {"tier": 1}, "models": {"a": "b/1"}}},
        400,
        "body.selector.tier",
    ),
    ("PUT", "/api/v1/deployments/d", {"json": {"selector": {}, "models": {"a": "b/1"}, "waves": 1}}, 400, "body.waves"),
    ("PUT", "/api/v1/deployments/d", {"content": b"{"}, 400, "body"),
    ("GET", "/api/v1/deployments/none", {}, 404, "none"),
    ("PUT", "/api/v1/policies/acme", {"json": {"rules": [{"prefer": "moon"}]}}, 422, "rules[0].prefer"),
    ("PUT", "/api/v1/policies/acme", {"json": {"rulez": []}}, 422, "rulez"),
    ("PUT", "/api/v1/policies/Acme", {"json": {"rules": []}}, 400, "path.tenant"),
    ("PUT", "/api/v1/policies/acme", {"json": {"description": "x" * 60_000}}, 413, "one message"),
    ("POST", "/api/v1/nodes", {"json": {"id": "edge-1", "tier": "edge"}}, 400, "tenant.node"),
    ("POST", "/api/v1/nodes", {"json": {"id": "_hub.x", "tier": "edge"}}, 400, "tenant.node"),
    ("POST", "/api/v1/nodes", {"json": {"id": "a.b", "tier": "moon"}}, 400, "body.tier"),
    ("POST", "/api/v1/nodes", {"json": {"id": "a.b", "tier": "edge", "labels": {"tier": "cloud"}}}, 400, "labels.tier"),
    ("POST", "/api/v1/nodes", {"json": {"id": "a.b", "tier": "edge", "groups": ["A"]}}, 400, "body.groups.0"),
    ("POST", "/api/v1/nodes", {"json": {"id": "a.b", "tier": "edge", "admin": True}}, 400, "body.admin"),
    ("GET", "/api/v1/nodes/a.none", {}, 404, "a.none"),
    ("POST", "/api/v1/nodes/a.none/token", {}, 404, "a.none"),
    ("GET", f"/blobs/{digest(b'none')}", {}, 404, "no blob"),
    ("GET", "/blobs/..%2Fhub.sqlite", {}, 404, ""),
    ("GET", "/api/v1/nowhere", {}, 404, "Not Found"),
    ("PATCH", "/api/v1/nodes", {}, 405, "Not Allowed"),
]


@pytest.mark.parametrize(("method", "path", "request_", "status", "text"), BAD_REQUESTS)
async def test_a_bad_request_is_answered_with_its_reason(
    bench: Bench, method: str, path: str, request_: dict[str, Any], status: int, text: str
) -> None:
    answer = await bench.call(method, path, status, **request_)
    assert list(answer) == ["error"]
    assert text in answer["error"]


async def test_our_own_fault_is_told_without_what_is_inside(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(bench.hub.storage, "read", broken)
    transport = httpx.ASGITransport(create_app(bench.hub), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://hub", headers=bench.client.headers) as client:
        answer = await client.get("/api/v1/nodes")
    assert (answer.status_code, answer.json()) == (500, {"error": "internal error"})


async def test_the_description_names_errors_and_the_bodies_that_are_signed(bench: Bench) -> None:
    document = (await bench.client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert {"Manifest", "Policy", "Rule", "ErrorBody", "NodeDetail"} <= set(schemas)
    assert "HTTPValidationError" not in str(document["paths"])
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["description"]


async def test_health_is_open_and_shows_whether_the_broker_is_there(bench: Bench) -> None:
    assert await bench.call("GET", "/healthz", 200) == {"status": "ok"}
    assert await bench.call("GET", "/readyz", 200) == {"ready": True, "broker": True}
    bench.link.drop()
    assert await bench.call("GET", "/readyz", 200) == {"ready": True, "broker": False}
    bench.link.heal()
