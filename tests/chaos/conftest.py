"""Three tiers as real processes, with a proxy on every road that leads to the edge node or away from it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import urllib3

from deploy.broker import Broker
from deploy.local import Cluster, cluster
from deploy.processes import wait_until
from models.zoo import digits
from sync.chaos import ThreadedProxy

EDGE, CLOUD = "edge-1", "cloud-1"
HEAL_SECONDS = 30.0
"""What a node may take to be in sync again after a fault is over."""


class ProxiedBroker(Broker):
    """Nodes are told to reach it through `via`."""

    via: str | None = None

    @property
    def url(self) -> str:
        return self.via or super().url


@dataclass
class Tiers:
    """`broker`, `hub`, `cloud`: the edge node's roads to them."""

    cluster: Cluster
    broker: ThreadedProxy
    hub: ThreadedProxy
    cloud: ThreadedProxy

    def ask(self, deadline_ms: float = 500.0, min_confidence: float = 1.0) -> tuple[dict[str, Any], float]:
        """What the edge says of its answer, and the seconds it took. Raises AssertionError when it refused."""
        images, _ = digits.held_out()
        image = np.asarray(images[:1])
        body = {
            "inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 64], "data": image.ravel().tolist()}],
            "parameters": {"min_confidence": min_confidence},
        }
        began = time.monotonic()
        answer = urllib3.request(
            "POST",
            f"{self.cluster.urls[EDGE]}/v2/models/{digits.MODEL}/infer",
            body=json.dumps(body).encode(),
            headers={"tierline-deadline-ms": f"{deadline_ms:g}"},
            retries=False,
            timeout=10.0,
        )
        took = time.monotonic() - began
        found = json.loads(answer.data)
        assert answer.status == 200, found
        return {**found["parameters"], "version": found["model_version"]}, took

    def answered_by_the_cloud(self) -> bool:
        return self.ask(2_000.0)[0]["tier"] == "cloud"

    def wait_for_cloud(self) -> None:
        wait_until("the edge uses the cloud", self.answered_by_the_cloud, HEAL_SECONDS)

    def running(self, name: str = EDGE) -> str:
        """The package/version that the hub has heard the node runs."""
        reported = self.cluster.node(name).get("reported") or {}
        return str(reported.get("running", {}).get(digits.MODEL, ""))

    def deploy(self, version: str) -> None:
        self.cluster.deploy("edge", "edge", digits.MODEL, digits.PACKAGES["edge"], version)

    def other_version(self) -> str:
        return "1" if self.running().endswith("/2") else "2"

    def wait_for(self, version: str, timeout: float = HEAL_SECONDS) -> None:
        package = f"{digits.PACKAGES['edge']}/{version}"
        wait_until(f"the hub hears of {package}", lambda: self.running() == package, timeout)

    def presence(self) -> str:
        return str(self.cluster.node(EDGE)["state"])


@pytest.fixture(scope="session")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiers]:
    with ExitStack() as stack:
        found = stack.enter_context(cluster(tmp_path_factory.mktemp("chaos")))
        found.broker = ProxiedBroker(found.folder / "broker")
        found.start_broker()
        found.start_hub()
        for tier, version in (("cloud", "1"), ("edge", "1"), ("edge", "2")):
            found.publish(digits.package_folder(tier, version))
        found.start_worker(CLOUD)
        found.deploy("cloud", "cloud", digits.MODEL, digits.PACKAGES["cloud"], "1")
        found.deploy("edge", "edge", digits.MODEL, digits.PACKAGES["edge"], "1")
        direct = dict(found.urls)
        roads = {
            name: stack.enter_context(ThreadedProxy(url, seed=1))
            for name, url in (("broker", found.broker.url), ("hub", direct["hub"]), ("cloud", direct[CLOUD]))
        }
        found.broker.via = roads["broker"].url("mqtt")
        found.urls.update({"hub": roads["hub"].url(), CLOUD: roads["cloud"].url()})
        found.start_edge(EDGE, up=CLOUD)
        found.broker.via = None
        found.urls.update(direct)
        for name in (CLOUD, EDGE):
            found.wait_for_model(name, digits.MODEL)
        yield Tiers(found, roads["broker"], roads["hub"], roads["cloud"])


@pytest.fixture
def calm(tiers: Tiers) -> Tiers:
    """The tiers, with the edge using its cloud: what one test broke has healed before the next one begins."""
    tiers.wait_for_cloud()
    return tiers
