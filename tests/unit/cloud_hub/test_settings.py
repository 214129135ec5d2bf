"""Settings of a tenant reach its nodes, a node's own come first, and nonsense is refused by its field."""

from __future__ import annotations

import msgspec
import pytest
from hub_in_memory import Bench

from sync.messages import Document, Envelope, decode
from sync.settings import Settings, decode_settings
from sync.states import DEADLINES, MIN_DEADLINES
from sync.topics import down


def document(bench: Bench, node: str) -> Document:
    envelope = decode(bench.broker.retained[down(node, "settings")], Envelope)
    found = decode(envelope.payload, Document)
    assert (found.kind, found.scope) == ("settings", f"node:{node}")
    return found


def sent(bench: Bench, node: str) -> dict:
    return msgspec.json.decode(document(bench, node).body)


async def test_a_tenants_settings_reach_its_nodes_and_those_that_come_later(bench) -> None:
    await bench.add_node("acme.edge-1")
    await bench.add_node("other.edge-1")
    await bench.call("PUT", "/api/v1/settings/acme", 200, json={"bandwidth": 50_000})
    await bench.add_node("acme.edge-2")
    assert sent(bench, "acme.edge-1")["bandwidth"] == sent(bench, "acme.edge-2")["bandwidth"] == 50_000
    assert down("other.edge-1", "settings") not in bench.broker.retained
    assert (await bench.call("GET", "/api/v1/settings/acme", 200))["settings"]["bandwidth"] == 50_000


async def test_a_nodes_own_settings_come_first_and_stay(bench) -> None:
    await bench.add_node("acme.edge-1")
    await bench.call("PUT", "/api/v1/settings/nodes/acme.edge-1", 200, json={"force": 7})
    await bench.call("PUT", "/api/v1/settings/acme", 200, json={"force": 1})
    assert sent(bench, "acme.edge-1")["force"] == 7
    shown = await bench.call("GET", "/api/v1/settings/nodes/acme.edge-1", 200)
    assert shown["settings"] == {"force": 7, "of": "node"}


async def test_the_same_settings_again_keep_their_revision(bench) -> None:
    first = await bench.call("PUT", "/api/v1/settings/acme", 200, json={"force": 1})
    assert await bench.call("PUT", "/api/v1/settings/acme", 200, json={"force": 1}) == first


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"bandwidth": 1}, "bandwidth"),
        ({"windows": [{"start": "25:00", "minutes": 1}]}, "windows[0].start"),
        ({"quality": {"error_share": 7}}, "quality.error_share"),
        ({"bandwith": 50_000}, "bandwith"),
        ({"windows": [{"start": "22:00", "minutes": 60, "day": ["sat"]}]}, "windows[0].day: no such setting"),
        ({"deadlines": {"prepairing": 60}}, "deadlines.prepairing: no such setting"),
        ({"quality": {"shadw": False}}, "quality.shadw: no such setting"),
        ([], "settings"),
    ],
)
async def test_nonsense_is_refused_by_its_field(bench, given, field: str) -> None:
    answer = await bench.call("PUT", "/api/v1/settings/acme", 400, json=given)
    assert field in answer["error"]


async def test_a_deadline_too_short_for_any_update_is_refused_by_its_field(bench) -> None:
    for state, least in MIN_DEADLINES.items():
        for path in ("acme", "nodes/acme.edge-1"):
            given = {"deadlines": {**DEADLINES, state: least - 1}}
            answer = await bench.call("PUT", f"/api/v1/settings/{path}", 400, json=given)
            assert (
                f"deadlines.{state}: {least - 1:g} s is too short for any update, at least {least:g}" in answer["error"]
            )


async def test_the_shortest_deadlines_and_the_usual_ones_are_taken(bench) -> None:
    for given in (MIN_DEADLINES, DEADLINES):
        await bench.call("PUT", "/api/v1/settings/acme", 200, json={"deadlines": dict(given)})


# --- removing -----------------------------------------------------------------------------------------------------------


async def test_a_node_whose_own_settings_are_removed_has_its_tenants_under_a_higher_revision(bench) -> None:
    await bench.add_node("acme.edge-1")
    await bench.call("PUT", "/api/v1/settings/acme", 200, json={"force": 1})
    for number in (7, 8):
        await bench.call("PUT", "/api/v1/settings/nodes/acme.edge-1", 200, json={"force": number})
    before = document(bench, "acme.edge-1").revision
    answer = await bench.call("DELETE", "/api/v1/settings/nodes/acme.edge-1", 200)
    assert sent(bench, "acme.edge-1") == answer["settings"] == {"force": 1, "of": "tenant"}
    assert document(bench, "acme.edge-1").revision == answer["revision"] == before + 1
    await bench.call("PUT", "/api/v1/settings/acme", 200, json={"force": 2})
    assert sent(bench, "acme.edge-1")["force"] == 2


