"""Asking a node's doctor over the API: its report, or clear words why there is none."""

from __future__ import annotations

import asyncio

import msgspec
from hub_in_memory import Bench

from sync.messages import encode
from sync.rpc import Answer, Call
from sync.topics import down, up

NODE = "acme.edge-1"
REPORT = {
    "about": "somebody else",
    "tier": "edge",
    "software": "0.1.0",
    "at": 5.0,
    "counts": {"ok": 99},
    "checks": [{"name": "disk.room", "status": "fail", "found": "full", "fix": "make room", "seconds": 0.1}],
    "later": "a field of another release",
}


async def answer(bench: Bench, **fields: object) -> None:
    """As the node would, once it is asked."""
    while not (asked := bench.broker.payloads(down(NODE, "rpc"))):
        await asyncio.sleep(0)
    call = msgspec.json.decode(asked[-1], type=Call)
    assert call.method == "doctor"
    bench.broker.publish(up(NODE, "rpc"), encode(Answer(id=call.id, **fields)))  # type: ignore[arg-type]


async def test_a_nodes_report_is_what_the_api_answers(bench: Bench) -> None:
    await bench.add_node(NODE)
    await bench.born(NODE)
    replying = asyncio.create_task(answer(bench, result=msgspec.Raw(msgspec.json.encode(REPORT))))
    found = await bench.call("POST", f"/api/v1/nodes/{NODE}/doctor", 200)
    await replying
    assert found["about"] == NODE
    assert found["counts"] == {"ok": 0, "warn": 0, "fail": 1, "skip": 0}
    assert found["checks"][0]["fix"] == "make room"


async def test_a_node_that_does_not_answer_is_told_with_what_is_known_of_it(bench: Bench) -> None:
    await bench.add_node(NODE)
    asking = asyncio.create_task(bench.call("POST", f"/api/v1/nodes/{NODE}/doctor", 503))
    while not bench.broker.payloads(down(NODE, "rpc")):
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)  # until it waits
    bench.clock.advance(6)
    assert (await asking)["error"] == "acme.edge-1 did not answer within 5 s: it was never seen here"


async def test_a_node_that_is_busy_or_says_nonsense_is_told(bench: Bench) -> None:
    await bench.add_node(NODE)
    replying = asyncio.create_task(answer(bench, code="busy", error="ask again"))
    assert "ask again" in (await bench.call("POST", f"/api/v1/nodes/{NODE}/doctor", 503))["error"]
    await replying
    bench.broker.log.clear()
    replying = asyncio.create_task(answer(bench, result=msgspec.Raw(b"[1]")))
    assert "no report" in (await bench.call("POST", f"/api/v1/nodes/{NODE}/doctor", 409))["error"]
    await replying


async def test_only_known_nodes_are_asked_and_only_by_the_admin(bench: Bench) -> None:
    await bench.call("POST", "/api/v1/nodes/acme.nobody/doctor", 404)
    await bench.add_node(NODE)
    theirs = {"authorization": f"Bearer {bench.tokens[NODE]}"}
    await bench.call("POST", f"/api/v1/nodes/{NODE}/doctor", 403, headers=theirs)
    assert not bench.broker.payloads(down(NODE, "rpc"))
