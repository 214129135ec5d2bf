"""Row 5 through the whole control plane: `python tests/bench/update.py` prints an edge node's p99 while it takes an update.

Real broker, hub and edge node. `cnn` (0.6 ms raw) is asked in an open loop at half its closed-loop peak while the hub publishes
and deploys 100 MB of another model to the same node, which fetches, verifies, probes, loads and activates it. The edge has one
core, with its probing children; the broker, the hub and the clients have the other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "tests")]

from arrivals import Outcome, open_loop  # noqa: E402
from asking import binary, load_of  # noqa: E402
from measure import apart, burst, enough  # noqa: E402
from networks import Network, write_big, write_networks  # noqa: E402
from package_writer import write_package  # noqa: E402

from deploy.local import Cluster, cluster  # noqa: E402
from deploy.processes import wait_until  # noqa: E402

EDGE = "edge-1"
CONNECTIONS = 8
CALM_SECONDS, BUSY_SECONDS = 4.0, 12.0
DEPLOY_SECONDS = 1.0
"""After the start of the load."""
BUDGET_MS = 10.0


def publish(running: Cluster, network: Network, version: str) -> None:
    write_package(
        network.path, {"x": network.x}, {"y": network.y}, package=network.name, version=version, tolerance=1e-2
    )
    running.publish(network.path.parent)


def deploy(running: Cluster, models: Mapping[str, str]) -> None:
    body = {"tenant": "demo", "selector": {"tier": "edge"}, "models": dict(models)}
    running.api.call("PUT", "/api/v1/deployments/bench", body)


def runs(running: Cluster, model: str, version: str) -> bool:
    reported = running.node(EDGE).get("reported") or {}
    return bool(reported.get("running", {}).get(model) == f"{model}/{version}")


def measure(running: Cluster, folder: Path, rounds: int) -> int:
    cnn = write_networks(folder, ["cnn"])["cnn"]
    running.start_broker()
    running.start_hub()
    publish(running, cnn, "1")
    running.urls["cloud-1"] = "http://127.0.0.1:9"  # nothing listens on the discard port
    running.start_edge(EDGE)
    deploy(running, {"cnn": "cnn/1"})
    running.wait_for_model(EDGE, "cnn")
    pid, port = running.processes[EDGE].pid, urlsplit(running.urls[EDGE]).port or 0
    load = load_of(binary(cnn), cnn, port)
    for number in range(1, rounds + 1):
        publish(running, write_big(folder / "big", number), str(number))
    calm, busy, took = [], [], []
    with apart(pid):
        peak = burst(
            pid, load, connections=CONNECTIONS, requests=enough(load, connections=CONNECTIONS, seconds=1.5)
        ).rate
        for number in range(1, rounds + 1):
            calm.append(open_loop(load, rate=peak / 2, seconds=CALM_SECONDS, seed=number))
            models = {"cnn": "cnn/1", "big": f"big/{number}"}
            timer = threading.Timer(DEPLOY_SECONDS, deploy, (running, models))
            timer.start()
            began = time.monotonic() + DEPLOY_SECONDS
            busy.append(open_loop(load, rate=peak / 2, seconds=BUSY_SECONDS, seed=number))
            timer.join()
            wait_until("the large version runs", lambda n=number: runs(running, "big", str(n)), 60.0)  # type: ignore[misc]
            at = running.node(EDGE)["reported"]["documents"]["desired"]["at"]
            took.append(at - (time.time() - time.monotonic() + began))
    return show(calm, busy, took, peak)


def show(calm: list[Outcome], busy: list[Outcome], took: list[float], peak: float) -> int:
    failed = sum(outcome.asked - len(outcome.good()) for outcome in (*calm, *busy))
    print(
        f"cnn at {peak / 2:.0f} requests/s, half its peak; {len(calm)} rounds; requests without a good answer: {failed}"
    )
    p99 = 0.0
    for what, outcomes in (("calm", calm), ("while 100 MB are fetched, verified and activated", busy)):
        times = [outcome.times() for outcome in outcomes]
        tails = sorted(each.p99 / 1e3 for each in times)
        p99, p50 = statistics.median(tails), statistics.median(each.p50 / 1e3 for each in times)
        print(
            f"  {what:48s} p50 {p50:5.2f} ms, p99 {p99:5.2f} ms ({tails[0]:.2f} .. {tails[-1]:.2f}), budget {BUDGET_MS:g}"
        )
    print(f"  from the deployment to in force: {statistics.median(took):.1f} s")
    return 1 if failed or p99 >= BUDGET_MS else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder) / "cluster") as running:
        return measure(running, Path(folder) / "models", arguments.rounds)


if __name__ == "__main__":
    sys.exit(main())
