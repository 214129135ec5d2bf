"""Every node gets its newest documents, whatever the broker forgets and whatever nodes say."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hub_bench import Bench, eventually

from cloud_hub.documents import MAX_REVISION_JUMP, burnt_revision, must_resend
from cloud_hub.publisher import RESEND_SECONDS, hub_will
from cloud_hub.rollout import Standing
from sync.channel import Message
from sync.messages import Capabilities, DocumentReport, Envelope, HubState
from sync.topics import HUB_STATE, up

DESIRED = "tierline/v1/acme.edge-1/down/desired"
POLICY = "tierline/v1/_t/acme/policy"


async def with_a_node(bench: Bench) -> None:
    await bench.publish()
    await bench.add_node("acme.edge-1")
    await bench.deploy("edges", {"digits": "digits-cnn/1"})


def revision_of(envelope: bytes) -> int:
    return int(msgspec.json.decode(msgspec.json.decode(envelope, type=Envelope).payload)["revision"])


async def test_the_hub_says_that_it_is_here_and_under_which_epoch(bench: Bench) -> None:
    await eventually(lambda: HUB_STATE in bench.broker.retained)
    said = msgspec.json.decode(bench.broker.retained[HUB_STATE], type=HubState)
    assert (said.state, said.epoch) == ("ready", "e1")
    assert msgspec.json.decode(hub_will("e1").payload, type=HubState).state == "lost"


async def test_a_broker_that_forgot_everything_is_told_everything_again(bench: Bench) -> None:
    await with_a_node(bench)
    await bench.call("PUT", "/api/v1/policies/acme", 200, json={"rules": []})
    before = dict(bench.broker.retained)
    await eventually(lambda: HUB_STATE in bench.broker.retained)
    bench.link.drop()
    bench.broker.forget()
    bench.link.heal()
    await eventually(lambda: {HUB_STATE, DESIRED, POLICY} <= set(bench.broker.retained))
    assert {topic: bench.broker.retained[topic] for topic in (DESIRED, POLICY)} == {
        topic: before[topic] for topic in (DESIRED, POLICY)
    }


async def test_what_changes_while_the_broker_is_away_arrives_when_it_is_back(bench: Bench) -> None:
    await with_a_node(bench)
    await bench.publish(version="2")
    bench.link.drop()
    await bench.deploy("edges", {"digits": "digits-cnn/2"}, expect=200)
    assert len(bench.broker.payloads(DESIRED)) == 1
    bench.link.heal()
    await eventually(lambda: revision_of(bench.broker.retained[DESIRED]) == 2)


async def test_a_node_that_is_born_with_an_old_revision_is_sent_the_newest(bench: Bench) -> None:
    await with_a_node(bench)
    bench.clock.advance(RESEND_SECONDS)
    await bench.reports("acme.edge-1", revision=0, applied=0)
    await eventually(lambda: len(bench.broker.payloads(DESIRED)) == 2)
    first, second = bench.broker.payloads(DESIRED)
    assert first == second


async def test_a_node_that_keeps_reporting_an_old_revision_is_not_flooded(bench: Bench) -> None:
    await with_a_node(bench)
    for _ in range(5):
        await bench.reports("acme.edge-1", revision=0, applied=0)
    assert len(bench.broker.payloads(DESIRED)) == 1
    bench.clock.advance(2 * RESEND_SECONDS)
    await bench.reports("acme.edge-1", revision=0, applied=0)
    await eventually(lambda: len(bench.broker.payloads(DESIRED)) == 2)


async def test_what_a_node_has_seen_and_refused_is_not_sent_again(bench: Bench) -> None:
    await with_a_node(bench)
    bench.clock.advance(10 * RESEND_SECONDS)
    await bench.reports("acme.edge-1", revision=1, applied=0, state="refused", error="rejected: golden outputs differ")
    assert len(bench.broker.payloads(DESIRED)) == 1
    node = await bench.call("GET", "/api/v1/nodes/acme.edge-1", 200)
    assert (node["documents"]["desired"]["sync"], node["in_sync"]) == ("refused", False)
    deployment = await bench.call("GET", "/api/v1/deployments/edges", 200)
    assert deployment["progress"]["refused"] == 1
    assert deployment["nodes"] == [
        {"node": "acme.edge-1", "sync": "refused", "reason": "rejected: golden outputs differ"}
    ]


async def test_a_hub_restored_from_a_backup_goes_above_what_nodes_have_seen(bench: Bench) -> None:
    await with_a_node(bench)
    await bench.reports("acme.edge-1", revision=7, applied=7, digest="sha256:" + "0" * 64)
    await eventually(lambda: revision_of(bench.broker.retained[DESIRED]) == 8)
    await bench.publish(version="2")
    await bench.deploy("edges", {"digits": "digits-cnn/2"}, expect=200)
    assert revision_of(bench.broker.retained[DESIRED]) == 9


async def test_a_claim_beyond_belief_burns_no_revisions(bench: Bench) -> None:
    await with_a_node(bench)
    await bench.reports("acme.edge-1", revision=2**52, applied=2**52)
    assert revision_of(bench.broker.retained[DESIRED]) == 1


@pytest.mark.parametrize(
    ("report", "resend", "burnt"),
    [
        (None, True, None),
        (DocumentReport(revision=2, applied=2, state="idle"), True, None),
        (DocumentReport(revision=3, applied=3, state="idle", digest="d3"), False, None),
        (DocumentReport(revision=3, applied=3, state="idle", digest="other"), False, 3),
        (DocumentReport(revision=5, applied=4, state="idle"), False, 5),
        (DocumentReport(revision=3 + MAX_REVISION_JUMP + 1, applied=3, state="idle"), False, None),
    ],
)
def test_what_to_send_follows_from_what_is_wanted_and_reported(
    report: DocumentReport | None, resend: bool, burnt: int | None
) -> None:
    standing = Standing(3, "d3", report)
    assert (must_resend(standing), burnt_revision(standing)) == (resend, burnt)


async def test_of_two_racing_revisions_the_broker_keeps_the_newer(bench: Bench) -> None:
    await with_a_node(bench)
    with bench.hub.storage.read() as records:
        old = records.document("desired", "node:acme.edge-1")
    assert old is not None
    newer = msgspec.structs.replace(old, revision=2, envelope=b"newer")
    bench.hub.publisher.send([newer])
    bench.hub.publisher.send([old])
    assert bench.broker.retained[DESIRED] == b"newer"


async def test_policies_set_at_the_same_time_each_get_a_revision_and_the_last_one_stays(bench: Bench) -> None:
    calls = [bench.call("PUT", "/api/v1/policies/acme", 200, json={"description": str(number)}) for number in range(20)]
    answers = await asyncio.gather(*calls)
    assert sorted(answer["revision"] for answer in answers) == list(range(1, 21))
    assert revision_of(bench.broker.retained[POLICY]) == 20


async def test_a_node_is_in_sync_when_it_reports_what_is_wanted(bench: Bench) -> None:
    await with_a_node(bench)
    await bench.born("acme.edge-1")
    await bench.says("acme.edge-1", "caps", Capabilities(tier="edge", engines=("onnx",), url="http://127.0.0.1:1"))
    await bench.reports("acme.edge-1", revision=1, applied=1)
    node = await bench.call("GET", "/api/v1/nodes/acme.edge-1", 200)
    assert (node["state"], node["in_sync"], node["capabilities"]["engines"]) == ("ready", True, ["onnx"])
    assert node["documents"]["desired"] | {"error": None} == {
        "revision": 1,
        "reported": 1,
        "applied": 1,
        "state": "idle",
        "sync": "in_sync",
        "error": None,
    }


@pytest.mark.parametrize(
    ("topic", "payload", "counter"),
    [
        (up("acme.edge-1", "state"), b"\xff\x00garbage", "garbage"),
        (up("acme.edge-1", "state"), b'{"state":"dancing"}', "garbage"),
        (up("acme.edge-1", "reported"), b"[" * 60_000, "garbage"),
        (up("acme.edge-1", "reported"), b'{"boot":"b","seq":1,"documents":{"desired":7}}', "garbage"),
        (up("acme.edge-1", "reported"), b"x" * 70_000, "garbage"),
        (up("acme.edge-1", "caps"), b"{}", "garbage"),
        ("tierline/v1/acme.edge-1/up/nonsense", b"{}", "garbage"),
        ("tierline/v1/../up/state", b"{}", "garbage"),
        (up("acme.stranger", "state"), b'{"state":"ready"}', "unknown"),
        (up("acme.edge-1", "event"), b"{}", "event"),
    ],
)
async def test_garbage_and_strangers_are_counted_and_harm_nothing(
    bench: Bench, topic: str, payload: bytes, counter: str
) -> None:
    await bench.add_node("acme.edge-1")
    bench.hub.fleet.hear(Message(topic, payload))
    assert bench.hub.fleet.counts[counter] == 1
    await bench.born("acme.edge-1")
    assert (await bench.call("GET", "/api/v1/nodes/acme.edge-1", 200))["state"] == "ready"


async def test_a_failing_database_stops_no_loop_and_loses_no_report(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.add_node("acme.edge-1")

    def broken(_batch: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(bench.hub.fleet, "_store", broken)
    bench.broker.publish(up("acme.edge-1", "state"), b'{"state":"ready"}')
    await eventually(lambda: bench.clock.sleepers > 0)
    monkeypatch.undo()
    bench.clock.advance(10)
    await eventually(lambda: bench.hub.fleet.counts["stored"] == 1)
    assert (await bench.call("GET", "/api/v1/nodes/acme.edge-1", 200))["state"] == "ready"


async def test_the_hub_says_that_it_stops(bench: Bench) -> None:
    bench.hub.publisher.leave()
    assert msgspec.json.decode(bench.broker.retained[HUB_STATE], type=HubState).state == "disconnected"
