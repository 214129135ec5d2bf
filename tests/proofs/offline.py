"""Four hundred days offline: `python tests/proofs/offline.py` lets an enrolled edge node and a device lose hub and broker for
that long, in a few minutes.

Every process runs under Debian's `faketime`, so OpenSSL, python-tuf, SQLite, mosquitto and the event loops' own clocks all see
the same days pass, this process included; they jump while the processes run. On the way certificates expire (7 days), 2^31
milliseconds pass (25 days), the update repository's root expires (365 days); edge and device are restarted without any
network, once with the clock at 1970. What must hold: the same answers throughout, as fast; then, when hub and broker are
back (and an operator has renewed the root, which is his to do once a year), both nodes renew their certificates by
themselves, deliver every event, once, and take the update that was made meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cloud_hub.client import HubClient
from deploy.predict import predict
from deploy.processes import Process, announced, free_port, tierline, wait_until
from models.zoo import digits

LIBRARIES = ("/usr/lib/x86_64-linux-gnu/faketime", "/usr/lib/aarch64-linux-gnu/faketime", "/usr/lib/faketime")
EDGE, DEVICE = "acme.edge-1", "acme.device-1"
DAYS = (1, 8, 26, 90, 200, 366, 400)
RESTARTED = (26, 200, 400)
ASKED = 50
BACK_SECONDS = 120.0
SLOWER = 3.0
"""How many times slower the median answer may be offline; the machine this runs on is noisy."""


class World:
    """All processes, one clock for all of them, and what the nodes answer."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self._clock = Path(os.environ["FAKETIME_TIMESTAMP_FILE"])
        self._born = time.time()
        self.processes: dict[str, Process] = {}
        self.urls: dict[str, str] = {}
        self._ports = {name: free_port() for name in ("hub", "mqtts", "mqtt", "edge")}
        self.latencies: list[float] = []
        self.images, _ = digits.held_out()

    # --- the clock ------------------------------------------------------------------------------------------------

    def set_days(self, days: float) -> None:
        """Move everybody's clock. Backwards only while nothing runs: no real monotonic clock does that."""
        self._clock.write_text(f"{days * 86_400:+.0f}")

    def set_1970(self) -> None:
        self.set_days(1 - self._born / 86_400)

    # --- the processes --------------------------------------------------------------------------------------------

    def start(self, name: str, *command: str, talk: bool = False) -> Process:
        process = Process(name, list(command), self.folder / f"{name}.log", talk=talk)
        self.processes[name] = process
        self._stack.callback(process.stop)
        return process

    def stop(self, *names: str) -> None:
        for name in names:
            self.processes[name].stop()

    @property
    def hub_data(self) -> Path:
        return self.folder / "hub"

    def start_cloud(self) -> HubClient:
        """Hub and broker, with TLS; the broker asks the hub for its certificate and whom to let in."""
        (self.hub_data / "hub.json").unlink(missing_ok=True)
        hub = self.start(
            "hub",
            *tierline(
                *("hub", "--data", str(self.hub_data), "--http-port", str(self._ports["hub"])),
                *("--broker", f"mqtts://127.0.0.1:{self._ports['mqtts']}", "--public-name", "127.0.0.1"),
                *("--public-broker", f"mqtts://127.0.0.1:{self._ports['mqtts']}"),
            ),
        )
        self.urls["hub"] = str(announced(hub, self.hub_data / "hub.json")["url"])
        token, ca = self.hub_data / "admin.token", self.hub_data / "tls" / "ca.pem"
        self.start(
            "broker",
            *tierline(
                *("broker", str(self.folder / "broker"), "--port", str(self._ports["mqtt"])),
                *("--hub", self.urls["hub"], "--token-file", str(token), "--hub-ca", str(ca)),
                *("--public-name", "127.0.0.1", "--tls-port", str(self._ports["mqtts"]), "--tls-bind", "127.0.0.1"),
            ),
        )
        return HubClient(self.urls["hub"], token.read_text().strip(), ca)

    def join(self, client: HubClient, command: str, node: str) -> Path:
        """Enrol a node as its installer would; its configuration."""
        body = {"id": node, "tier": command}
        token = str(client.send("POST", "/api/v1/invitations", body)["token"])
        folder = self.folder / command
        arguments = (command, "join", self.urls["hub"], "--token", token, "--folder", str(folder))
        run = subprocess.run(tierline(*arguments), capture_output=True, text=True, timeout=60, check=False)
        if run.returncode:
            raise RuntimeError(f"joining failed: {run.stderr}")
        return folder / "node.toml"

    def start_edge(self) -> None:
        config = self.folder / "edge" / "node.toml"
        (self.folder / "edge" / "edge.json").unlink(missing_ok=True)
        self.start("edge", *tierline("edge", str(config), "--http-port", str(self._ports["edge"])))
        self.urls["edge"] = f"http://127.0.0.1:{self._ports['edge']}"
        wait_until("the edge answers", self._edge_answers, 60.0, self.processes["edge"])

    def _edge_answers(self) -> bool:
        try:
            self.ask_edge(1)
        except Exception:  # noqa: BLE001 - not yet
            return False
        return True

    def start_device(self) -> None:
        script = Path(__file__).with_name("offline_device.py")
        arguments = (str(self.folder / "device" / "node.toml"), str(self.folder / "journal"))
        self.start("device", sys.executable, str(script), *arguments, talk=True)

    # --- what they answer -----------------------------------------------------------------------------------------

    def ask_edge(self, count: int = ASKED) -> list[int]:
        found = []
        for index in range(count):
            began = time.perf_counter()
            outputs, _ = predict(self.urls["edge"], digits.MODEL, self.images[index : index + 1], min_confidence=0.0)
            self.latencies.append(time.perf_counter() - began)
            found.append(int(np.argmax(outputs)))
        return found

    def tell_device(self, word: str) -> Any:
        return json.loads(self.processes["device"].ask(word.encode()))

    def answers(self) -> tuple[list[int], list[int]]:
        """What edge and device say now. Also lets an event be promised."""
        self.tell_device("event")
        return self.ask_edge(), self.tell_device("ask")

    def restart_nodes(self) -> None:
        self.stop("edge", "device")
        self.start_edge()
        self.start_device()


