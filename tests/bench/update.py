"""Row 5 through the whole control plane: `python tests/bench/update.py` prints an edge node's p99 while it takes an update.

Real broker, hub and edge node. `cnn` (0.6 ms raw) is asked in an open loop at half its closed-loop peak while the hub publishes
and deploys 100 MB of another model to the same node, which fetches, verifies, probes, loads and activates it. The edge has one
core, with its children; the broker, the hub and the clients have the other.
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
from typing import NamedTuple
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "tests")]

from arrivals import Outcome, open_loop  # noqa: E402
from asking import binary, load_of  # noqa: E402
from launch import stop_in_order  # noqa: E402
from measure import apart, burst, enough, quantiles  # noqa: E402
from networks import Network, write_big, write_networks  # noqa: E402
from package_writer import write_package  # noqa: E402

from deploy.local import Cluster, cluster  # noqa: E402
from deploy.processes import wait_until  # noqa: E402

CONNECTIONS = 8
SECONDS = 8.0
"""Of load, calm and with the update; the update takes about half of it."""
DEPLOY_SECONDS = 1.0
"""Into the load."""
BUDGET_MS = 10.0


def publish(running: Cluster, network: Network, package: str) -> None:
    write_package(network.path, {"x": network.x}, {"y": network.y}, package=package, version="1", tolerance=1e-2)
    running.publish(network.path.parent)


def deploy(running: Cluster, models: Mapping[str, str]) -> None:
    body = {"tenant": "demo", "selector": {"tier": "edge"}, "models": dict(models)}
    running.api.call("PUT", "/api/v1/deployments/bench", body)


class Round(NamedTuple):
    """`calm`, `busy`: how half of `peak` was answered. `began`, `ended`: the update, in seconds of the busy load."""

    peak: float
    calm: Outcome
    busy: Outcome
    began: float
    ended: float

    def during(self) -> list[float]:
        """Latencies of requests due while the update was on, milliseconds."""
        return [reply.latency * 1e3 for reply in self.busy.good() if self.began <= reply.due <= self.ended]


def measure(running: Cluster, folder: Path, rounds: int) -> int:
    cnn = write_networks(folder, ["cnn"])["cnn"]
    running.start_broker()
    running.start_hub()
    publish(running, cnn, "cnn")
    publish(running, write_big(folder / "big", 1), "big")
    running.urls["cloud-1"] = "http://127.0.0.1:9"  # nothing listens on the discard port
    return show([measure_round(running, cnn, number) for number in range(1, rounds + 1)])


def measure_round(running: Cluster, cnn: Network, number: int) -> Round:
    """A node of its own: one that knows a former version would ask the hub for a delta, and wait for it."""
    edge = f"edge-{number}"
    deploy(running, {"cnn": "cnn/1"})
    running.start_edge(edge)
    running.wait_for_model(edge, "cnn")
    process, port = running.processes[edge], urlsplit(running.urls[edge]).port or 0
    load = load_of(binary(cnn), cnn, port)
    requests = enough(load, connections=CONNECTIONS, seconds=1.5)
    others = [other.pid for name, other in running.processes.items() if name != edge and other.alive]
    with apart(process.pid, *others):
        peak = burst(process.pid, load, connections=CONNECTIONS, requests=requests).rate
        calm = open_loop(load, rate=peak / 2, seconds=SECONDS, seed=number, alone=False)
        timer = threading.Timer(DEPLOY_SECONDS, deploy, (running, {"cnn": "cnn/1", "big": "big/1"}))
        timer.start()
        started = time.time()
        busy = open_loop(load, rate=peak / 2, seconds=SECONDS, seed=number, alone=False)
        timer.join()
        wait_until("the large version runs", lambda: in_force(running, edge, "big") > 0.0, 60.0)
    ended = in_force(running, edge, "big") - started
    process.stop()
    return Round(peak, calm, busy, DEPLOY_SECONDS, ended)


def in_force(running: Cluster, edge: str, model: str) -> float:
    """Since when the node runs a model, by its own word; 0 = it does not."""
    reported = running.node(edge).get("reported") or {}
    return float(reported["documents"]["desired"]["at"]) if model in reported.get("running", {}) else 0.0


def show(found: list[Round]) -> int:
    outcomes = [outcome for each in found for outcome in (each.calm, each.busy)]
    failed = sum(outcome.asked - len(outcome.good()) for outcome in outcomes)
    rate, late = statistics.median(each.peak for each in found) / 2, max(outcome.late for outcome in outcomes) * 1e3
    print(f"cnn at {rate:.0f} requests/s, half its peak; {len(found)} rounds; requests without a good answer: {failed}")
    calm = [[reply.latency * 1e3 for reply in each.calm.good()] for each in found]
    p99 = 0.0
    for what, latencies in (("calm", calm), ("from the deployment to in force", [each.during() for each in found])):
        tails = sorted(quantiles(each).p99 for each in latencies)
        p99, p50 = statistics.median(tails), statistics.median(quantiles(each).p50 for each in latencies)
        print(
            f"  {what:32s} p50 {p50:5.2f} ms, p99 {p99:5.2f} ms ({tails[0]:.2f} .. {tails[-1]:.2f}), budget {BUDGET_MS:g}"
        )
    print(
        f"  100 MB fetched, verified and activated in {statistics.median(each.ended - each.began for each in found):.1f} s"
    )
    print(f"  generator late by {late:.2f} ms at most (p99)")
    return 1 if failed or p99 >= BUDGET_MS else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder) / "cluster") as running:
        return measure(running, Path(folder) / "models", arguments.rounds)


if __name__ == "__main__":
    stop_in_order()
    sys.exit(main())
