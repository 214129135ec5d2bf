"""Settings of a tenant reach its nodes, a node's own come first, and nonsense is refused by its field."""

from __future__ import annotations

import msgspec
import pytest

from sync.messages import Document, Envelope, decode
from sync.topics import down


def sent(bench, node: str) -> dict:
    envelope = decode(bench.broker.retained[down(node, "settings")], Envelope)
    document = decode(envelope.payload, Document)
    assert (document.kind, document.scope) == ("settings", f"node:{node}")
    return msgspec.json.decode(document.body)


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


async def test_there_are_no_settings_of_an_unknown_node(bench) -> None:
    await bench.call("PUT", "/api/v1/settings/nodes/acme.ghost", 404, json={})
    await bench.call("GET", "/api/v1/settings/acme", 404)
