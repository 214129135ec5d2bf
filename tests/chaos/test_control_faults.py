"""The broker and the hub break; the edge serves on, and is in sync again within 30 s of the healing."""

from __future__ import annotations

import os
import time

import pytest
import urllib3

from deploy.processes import wait_until
from sync.chaos import Corrupt, Drip, HalfOpen, Lag, LinkCut, Reset, processes
from tests.chaos.conftest import EDGE, HEAL_SECONDS, Tiers


def serves(tiers: Tiers) -> bool:
    return tiers.ask(min_confidence=0.0)[0]["tier"] == "edge"


@pytest.mark.parametrize("fault", [HalfOpen(), HalfOpen("up"), LinkCut(), Reset()], ids=lambda fault: fault.name)
def test_a_document_sent_while_the_link_to_the_broker_was_broken_arrives_after_it(
    tiers: Tiers, fault: HalfOpen
) -> None:
    new = tiers.other_version()
    with tiers.broker.suffering(fault):
        tiers.deploy(new)
        time.sleep(0.5)
        assert serves(tiers)
        wait_until("something came the fault's way", lambda: fault.fired, HEAL_SECONDS)
    tiers.wait_for(new)
    wait_until("the edge is there again", lambda: tiers.presence() == "ready", HEAL_SECONDS)


def test_a_killed_broker_comes_back_and_with_it_presence_and_updates(tiers: Tiers) -> None:
    new = tiers.other_version()
    broker = tiers.cluster.broker
    assert broker._process is not None
    before = broker._process.pid
    processes.kill(before)
    broker._process.stop()
    assert serves(tiers)
    broker.start()
    # The broker starts with the hub alone on its list; who else may come is the hub's business.
    access = tiers.cluster.api.call("GET", "/api/v1/broker/access")
    broker.admit(access["passwords"], access["acl"])
    assert broker._process.pid != before
    tiers.deploy(new)
    tiers.wait_for(new)
    wait_until("the edge is there again", lambda: tiers.presence() == "ready", HEAL_SECONDS)


def test_a_lagging_broker_delays_an_update_and_loses_none(tiers: Tiers) -> None:
    with tiers.broker.suffering(Lag(0.3, 0.2)):
        new = tiers.other_version()
        tiers.deploy(new)
        tiers.wait_for(new)


def test_spoiled_bytes_on_the_link_end_in_a_new_connection_and_not_in_a_wrong_document(tiers: Tiers) -> None:
    new = tiers.other_version()
    with tiers.broker.suffering(Corrupt(50)):
        tiers.deploy(new)
        time.sleep(1.0)
        assert serves(tiers)
    tiers.wait_for(new)


def test_an_update_whose_download_is_cut_goes_on_after_it(tiers: Tiers) -> None:
    new = tiers.other_version()
    forget_files(tiers)
    drip = Drip(4_000.0, "down")
    with tiers.hub.suffering(drip):
        tiers.deploy(new)
        wait_until("the download is under way", lambda: drip.tally.bytes > 4_000, HEAL_SECONDS)
        assert serves(tiers)
    with tiers.hub.suffering(Reset()):
        time.sleep(0.5)
        assert serves(tiers)
    tiers.wait_for(new)


def test_a_frozen_edge_goes_on_where_it_stood(tiers: Tiers) -> None:
    edge = tiers.cluster.processes[EDGE]
    with processes.paused(edge.pid), pytest.raises(urllib3.exceptions.TimeoutError):
        urllib3.request("GET", f"{tiers.cluster.urls[EDGE]}/v2/health/live", retries=False, timeout=0.3)
    assert serves(tiers)
    assert edge.alive


def forget_files(tiers: Tiers) -> None:
    """Remove every file from the edge's store that it does not run: the next update has to fetch."""
    for path in (tiers.cluster.folder / EDGE).rglob("*"):
        if path.is_file() and len(path.name) == 64:
            os.unlink(path)