def deploy(client: HubClient, version: str) -> None:
    for tier in ("edge", "device"):
        models = {digits.MODEL: f"{digits.PACKAGES[tier]}/{version}"}
        body = {"tenant": "acme", "selector": {"tier": tier}, "models": models}
        client.send("PUT", f"/api/v1/deployments/digits-{tier}", body)


def publish(world: World, client: HubClient, version: str) -> None:
    from cloud_hub.client import publish_folder

    for tier in ("edge", "device"):
        publish_folder(client, digits.package_folder(tier, version))


def runs(client: HubClient, version: str) -> Callable[[], bool]:
    def check() -> bool:
        for node, tier in ((EDGE, "edge"), (DEVICE, "device")):
            running = client.get(f"/api/v1/nodes/{node}")["running"]
            if running.get(digits.MODEL) != f"{digits.PACKAGES[tier]}/{version}":
                return False
        return True

    return check


def received(client: HubClient) -> list[str]:
    """Ids of the device's events at the hub."""
    page = client.get("/api/v1/events", {"node": DEVICE, "kind": "app.offline", "limit": "200"})
    return [event["id"] for event in page["items"]]


def prove(world: World) -> int:
    problems: list[str] = []
    client = world.start_cloud()
    world.join(client, "edge", EDGE)
    world.join(client, "device", DEVICE)
    publish(world, client, "1")
    deploy(client, "1")
    world.start_edge()
    world.start_device()
    wait_until("both run version 1", runs(client, "1"), 60.0)
    baseline = world.answers()
    usual = statistics.median(world.latencies[1:])
    print(f"day   0: both answer, median {usual * 1e3:.2f} ms at the edge; hub and broker go away", flush=True)
    client.close()
    world.stop("broker", "hub")
    for day in DAYS:
        world.set_days(day)
        time.sleep(2.5)  # everybody reads the clock anew
        if day in RESTARTED:
            world.restart_nodes()
        world.latencies.clear()
        same = world.answers() == baseline
        median = statistics.median(world.latencies)
        print(f"day {day:3d}: {'the same answers' if same else 'OTHER ANSWERS'}, median {median * 1e3:.2f} ms"
              f"{', restarted' if day in RESTARTED else ''}", flush=True)  # fmt: skip
        if not same:
            problems.append(f"other answers on day {day}")
        if median > SLOWER * usual:
            problems.append(f"slower on day {day}")
    problems += born_in_1970(world, baseline)
    problems += come_back(world)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def born_in_1970(world: World, baseline: tuple[list[int], list[int]]) -> list[str]:
    """A board without a battery starts there."""
    world.stop("edge", "device")
    world.set_1970()
    world.start_edge()
    world.start_device()
    same = world.answers() == baseline
    print(f"1970   : {'the same answers' if same else 'OTHER ANSWERS'}, restarted with the clock there", flush=True)
    world.stop("edge", "device")
    world.set_days(DAYS[-1])
    world.start_edge()
    world.start_device()
    return [] if same else ["other answers in 1970"]


def come_back(world: World) -> list[str]:
    """Hub and broker start again, 400 days later; a new version waits. The root expired meanwhile: its keepers renew it."""
    renewed = tierline("keys", "renew-root", "--data", str(world.hub_data))
    subprocess.run(renewed, check=True, capture_output=True, timeout=60)
    client = world.start_cloud()
    publish(world, client, "2")
    deploy(client, "2")
    began, problems = time.monotonic(), []
    try:
        wait_until("both nodes run version 2", runs(client, "2"), BACK_SECONDS)
        print(f"back   : certificates renewed and version 2 taken after {time.monotonic() - began:.0f} s", flush=True)
    except Exception as error:  # noqa: BLE001 - the rest is still worth knowing
        problems.append(f"no update after the return: {error}")
    promised = (world.folder / "journal").read_text().split()
    try:
        wait_until("every event is at the hub", lambda: set(promised) <= set(received(client)), BACK_SECONDS)
    except Exception as error:  # noqa: BLE001
        problems.append(f"events: {error}")
    there = received(client)
    print(f"events : {len(promised)} promised on the device, {len(there)} at the hub, {len(set(there))} different")
    if sorted(there) != sorted(promised):
        problems.append("an event is lost, doubled or unknown")
    client.close()
    return problems


def under_faketime(library: Path) -> int:
    """This very program again, with a clock that can be set; its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Path(folder) / "clock"
        clock.write_text("+0")
        faked = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
        }
        return subprocess.run([sys.executable, *sys.argv], env={**os.environ, **faked}, check=False).returncode


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if "FAKETIME_TIMESTAMP_FILE" not in os.environ:
        library = next((path for each in LIBRARIES if (path := Path(each) / "libfaketimeMT.so.1").exists()), None)
        if library is not None:
            return under_faketime(library)
        print("this proof needs faketime (Debian, Ubuntu: apt install faketime)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        return prove(World(Path(folder), stack))


if __name__ == "__main__":
    sys.exit(main())
