"""This release's hub, and nodes and databases of other releases."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hub_in_memory import Bench, eventually, hub_bench, settle
from skew_fixtures import RELEASES, Release

from cloud_hub.storage import Storage
from sync.errors import StoreFailed
from sync.messages import Envelope, decode
from sync.topics import down, up

NODE = "demo.edge-1"


async def says(bench: Bench, leaf: str, payload: bytes) -> None:
    stored = bench.hub.fleet.counts["stored"]
    bench.broker.publish(up(NODE, leaf), payload, retain=True)
    await eventually(lambda: bench.hub.fleet.counts["stored"] > stored)
    await settle()


@pytest.mark.parametrize("name", RELEASES)
async def test_a_node_of_every_release_is_heard_and_sent_what_it_should_run(tmp_path: Path, name: str) -> None:
    release = Release(name)
    async with hub_bench(tmp_path) as bench:
        await bench.add_node(NODE)
        for leaf in ("state", "caps", "reported"):
            await says(bench, leaf, release.read(f"{leaf}.json"))
        node = await bench.call("GET", f"/api/v1/nodes/{NODE}", 200)
        assert node["running"] == {"digits": "digits-int8/1"}
        assert node["capabilities"]["engines"] == json.loads(release.read("caps.json"))["engines"]
        await bench.publish()
        await bench.deploy("all", {"digits": "digits-cnn/1"}, tier="edge")
        envelope = decode(bench.broker.retained[down(NODE, "desired")], Envelope)
        sent, recorded = json.loads(envelope.payload), recorded_payload(release)
        # It reported revision 1 of another hub: ours goes above what it has seen.
        assert sent["revision"] > 1 or sent["revision"] == recorded["revision"]
        assert sent.keys() <= recorded.keys()
        assert sent["body"]["models"]["digits"].keys() <= recorded["body"]["models"]["digits"].keys()
        assert bench.hub.fleet.counts["garbage"] == 0


def recorded_payload(release: Release) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(decode(release.read("desired.json"), Envelope).payload)
    return payload


async def test_a_report_is_kept_with_the_fields_nobody_here_knows(tmp_path: Path) -> None:
    release = Release("later")
    async with hub_bench(tmp_path) as bench:
        await bench.add_node(NODE)
        for leaf in ("caps", "reported"):
            await says(bench, leaf, release.read(f"{leaf}.json"))
    with closing(sqlite3.connect(tmp_path / "hub.sqlite")) as db:
        kept = db.execute("SELECT capabilities, reported FROM nodes").fetchone()
    assert kept == (release.read("caps.json"), release.read("reported.json"))


@pytest.mark.parametrize("name", ["before-tuf", "0.1.0"])
async def test_a_hub_goes_on_from_the_database_of_every_release(tmp_path: Path, name: str) -> None:
    Release(name).restore("hub.sql", tmp_path / "hub.sqlite")
    with closing(sqlite3.connect(tmp_path / "hub.sqlite")) as db:
        db.execute("DELETE FROM credentials")  # its admin's token was not recorded
        db.commit()
    async with hub_bench(tmp_path) as bench:
        node = await bench.call("GET", f"/api/v1/nodes/{NODE}", 200)
        assert (node["desired"], node["running"]) == ({"digits": "digits-int8/1"}, {"digits": "digits-int8/1"})
        packages = await bench.call("GET", "/api/v1/packages", 200)
        assert [entry["package"] for entry in packages["items"]] == ["digits-int8"]
        with bench.hub.storage.read() as records:
            assert len(records.approved_files()) == 4
            # Signed again with this hub's key, above what nodes have seen.
            document = records.document("desired", f"node:{NODE}")
        assert document is not None
        assert document.revision == 2


def test_the_database_of_a_later_release_is_refused_by_its_number_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "hub.sqlite"
    Release("0.1.0").restore("hub.sql", path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
        db.commit()
    before = path.read_bytes()
    with pytest.raises(StoreFailed, match=r"schema 9999, .*reads up to \d{4}"):
        Storage(path)
    assert path.read_bytes() == before
