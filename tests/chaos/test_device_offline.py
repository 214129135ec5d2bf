"""A device that loses its edge answers by itself, and uses the edge again when it is back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.predict import Sdk
from deploy.processes import wait_until
from models.zoo import digits
from sync.chaos import BlackHole, LinkCut, ThreadedProxy
from tests.chaos.conftest import EDGE, HEAL_SECONDS, Tiers

DEVICE = "device-1"
DEADLINE_MS = 300.0
images, labels = digits.held_out()


@pytest.fixture(scope="module")
def sdk(tiers: Tiers) -> Iterator[tuple[Sdk, ThreadedProxy]]:
    running = tiers.cluster
    running.publish(digits.package_folder("device"))
    direct = running.urls[EDGE]
    with ThreadedProxy(direct) as road:
        running.urls[EDGE] = road.url()
        process = running.start_device(DEVICE, edge=EDGE)
        running.urls[EDGE] = direct
        running.deploy("device", "device", digits.MODEL, digits.PACKAGES["device"], "1")
        package = f"{digits.PACKAGES['device']}/1"
        wait_until("the device runs its model", lambda: tiers.running(DEVICE) == package, HEAL_SECONDS, process)
        yield Sdk(process), road
        process.stop()


@pytest.mark.parametrize("fault", [BlackHole(), LinkCut()], ids=lambda fault: fault.name)
def test_a_device_without_its_edge_answers_by_itself_in_time(
    sdk: tuple[Sdk, ThreadedProxy], fault: BlackHole | LinkCut
) -> None:
    device, road = sdk

    def ask() -> tuple[str | None, bool, float]:
        found = device.ask(0, images[0], int(labels[0]), DEADLINE_MS, 1.0)
        assert not found.error
        return found.tier, found.degraded, found.latency_ms

    wait_until("the device uses its edge", lambda: ask()[0] in ("edge", "cloud"), HEAL_SECONDS)
    with road.suffering(fault):
        for _ in range(5):
            tier, degraded, latency = ask()
            assert (tier, degraded) == ("device", True)
            assert latency < DEADLINE_MS + 200
    wait_until("the device uses its edge again", lambda: ask()[0] in ("edge", "cloud"), HEAL_SECONDS)
