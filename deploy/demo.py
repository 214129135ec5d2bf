"""`tierline demo`: the main job, from publishing a model to refusing a bad one, narrated, measured and checked."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from deploy.demo_report import TIERS, Results, Served, failures, tier_figures
from deploy.demo_try import how_to_try
from deploy.local import TENANT, Cluster, cluster
from deploy.narrator import Narrator
from deploy.predict import Sdk, batch_accuracy, predict
from deploy.processes import DeployError, wait_until
from deploy.tamper import break_stored_file, make_version
from models.zoo import digits

DEADLINE_MS = 50.0
NODES = {"device": "device-1", "edge": "edge-1", "cloud": "cloud-1"}
PAUSED_REQUESTS = 200
ACTIVATE_SECONDS = 60.0
STRICTER = (0.95, 0.97, 0.98, 0.99, 0.999)
REFUSED = ("refused", "failed")


def demo(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tierline demo", description="Three tiers on this machine, end to end.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--keep", action="store_true", help="leave it running and show how to try it; Ctrl-C ends it")
    parser.add_argument(
        "--folder", type=Path, help="where to keep data and logs (default: a temporary folder, removed)"
    )
    options = parser.parse_args(argv)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: the folder of {options.json} does not exist")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="tierline-demo-"))
    narrator = Narrator()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)  # whichever way it is ended, it stops what it started
    try:
        with cluster(folder) as running:
            found = Demo(running, narrator).run()
            _report(found, narrator)
            if options.json:
                options.json.write_text(json.dumps(found, indent=2) + "\n")
                narrator.say(f"figures written to {options.json}")
            if options.keep:
                print(f"\n{how_to_try(running)}", flush=True)  # unindented: lines to paste
                _wait_for_interrupt()
            narrator.chapter("Stopping everything that was started")
    except DeployError as error:
        print(f"\ntierline demo: {error}\nlogs are in {folder / 'logs'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; everything that was started has been stopped", file=sys.stderr)
        return 130
    broken = failures(found)
    for promise in broken:
        narrator.say(f"NOT KEPT: {promise}")
    if broken:
        narrator.say(f"logs are in {folder / 'logs'}")
    else:
        narrator.say(f"every promise was kept; {found['total_seconds']:.0f} seconds in all")
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if broken else 0


class Demo:
    """The steps, in order. Each leaves the cluster healthy for the next."""

    def __init__(self, running: Cluster, narrator: Narrator) -> None:
        self._cluster = running
        self._tell = narrator
        self._results = Results(DEADLINE_MS)
        self._images, self._labels = digits.held_out()

    def run(self) -> dict[str, Any]:
        self._start()
        self._publish("1")
        self._measure_models()
        self._cascade()
        self._new_policy()
        self._pause_cloud()
        self._hub_down()
        self._roll_out("2")
        self._tampered("3")
        self._results.total_seconds = self._tell.seconds
        return self._results.to_json()

    def _start(self) -> None:
        cluster = self._cluster
        self._tell.chapter("Starting a broker, a hub, a cloud worker, an edge node and a device agent")
        cluster.start_broker()
        self._tell.say(f"broker: {cluster.broker.note}, on {cluster.broker.url}")
        cluster.start_hub()
        self._tell.say(f"hub: {cluster.urls['hub']} (API documentation at /docs)")
        cluster.start_worker(NODES["cloud"])
        cluster.start_edge(NODES["edge"], up=NODES["cloud"])
        self._sdk = Sdk(cluster.start_device(NODES["device"], edge=NODES["edge"]))
        self._tell.say("cloud worker, edge node and device agent run, each a process of its own, none with a model yet")

    def _publish(self, version: str) -> None:
        self._tell.chapter(
            f"Publishing '{digits.MODEL}' version {version}: one name, three packages from light to heavy"
        )
        for tier in TIERS:
            self._cluster.publish(digits.package_folder(tier, version))
        self._deploy(version)
        self._wait(version)
        for tier in TIERS:
            self._tell.say(f"{tier:<6} fetched, verified, probed and activated {digits.PACKAGES[tier]}/{version}")
        if not self._results.first_answer_seconds:
            self._ask(0, min_confidence=0.0)
            self._results.first_answer_seconds = self._tell.seconds
            self._tell.say(f"first answer {self._results.first_answer_seconds:.1f} s after the start")

    def _measure_models(self) -> None:
        count = len(self._labels)
        self._tell.chapter(f"Each model alone, on all {count} held-out handwritten digits")
        right = [self._ask(index, min_confidence=0.0) for index in self._each("device", count)]
        self._results.models["device"] = round(sum(one.guess == one.label for one in right) / count, 4)
        for tier in ("edge", "cloud"):
            url = self._cluster.urls[NODES[tier]]
            self._results.models[tier] = batch_accuracy(url, digits.MODEL, self._images, self._labels)
        for tier in TIERS:
            self._tell.say(f"{tier:<6} {digits.PACKAGES[tier]:<12} {self._results.models[tier]:.2%}")

    def _cascade(self) -> None:
        count = len(self._labels)
        self._tell.chapter(
            f"The same digits one by one through the SDK: unsure answers go up, {DEADLINE_MS:.0f} ms each"
        )
        self._results.cascade = [self._ask(index) for index in self._each("cascade", count)]
        for tier in TIERS:
            figures = tier_figures(self._results.cascade, tier)
            self._tell.say(f"{tier:<6} answered {figures['requests']}")

    def _new_policy(self) -> None:
        self._tell.chapter("A new routing policy: devices and edge ask for more certainty before they answer alone")
        times = [self._publish_policy(threshold) for threshold in STRICTER]
        self._results.policy_applied_ms = median(times)
        self._tell.say(
            f"{self._results.policy_applied_ms:.1f} ms from the API call to applied at the edge, "
            f"median of {len(times)} ever stricter ones ({min(times):.1f} to {max(times):.1f})"
        )

    def _publish_policy(self, threshold: float) -> float:
        """Milliseconds from the API call to the edge's own time stamp of having applied it: one machine, one clock."""
        edge = NODES["edge"]
        rules = [{"model": digits.MODEL, "tier": tier, "min_confidence": threshold} for tier in ("device", "edge")]
        began = time.time()
        made = self._cluster.api.call("PUT", f"/api/v1/policies/{TENANT}", {"rules": rules})
        wait_until(
            "the edge applied the policy", lambda: self._document(edge, "policy")["applied"] >= made["revision"], 10.0
        )
        applied: float = self._document(edge, "policy")["at"]
        return (applied - began) * 1e3

    def _pause_cloud(self) -> None:
        self._tell.chapter("The cloud worker freezes (SIGSTOP): every request still gets an answer in time")
        worker = self._cluster.processes[NODES["cloud"]]
        worker.pause()
        try:
            self._results.paused = [self._ask(index) for index in self._each("cloud frozen", PAUSED_REQUESTS)]
        finally:
            worker.resume()
        degraded = sum(one.degraded for one in self._results.paused)
        self._tell.say(
            f"{PAUSED_REQUESTS} requests, {degraded} wanted the cloud and were answered below it, marked degraded"
        )
        wait_until("the cloud is used again after it thawed", self._cloud_answers, 15.0)
        self._tell.say("thawed: the cloud answers again")

    def _hub_down(self) -> None:
        self._tell.chapter("The hub is gone, and the edge restarts without it")
        cluster = self._cluster
        cluster.processes["hub"].kill()
        cluster.processes[NODES["edge"]].kill()
        cluster.start_edge(NODES["edge"], up=NODES["cloud"])
        outputs, facts = predict(cluster.urls[NODES["edge"]], digits.MODEL, self._images[:1])
        self._results.edge_served_while_hub_down = outputs.shape == (1, 10) and facts["tier"] in ("edge", "cloud")
        self._tell.say(f"answered by {facts['package']}/{facts['version']}, loaded from its own disk")
        cluster.start_hub()
        self._wait("1")
        self._tell.say("the hub is back and sees every node in sync")

    def _roll_out(self, version: str) -> None:
        self._tell.chapter(f"Rolling out version {version} while requests keep coming")
        for tier in TIERS:
            self._cluster.publish(digits.package_folder(tier, version))
        began = time.monotonic()
        self._deploy(version)
        served = self._results.during_rollout

        def everywhere() -> bool:
            served.extend(self._ask(index % len(self._labels)) for index in range(len(served), len(served) + 20))
            return self._in_sync(version)

        wait_until(f"version {version} is active everywhere", everywhere, ACTIVATE_SECONDS)
        self._results.rollout_v2_seconds = time.monotonic() - began
        lost = sum(one.guess is None for one in served)
        self._tell.say(f"{self._results.rollout_v2_seconds:.1f} s; {len(served)} requests meanwhile, {lost} unanswered")

    def _tampered(self, version: str) -> None:
        self._tell.chapter(f"Version {version} is published, then its file is altered on the hub's disk")
        package, edge = digits.PACKAGES["edge"], NODES["edge"]
        folder = make_version(digits.package_folder("edge", "2"), version, self._cluster.folder / "tampered")
        self._cluster.publish(folder)
        break_stored_file(self._cluster.hub_data, folder / "model.onnx")
        self._cluster.deploy("digits-edge", "edge", digits.MODEL, package, version)
        wait_until(
            "the edge refused the tampered version", lambda: self._document(edge, "desired")["state"] in REFUSED, 30.0
        )
        self._results.tampered_reason = str(self._document(edge, "desired")["error"])
        _, facts = predict(self._cluster.urls[edge], digits.MODEL, self._images[:1], min_confidence=0.0)
        self._results.tampered_refused = facts["version"] == "2" and "digest_mismatch" in self._results.tampered_reason
        self._tell.say(f"refused: {self._results.tampered_reason}")
        self._tell.say(f"the edge still answers with {facts['package']}/{facts['version']}")
        self._deploy("2")
        self._wait("2")

    # --- asking, waiting -------------------------------------------------------------------------------------------

    def _ask(self, index: int, min_confidence: float | None = None) -> Served:
        return self._sdk.ask(index, self._images[index], int(self._labels[index]), DEADLINE_MS, min_confidence)

    def _each(self, what: str, count: int) -> Iterator[int]:
        """0..count, telling how far it is."""
        for index in range(count):
            self._tell.progress(f"{what}: {index + 1} of {count}")
            yield index

    def _cloud_answers(self) -> bool:
        unsure = np.argsort([one.tier != "cloud" for one in self._results.cascade], kind="stable")[:1]
        return self._ask(int(unsure[0])).tier == "cloud"

    def _deploy(self, version: str) -> None:
        for tier in TIERS:
            self._cluster.deploy(f"digits-{tier}", tier, digits.MODEL, digits.PACKAGES[tier], version)

    def _in_sync(self, version: str) -> bool:
        for tier in TIERS:
            report = self._cluster.node(NODES[tier]).get("reported") or {}
            if report.get("running", {}).get(digits.MODEL) != f"{digits.PACKAGES[tier]}/{version}":
                return False
        return True

    def _wait(self, version: str) -> None:
        began = time.monotonic()

        def check() -> bool:
            self._tell.progress(f"waiting for version {version} on every tier: {time.monotonic() - began:.1f} s")
            return self._in_sync(version)

        wait_until(f"version {version} is active on every tier", check, ACTIVATE_SECONDS)

    def _document(self, name: str, kind: str) -> dict[str, Any]:
        report = self._cluster.node(name).get("reported") or {}
        found: dict[str, Any] = report.get("documents", {}).get(kind) or {"applied": 0, "state": "", "error": None}
        return found


def _report(found: dict[str, Any], narrator: Narrator) -> None:
    narrator.chapter("What was measured")
    tiers = found["tiers"]
    rows = [
        [tier, *(_cell(tiers[tier][key]) for key in ("requests", "accuracy", "p50_ms", "p99_ms"))] for tier in TIERS
    ]
    narrator.table(["tier", "requests", "accuracy", "p50 ms", "p99 ms"], rows)
    narrator.say(
        f"cascade accuracy {found['cascade_accuracy']}, unanswered {found['unanswered']}, "
        f"in time {found['in_time_share']}"
    )
    for miss in found["misses"]:
        narrator.say(
            f"late: {miss['latency_ms']} ms ({miss['tier']}, {miss['reason']}), event loop lag {miss['loop_lag_ms']} ms"
        )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _interrupt(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not end the stopping
    raise KeyboardInterrupt


def _wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print()
