"""The nodes' own software at the hub: published as wheels, targeted by labels, signed for each node."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hub_in_memory import Bench, digest, hub_bench

from cloud_hub.keys import DOCUMENT_KINDS, open_keys
from cloud_hub.software_cli import software_of
from sync.messages import Envelope, decode
from sync.software import Software, Wheel, decode_software, encode_software
from sync.topics import down
from sync.trust import Keyring, decode_keyring, encode_keyring, verify

NODE = "acme.edge-1"


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with hub_bench(tmp_path) as bench:
        await bench.add_node(NODE, ring="canary")
        yield bench


async def put(bench: Bench, version: str) -> dict[str, Any]:
    content = b"wheel of " + version.encode()
    await bench.client.put(f"/api/v1/blobs/{digest(content)}", content=content)
    wheel = Wheel(f"tierline-{version}-py3-none-any.whl", digest(content), len(content))
    return dict(msgspec.to_builtins(Software(version, (wheel,))))


async def target(bench: Bench, name: str, version: str, expect: int = 201, **selector: str) -> Any:
    body = {"selector": selector, "version": version}
    return await bench.call("PUT", f"/api/v1/software/targets/{name}", expect, json=body)


def sent(bench: Bench, node: str = NODE) -> Software | None:
    envelope = bench.broker.retained.get(down(node, "software"))
    if envelope is None:
        return None
    keyring = decode_keyring((bench.hub.data / "keys" / "documents.json").read_bytes())
    document = verify(
        envelope, keyring, kind="software", scope=f"node:{node}", floor=0, now=bench.clock.wall()
    ).document
    software = decode_software(bytes(document.body))
    assert document.digests == tuple(sorted(wheel.digest for wheel in software.wheels))
    return software


async def test_a_version_reaches_the_nodes_that_a_target_names_and_nobody_else(bench: Bench) -> None:
    await bench.add_node("acme.edge-2")
    await bench.add_node("acme.phone", tier="device", ring="canary")
    await bench.call("POST", "/api/v1/software", 201, json=await put(bench, "0.2.0"))
    assert sent(bench) is None
    await target(bench, "canaries", "0.2.0", ring="canary")
    software = sent(bench)
    assert software is not None
    assert software.version == "0.2.0"
    assert sent(bench, "acme.edge-2") is None
    assert sent(bench, "acme.phone") is None


async def test_its_wheels_are_approved_files_until_it_is_withdrawn(bench: Bench) -> None:
    body = await put(bench, "0.2.0")
    await bench.call("POST", "/api/v1/software", 201, json=body)
    wheel = body["wheels"][0]["digest"]
    with bench.hub.storage.read() as records:
        assert wheel in records.approved_files()
    await bench.call("POST", "/api/v1/software/versions/0.2.0/unapprove", 204)
    with bench.hub.storage.read() as records:
        assert wheel not in records.approved_files()
    await target(bench, "all", "0.2.0", expect=400)
    await bench.call("POST", "/api/v1/software", 409, json=body)
    listed = await bench.call("GET", "/api/v1/software", 200)
    assert [(entry["version"], entry["withdrawn"]) for entry in listed["items"]] == [("0.2.0", True)]


async def test_a_version_that_is_targeted_is_not_withdrawn(bench: Bench) -> None:
    await bench.call("POST", "/api/v1/software", 201, json=await put(bench, "0.2.0"))
    await target(bench, "all", "0.2.0")
    answer = await bench.call("POST", "/api/v1/software/versions/0.2.0/unapprove", 409)
    assert "'all'" in answer["error"]
    await bench.call("POST", "/api/v1/software/versions/0.9/unapprove", 404)


async def test_the_more_specific_target_decides_and_a_tie_is_refused(bench: Bench) -> None:
    for version in ("0.2.0", "0.3.0"):
        await bench.call("POST", "/api/v1/software", 201, json=await put(bench, version))
    await target(bench, "all", "0.2.0")
    await target(bench, "canaries", "0.3.0", ring="canary")
    software = sent(bench)
    assert software is not None
    assert software.version == "0.3.0"
    answer = await target(bench, "other", "0.2.0", expect=409, tier="edge")
    assert "other" in answer["error"]
    listed = await bench.call("GET", "/api/v1/software/targets", 200)
    assert [entry["name"] for entry in listed["items"]] == ["all", "canaries"]


async def test_a_target_that_goes_takes_nothing_from_a_node(bench: Bench) -> None:
    await bench.call("POST", "/api/v1/software", 201, json=await put(bench, "0.2.0"))
    await target(bench, "all", "0.2.0")
    before = bench.broker.retained[down(NODE, "software")]
    await bench.call("DELETE", "/api/v1/software/targets/all", 204)
    await bench.call("DELETE", "/api/v1/software/targets/all", 404)
    assert bench.broker.retained[down(NODE, "software")] == before


async def test_a_node_that_comes_later_gets_it_too(bench: Bench) -> None:
    await bench.call("POST", "/api/v1/software", 201, json=await put(bench, "0.2.0"))
    await target(bench, "all", "0.2.0")
    await bench.add_node("acme.edge-9")
    await bench.born("acme.edge-9")
    node = await bench.call("GET", "/api/v1/nodes/acme.edge-9", 200)
    assert node["documents"]["software"]["revision"] == 1


async def test_the_same_version_with_other_files_is_a_conflict_and_with_the_same_ones_is_not(bench: Bench) -> None:
    body = await put(bench, "0.2.0")
    await bench.call("POST", "/api/v1/software", 201, json=body)
    await bench.call("POST", "/api/v1/software", 200, json=body)
    other = await put(bench, "0.2.0+other")
    wheel = {**other["wheels"][0], "name": "tierline-0.2.0-py3-none-any.whl"}
    await bench.call("POST", "/api/v1/software", 409, json={"version": "0.2.0", "wheels": [wheel]})


async def test_a_wheel_that_was_not_uploaded_or_has_another_size_is_named(bench: Bench) -> None:
    body = await put(bench, "0.2.0")
    wheel = body["wheels"][0]
    missing = {**wheel, "digest": "sha256:" + "0" * 64}
    answer = await bench.call("POST", "/api/v1/software", 400, json={**body, "wheels": [missing]})
    assert "wheels[0]" in answer["error"]
    assert "has not been uploaded" in answer["error"]
    answer = await bench.call("POST", "/api/v1/software", 400, json={**body, "wheels": [{**wheel, "size": 1}]})
    assert "wheels[0]" in answer["error"]
    await bench.call("POST", "/api/v1/software", 400, json={"version": "0.2.0", "wheels": []})
    await bench.call("POST", "/api/v1/software", 413, content=b" " * 70_000)


def test_a_hub_from_before_software_extends_what_its_key_may_sign(tmp_path: Path) -> None:
    keys = open_keys(tmp_path)
    old = Keyring((keys.documents.key("desired", "policy", "settings"),))
    (tmp_path / "keys" / "documents.json").write_bytes(encode_keyring(old))
    assert open_keys(tmp_path).keyring().keys[0].kinds == DOCUMENT_KINDS


def test_files_become_a_version_by_their_names_and_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / "tierline-0.2.0-py3-none-any.whl", tmp_path / "msgspec-0.19.0-cp311-cp311-linux_x86_64.whl"]
    for path in paths:
        path.write_bytes(path.name.encode())
    software = software_of(paths)
    assert software.version == "0.2.0"
    assert decode_software(encode_software(software)) == software
    assert json.loads(encode_software(software))["wheels"][0]["digest"] == digest(paths[0].name.encode())


async def test_the_document_is_signed_again_with_its_digests(bench: Bench) -> None:
    await bench.call("POST", "/api/v1/software", 201, json=await put(bench, "0.2.0"))
    await target(bench, "all", "0.2.0")
    with bench.hub.storage.write() as records:
        again = bench.hub.documents.again(records, "software", f"node:{NODE}")
    assert json.loads(decode(again.envelope, Envelope).payload)["digests"]