async def test_a_node_whose_tenant_has_none_goes_by_its_own_configuration_then(bench) -> None:
    await bench.add_node("acme.edge-1")
    await bench.call("PUT", "/api/v1/settings/nodes/acme.edge-1", 200, json={"bandwidth": 5_000})
    await bench.call("DELETE", "/api/v1/settings/nodes/acme.edge-1", 200)
    mine = Settings(bandwidth=70_000.0)
    assert decode_settings(document(bench, "acme.edge-1").body, mine) == mine
    answer = await bench.call("GET", "/api/v1/settings/nodes/acme.edge-1", 404)
    assert "the nodes' own apply" in answer["error"]


async def test_a_tenants_settings_removed_leave_its_nodes_without_and_spare_those_with_their_own(bench) -> None:
    for node in ("acme.edge-1", "acme.edge-2", "other.edge-1"):
        await bench.add_node(node)
    for tenant in ("acme", "other"):
        await bench.call("PUT", f"/api/v1/settings/{tenant}", 200, json={"force": 1})
    await bench.call("PUT", "/api/v1/settings/nodes/acme.edge-2", 200, json={"force": 7})
    answer = await bench.call("DELETE", "/api/v1/settings/acme", 200)
    assert answer["revision"] == 2
    assert (sent(bench, "acme.edge-1"), document(bench, "acme.edge-1").revision) == ({"of": "none"}, 2)
    assert sent(bench, "acme.edge-2")["force"] == 7
    assert sent(bench, "other.edge-1")["force"] == 1
    await bench.call("GET", "/api/v1/settings/acme", 404)
    await bench.call("DELETE", "/api/v1/settings/nodes/acme.edge-2", 200)
    assert sent(bench, "acme.edge-2") == {"of": "none"}


async def test_what_was_removed_can_be_set_again_and_no_revision_comes_twice(bench) -> None:
    await bench.add_node("acme.edge-1")
    revisions = []
    for _ in range(2):
        await bench.call("PUT", "/api/v1/settings/acme", 200, json={"force": 1})
        revisions.append(document(bench, "acme.edge-1").revision)
        await bench.call("DELETE", "/api/v1/settings/acme", 200)
        revisions.append(document(bench, "acme.edge-1").revision)
    assert revisions == [1, 2, 3, 4]


async def test_a_node_that_comes_after_the_removal_is_sent_nothing(bench) -> None:
    await bench.call("PUT", "/api/v1/settings/acme", 200, json={"force": 1})
    await bench.call("DELETE", "/api/v1/settings/acme", 200)
    await bench.add_node("acme.edge-1")
    assert down("acme.edge-1", "settings") not in bench.broker.retained


@pytest.mark.parametrize("path", ["acme", "nodes/acme.edge-1", "nodes/acme.ghost"])
async def test_what_was_never_set_cannot_be_removed(bench, path: str) -> None:
    await bench.add_node("acme.edge-1")
    await bench.call("DELETE", f"/api/v1/settings/{path}", 404)


async def test_a_tenants_settings_are_not_removed_through_one_of_its_nodes(bench) -> None:
    await bench.add_node("acme.edge-1")
    await bench.call("PUT", "/api/v1/settings/acme", 200, json={"force": 1})
    answer = await bench.call("DELETE", "/api/v1/settings/nodes/acme.edge-1", 404)
    assert answer["error"] == "no settings were set for node:acme.edge-1"
    assert sent(bench, "acme.edge-1")["force"] == 1


async def test_removed_settings_twice_is_said_and_spends_no_revision(bench) -> None:
    await bench.call("PUT", "/api/v1/settings/acme", 200, json={"force": 1})
    await bench.call("DELETE", "/api/v1/settings/acme", 200)
    await bench.call("DELETE", "/api/v1/settings/acme", 404)
    assert (await bench.call("PUT", "/api/v1/settings/acme", 200, json={}))["revision"] == 3


async def test_there_are_no_settings_of_an_unknown_node(bench) -> None:
    await bench.call("PUT", "/api/v1/settings/nodes/acme.ghost", 404, json={})
    await bench.call("GET", "/api/v1/settings/acme", 404)
