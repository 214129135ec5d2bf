"""kill -9 of a real edge node at every step of an update, under a real broker and hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploy.local import Cluster, cluster
from deploy.predict import predict
from deploy.processes import wait_until
from models.zoo import digits
from sync.failpoints import POINTS

EDGE = "edge-1"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("killed")) as found:
        found.start_broker()
        found.start_hub()
        for version in ("1", "2"):
            found.publish(digits.package_folder("edge", version))
        found.urls["cloud-1"] = "http://127.0.0.1:9"  # nothing listens on the discard port: the edge answers alone
        found.start_edge(EDGE)
        yield found


def deploy(running: Cluster, version: str) -> None:
    running.deploy("digits", "edge", digits.MODEL, digits.PACKAGES["edge"], version)


def answered_by(running: Cluster) -> tuple[str, np.ndarray]:
    images, _ = digits.held_out()
    outputs, facts = predict(running.urls[EDGE], digits.MODEL, images[:8], min_confidence=0.0)
    return str(facts["version"]), outputs


def wait_for(running: Cluster, version: str) -> np.ndarray:
    package = f"{digits.PACKAGES['edge']}/{version}"

    def active() -> bool:
        reported = running.node(EDGE).get("reported") or {}
        return bool(reported.get("running", {}).get(digits.MODEL) == package)

    wait_until(f"{package} is reported", active, 30.0, running.processes[EDGE])
    found, outputs = answered_by(running)
    assert found == version
    return outputs


@pytest.mark.timeout(240)
def test_a_kill_at_any_step_leaves_the_old_or_the_new_version_and_the_update_still_arrives(running: Cluster) -> None:
    expected: dict[str, np.ndarray] = {}
    for version in ("1", "2"):
        deploy(running, version)
        expected[version] = wait_for(running, version)
    old = "2"
    for name in POINTS:
        new = "1" if old == "2" else "2"
        forget_files(running, digits.package_folder("edge", new))
        running.processes[EDGE].stop()
        running.start_edge(EDGE, env={"TIERLINE_FAILPOINTS": f"{name}=kill"})
        edge = running.processes[EDGE]
        deploy(running, new)
        wait_until(f"the edge died at {name}", lambda edge=edge: not edge.alive, 30.0)
        assert edge.returncode == -9
        edge.stop()
        assert_every_file_is_what_it_is_called(running)
        running.start_edge(EDGE)
        version, outputs = answered_by(running)
        assert version in (old, new), name
        np.testing.assert_array_equal(outputs, expected[version], err_msg=name)
        np.testing.assert_array_equal(wait_for(running, new), expected[new], err_msg=name)
        old = new


def forget_files(running: Cluster, package: Path) -> None:
    """Remove a package's files from the edge's store, so that the next update fetches them again."""
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in package.iterdir()}
    for path in blobs(running):
        if path.name in digests:
            path.unlink()


def blobs(running: Cluster) -> list[Path]:
    return [path for path in (running.folder / EDGE).rglob("*") if path.is_file() and len(path.name) == 64]


def assert_every_file_is_what_it_is_called(running: Cluster) -> None:
    for path in blobs(running):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
