"""An application's event, all the way: device, broker, hub; and what both ledgers and an edge node's metrics say of events."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import urllib3

from cloud_hub.ledger_cli import ledger
from deploy.local import TENANT, Cluster, cluster
from device_agent import Agent
from models.zoo import digits

DEVICE, EDGE = f"{TENANT}.device-1", f"{TENANT}.edge-1"
SAMPLE = re.compile(r'^outbox_event_(\w+?)(?:\{outcome="([\w.]+)"\})? (\d+)$', re.MULTILINE)
WAIT_SECONDS = 30.0


def wait_for(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not ready():
        assert time.monotonic() < end, "not within 30 s"
        time.sleep(0.05)


def events_of(site: Cluster, node: str) -> list[dict[str, Any]]:
    return list(site.api.call("GET", f"/api/v1/events?node={node}")["items"])


def metrics(site: Cluster) -> str:
    """Of the running edge node."""
    announced = json.loads((site.folder / "edge-1" / "edge.json").read_text())
    return urllib3.request("GET", announced["addresses"]["metrics"], retries=False, timeout=5.0).data.decode()


def outbox_metrics(site: Cluster) -> dict[str, int]:
    """Outcome or name -> value."""
    return {outcome or name: int(value) for name, outcome, value in SAMPLE.findall(metrics(site))}


def delivery_metrics(site: Cluster) -> dict[str, float]:
    """Name with its labels -> value."""
    lines = (line.rpartition(" ") for line in metrics(site).splitlines() if not line.startswith("#"))
    return {
        name: float(value) for name, _, value in lines if name.startswith(("update_", "delivery_", "mirror_", "store_"))
    }


async def test_an_event_put_in_by_an_application_is_at_the_hub_and_every_count_of_it_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster(tmp_path) as site:
        site.start_broker()
        site.start_hub()
        site.urls["cloud-1"] = "http://127.0.0.1:9"  # nothing listens on the discard port
        site._configure("edge-1", "edge", site.urls["hub"], tables=("[listen]", "metrics_port = 0"))
        site.start_edge()
        async with Agent(site.configure_device("device-1")) as agent:
            ids = [
                await agent.event("door", {"open": True}),
                await agent.event("alarm", {"alarm": "too-hot", "state": "raised", "text": "71 C"}),
                await agent.event("sample", b"\x00\xff", priority=1, ttl=3600),
            ]
            rules = [{"model": digits.MODEL, "tier": "edge", "min_confidence": 0.7}]
            site.api.call("PUT", f"/api/v1/policies/{TENANT}", {"rules": rules})
            await asyncio.to_thread(wait_for, lambda: len(events_of(site, DEVICE)) >= 4)
            await asyncio.to_thread(wait_for, lambda: outbox_metrics(site)["delivered"] > 0)
        found = {event["id"]: event for event in events_of(site, DEVICE)}
        assert [found[id_]["kind"] for id_ in ids] == ["app.door", "alarm", "app.sample"]
        assert [found[id_]["json"] for id_ in ids[:2]] == [
            {"open": True},
            {"alarm": "too-hot", "state": "raised", "text": "71 C"},
        ]
        assert (found[ids[2]]["base64"], found[ids[2]]["priority"]) == ("AP8=", 1)
        assert site.api.call("GET", "/api/v1/alarms")["items"][0]["alarm"] == "too-hot"

        counts, updates = outbox_metrics(site), events_of(site, EDGE)
        assert {update["kind"] for update in updates} == {"update"}
        assert {update["json"]["document"] for update in updates} == {"policy"}
        assert (counts["enqueued"], counts["delivered"], counts["pending"]) == (len(updates), len(updates), 0)

        shown = delivery_metrics(site)
        assert shown['update_document_state{kind="policy",state="applied"}'] == 1
        assert shown['update_document_applied{kind="policy"}'] == shown['update_document_revision{kind="policy"}'] >= 1
        assert shown['update_metadata_refreshes_total{outcome="good"}'] >= 1
        assert shown["update_metadata_remaining_seconds"] > 0
        assert shown['delivery_received_bytes_total{way="metadata"}'] > 1_000
        assert shown['mirror_file_lookups_total{outcome="miss"}'] >= shown["mirror_file_fetched_total"] >= 0
        assert shown["store_disk_free_bytes"] > shown["store_size_bytes"] >= 0

        capsys.readouterr()
        assert ledger([str(tmp_path / "device-1"), "--json"]) == 0
        ours = json.loads(capsys.readouterr().out)
        at_hub = ("--hub", site.urls["hub"], "--token-file", str(site.hub_data / "admin.token"))
        assert ledger([*at_hub, "--json"]) == 0
        theirs = {one["node"]: one for one in json.loads(capsys.readouterr().out)}
        assert theirs.keys() == {DEVICE, EDGE}
        received = {kind: stream["received"] for kind, stream in theirs[DEVICE]["streams"].items()}
        assert received == {kind: stream["delivered"] + stream["pending"] for kind, stream in ours["streams"].items()}
        assert set(received) == {"app.door", "app.sample", "alarm", "update"}
        assert ledger([*at_hub, "--node", DEVICE]) == 0
        assert re.search(rf"{DEVICE} +app\.door +1 +\d+ +0", capsys.readouterr().out)
        assert ledger([*at_hub, "--node", f"{TENANT}.nobody"]) == 1
        assert f"no node '{TENANT}.nobody'" in capsys.readouterr().err
