"""Every node gets its newest documents, whatever the broker forgets and whatever nodes say."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hub_in_memory import Bench, eventually, settle

from cloud_hub.documents import MAX_REVISION_JUMP, burnt_revision, must_resend
from cloud_hub.fleet import YIELD_EVERY
from cloud_hub.publisher import MAX_WAIT_SECONDS, RESEND_SECONDS, hub_will
from cloud_hub.rollout import Standing
from sync.channel import Message
from sync.messages import Capabilities, DocumentReport, Envelope, HubState, State, encode
from sync.topics import HUB_STATE, up

DESIRED = "tierline/v1/acme.edge-1/down/desired"
POLICY = "tierline/v1/_t/acme/policy"


async def with_a_node(bench: Bench) -> None:
    await bench.publish()
    await bench.add_node("acme.edge-1")
    await bench.deploy("edges", {"digits": "digits-cnn/1"})


def revision_of(envelope: bytes) -> int:
    return int(msgspec.json.decode(msgspec.json.decode(envelope, type=Envelope).payload)["revision"])


async def later(bench: Bench, seconds: float) -> None:
    """Let time pass, and the publisher do what is due by then."""
    bench.clock.advance(seconds)
    bench.hub.publisher.heard([])
    for _ in range(4):
        await settle()


async def published(bench: Bench, topic: str, times: int) -> None:
    await eventually(lambda: len(bench.broker.payloads(topic)) >= times)
    assert len(bench.broker.payloads(topic)) == times


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


async def test_a_lost_publish_is_repeated_until_a_report_shows_the_revision(bench: Bench) -> None:
    await bench.publish()
    await bench.add_node("acme.edge-1")
    await bench.born("acme.edge-1")
    await bench.deploy("edges", {"digits": "digits-cnn/1"})
    await bench.call("PUT", "/api/v1/policies/acme", 200, json={"rules": []})
    for times in (2, 3):
        await later(bench, 4 * RESEND_SECONDS)
        await published(bench, DESIRED, times)
        await published(bench, POLICY, times)
    await bench.reports("acme.edge-1", revision=1, applied=1)
    for _ in range(3):
        await later(bench, 2 * MAX_WAIT_SECONDS)
    await eventually(lambda: len(bench.broker.payloads(POLICY)) > 3)
    assert len(bench.broker.payloads(DESIRED)) == 3


async def test_a_node_that_never_answers_is_sent_the_same_ever_more_rarely(bench: Bench) -> None:
    await with_a_node(bench)
    await bench.born("acme.edge-1")
    for _ in range(30):
        await later(bench, RESEND_SECONDS)
    assert 4 <= len(bench.broker.payloads(DESIRED)) <= 8


async def test_nothing_is_repeated_for_a_node_that_is_away(bench: Bench) -> None:
    await with_a_node(bench)
    await bench.says("acme.edge-1", "state", State(state="lost"))
    await later(bench, 2 * RESEND_SECONDS)
    await published(bench, DESIRED, 2)
    for _ in range(5):
        await later(bench, 2 * RESEND_SECONDS)
    assert len(bench.broker.payloads(DESIRED)) == 2


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


async def test_a_restored_hub_that_issues_a_refused_revision_again_goes_above_it(bench: Bench) -> None:
    await with_a_node(bench)
    error = "replayed: revision 1 was already accepted with other contents"
    await bench.reports("acme.edge-1", revision=1, applied=0, state="refused", error=error)
    await eventually(lambda: revision_of(bench.broker.retained[DESIRED]) == 2)


async def test_one_nodes_claims_cannot_make_the_hub_re_sign_its_tenants_policy_without_limit(bench: Bench) -> None:
    await bench.add_node("acme.edge-1")
    await bench.call("PUT", "/api/v1/policies/acme", 200, json={"rules": []})
    await bench.reports("acme.edge-1", "policy", revision=1_000, applied=0)
    await eventually(lambda: revision_of(bench.broker.retained[POLICY]) == 1_001)
    for claim in range(20):
        await bench.reports("acme.edge-1", "policy", revision=2_000 + claim, applied=0)
    await settle()
    assert revision_of(bench.broker.retained[POLICY]) == 1_001
    for claim in range(30):
        await later(bench, RESEND_SECONDS)
        await bench.reports("acme.edge-1", "policy", revision=1_000 * (claim + 100), applied=0)
    assert len(set(bench.broker.payloads(POLICY))) <= 7


async def test_a_claim_that_came_too_early_is_looked_at_again_without_a_new_report(bench: Bench) -> None:
    await with_a_node(bench)
    await bench.born("acme.edge-1")
    await later(bench, 2 * RESEND_SECONDS)
    await bench.reports("acme.edge-1", revision=7, applied=7)
    await eventually(lambda: revision_of(bench.broker.retained[DESIRED]) == 8)
    await bench.reports("acme.edge-1", revision=9, applied=9)
    assert revision_of(bench.broker.retained[DESIRED]) == 8
    await later(bench, RESEND_SECONDS)
    await eventually(lambda: revision_of(bench.broker.retained[DESIRED]) == 10)


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
        (DocumentReport(revision=3, applied=2, state="refused", digest="d2", error="replayed: other"), False, 3),
        (DocumentReport(revision=3, applied=2, state="refused", digest="d2", error="rejected: golden"), False, None),
        (DocumentReport(revision=3, applied=3, state="refused", digest="d3", error="replayed: below 3"), False, None),
        (DocumentReport(revision=2, applied=2, state="refused", digest="d2", error="replayed: below 2"), True, None),
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


async def test_what_was_to_be_said_is_said_after_the_database_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await with_a_node(bench)
    await bench.reports("acme.edge-1", revision=1, applied=1)
    await bench.publish(version="2")

    def broken(*_: object) -> None:
        raise OSError("the disk failed")

    bench.broker.forget()
    monkeypatch.setattr(bench.hub.storage, "read", broken)
    bench.hub.publisher.connected()
    await eventually(lambda: bench.clock.sleepers > 0)
    monkeypatch.undo()
    await later(bench, 2)
    await eventually(lambda: DESIRED in bench.broker.retained)


async def test_a_node_whose_comparison_failed_is_compared_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await with_a_node(bench)
    await later(bench, 2 * RESEND_SECONDS)

    def broken(*_: object) -> None:
        raise OSError("the disk failed")

    monkeypatch.setattr(bench.hub.storage, "read", broken)
    await bench.reports("acme.edge-1", revision=0, applied=0)
    await eventually(lambda: bench.clock.sleepers > 0)
    monkeypatch.undo()
    await later(bench, 2)
    await later(bench, 2 * RESEND_SECONDS)
    await eventually(lambda: len(bench.broker.payloads(DESIRED)) == 2)


async def test_of_a_burst_of_any_length_the_newest_of_each_node_is_kept(bench: Bench) -> None:
    await bench.add_node("acme.edge-1")
    await bench.add_node("acme.edge-2")
    for _ in range(12_000):
        bench.hub.fleet.hear(Message(up("acme.edge-1", "state"), b'{"state":"lost"}'))
    for node in ("acme.edge-1", "acme.edge-2"):
        bench.hub.fleet.hear(Message(up(node, "state"), encode(State(state="ready"))))
    await eventually(lambda: bench.hub.fleet.counts["stored"] == 2)
    for node in ("acme.edge-1", "acme.edge-2"):
        assert (await bench.call("GET", f"/api/v1/nodes/{node}", 200))["state"] == "ready"


async def test_a_burst_of_messages_leaves_turns_to_everybody_else(bench: Bench) -> None:
    await bench.add_node("acme.edge-1")
    for _ in range(5 * YIELD_EVERY):
        bench.broker.publish(up("acme.edge-1", "event"), b"{}")
    for _ in range(3):
        await asyncio.sleep(0)
    assert 0 < bench.hub.fleet.counts["event"] < 5 * YIELD_EVERY
    await eventually(lambda: bench.hub.fleet.counts["event"] == 5 * YIELD_EVERY)


async def test_the_hub_says_that_it_stops(bench: Bench) -> None:
    bench.hub.publisher.leave()
    assert msgspec.json.decode(bench.broker.retained[HUB_STATE], type=HubState).state == "disconnected"
