"""kill -9 over broker, hub, edge nodes and devices while events and documents flow: `python tests/proofs/kills.py`.

    --kills 1000 --seconds 600 --seed 1     as many kills, spread over about so long
    --json FILE                             the figures, also as JSON

Every process is a real one, started by the command an operator would use, and started again at once after its death. What must
hold, else the exit code is 1: no event whose `put` returned is missing at the hub; none is there twice or counted twice; on
average at most one repetition of a message on the wire; on the disk of a node no document's revision ever goes back, unless
the node has written down why; every ledger balances; and in each of the pauses between the kills the hub sees every node on
its newest documents, and has every promised event, within 30 s.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from proofs.kills_source import KIND

from deploy.local import TENANT, Cluster, cluster
from deploy.processes import DeployError, Process, wait_until
from models.zoo import digits
from sync.outbox_store import read_ledger
from sync.trust import unseal

EDGES, DEVICE, SOURCES = ("edge-1", "edge-2"), "device-1", ("source-1", "source-2")
WEIGHTS = {"broker": 4.0, "hub": 1.0, "edge-1": 2.0, "edge-2": 2.0, "device-1": 2.0, "source-1": 3.0, "source-2": 3.0}
"""How often each is chosen: what starts in a moment is killed more often than what takes a second."""
ROUND_KILLS = 50
"""Kills between two pauses."""
HEAL_SECONDS = 30.0
CHANGE_SECONDS = 2.0
"""Between two changes of what nodes should run."""
PATIENCE_SECONDS = 1.0
"""Of one call to a hub that may be dead."""
UP_SECONDS = 60.0
MAX_REPETITIONS = 1.0


@dataclass
class Role:
    """One process and how to start it again."""

    name: str
    command: list[str]
    log: Path
    process: Process
    kills: int = 0
    talk: bool = False

    def again(self) -> None:
        self.process = Process(self.name, self.command, self.log, talk=self.talk)


@dataclass
class Findings:
    """`heals`: seconds each pause took. `breaches`: what did not hold, in words."""

    kills: Counter[str] = field(default_factory=Counter)
    heals: list[float] = field(default_factory=list)
    promised: int = 0
    kept: int = 0
    lost: int = 0
    twice: int = 0
    repetitions: int = 0
    rollbacks: int = 0
    changes: int = 0
    seconds: float = 0.0
    breaches: list[str] = field(default_factory=list)


class Soak:
    def __init__(self, running: Cluster, seed: int) -> None:
        self._cluster = running
        self._random = random.Random(seed)
        self._roles: dict[str, Role] = {}
        self._revisions: dict[tuple[str, str], int] = {}
        self._http = urllib3.PoolManager(retries=False, timeout=PATIENCE_SECONDS)
        self._version = 0
        self._change_at = 0.0
        self.found = Findings()

    # --- starting -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        running = self._cluster
        running.start_broker()
        running.start_hub()
        for tier in ("device", "edge"):
            for version in digits.VERSIONS:
                running.publish(digits.package_folder(tier, version))
        running.urls["cloud-1"] = "http://127.0.0.1:9"  # nothing listens on the discard port: no cloud in this proof
        for name in EDGES:
            running.start_edge(name)
        running.start_device(DEVICE, edge=EDGES[0])
        for name in SOURCES:
            config = running.configure_device(name, edge=EDGES[0])
            script = [
                sys.executable,
                str(Path(__file__).with_name("kills_source.py")),
                str(config),
                str(self._journal(name)),
            ]
            running.processes[name] = Process(name, script, running.logs / f"{name}.log")
        broker = running.broker._process
        assert broker is not None
        for name, process in {"broker": broker, **running.processes}.items():
            if name in WEIGHTS:
                self._roles[name] = Role(
                    name, _command_of(process, running.urls.get(name)), process.log, process, talk=name == DEVICE
                )

    def stop(self) -> None:
        for role in self._roles.values():
            role.process.stop()

    # --- the soak -----------------------------------------------------------------------------------------------

    def run(self, kills: int, seconds: float) -> Findings:
        began = time.monotonic()
        self._heal("before the first kill", UP_SECONDS)
        self.found.heals.clear()
        done = 0
        while done < kills:
            part = min(ROUND_KILLS, kills - done)
            for _ in range(part):
                left = max(began + 0.9 * seconds - time.monotonic(), 0.0)
                self._wait(self._random.expovariate(1.0) * left / (kills - done))
                self._kill()
                done += 1
            self._heal(f"after {done} kills", HEAL_SECONDS)
            _say(
                f"{done} kills, in sync again after {self.found.heals[-1]:.1f} s, {time.monotonic() - began:.0f} s so far"
            )
        self._finish()
        self.found.seconds = round(time.monotonic() - began, 1)
        return self.found

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            if time.monotonic() >= self._change_at:
                self._change()
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.05))

    def _kill(self) -> None:
        name = self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        role = self._roles[name]
        if not role.process.alive:
            self.found.breaches.append(f"{name} ended by itself with {role.process.returncode}\n{role.process.tail()}")
        role.process.kill()
        self.found.kills[name] += 1
        if name not in ("broker", "hub"):
            self._look_at_disk(name)
        role.again()

    def _change(self) -> None:
        """Another version for edges and devices, and a policy: for a hub that may be dead just now."""
        self._change_at = time.monotonic() + CHANGE_SECONDS
        self._version += 1
        version = digits.VERSIONS[self._version % 2]
        threshold = round(0.5 + 0.4 * self._random.random(), 6)
        calls: list[tuple[str, object]] = [
            (
                f"/api/v1/deployments/{tier}",
                {
                    "tenant": TENANT,
                    "selector": {"tier": tier},
                    "models": {digits.MODEL: f"{digits.PACKAGES[tier]}/{version}"},
                },
            )
            for tier in ("edge", "device")
        ]
        rules = [{"model": digits.MODEL, "tier": tier, "min_confidence": threshold} for tier in ("device", "edge")]
        calls.append((f"/api/v1/policies/{TENANT}", {"rules": rules}))
        for path, body in calls:
            self.found.changes += self._call("PUT", path, body) is not None

    # --- what must hold -----------------------------------------------------------------------------------------

    def _heal(self, when: str, patience: float) -> None:
        """Everything runs and nothing is killed: until the hub sees the newest everywhere and has every event."""
        self._change_at = float("inf")
        began = time.monotonic()
        told = False
        promised: set[str] = set()
        why = "nothing was looked at"
        while time.monotonic() - began < patience:
            if not told:
                before = self.found.changes
                self._change()
                self._change_at = float("inf")
                told = self.found.changes >= before + 3
                promised = self._promised()
                why = "the hub does not take a change"
                time.sleep(0.1)
                continue
            why = self._out_of_sync() or self._missing(promised)
            if not why:
                break
            time.sleep(0.1)
        else:
            self.found.breaches.append(f"{when}: not in sync within {patience:g} s: {why}")
        self.found.heals.append(round(time.monotonic() - began, 2))
        self._change_at = 0.0

    def _out_of_sync(self) -> str:
        for name in (*EDGES, DEVICE, *SOURCES):
            node = self._call("GET", f"/api/v1/nodes/{TENANT}.{name}")
            if node is None:
                return "the hub does not answer"
            if node["state"] != "ready" or not all(_settled(each) for each in node["documents"].values()):
                return f"{name}: {node['state']}, {json.dumps(node['documents'])}"
        return ""

    def _missing(self, promised: set[str]) -> str:
        missing = promised - set(self._kept())
        return f"{len(missing)} of {len(promised)} promised events are not at the hub" if missing else ""

    def _look_at_disk(self, name: str) -> None:
        """A dead node's documents: revisions may only have grown since its last death."""
        path = self._cluster.folder / name / "state.db"
        if not path.exists():
            return
        with closing(sqlite3.connect(path)) as db:
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
            if not {"floors", "slots", "condemned"} <= tables:
                return
            floors = dict(db.execute("SELECT kind, revision FROM floors"))
            active = {
                kind: unseal(envelope)
                for kind, envelope in db.execute("SELECT kind, envelope FROM slots WHERE slot = 'active'")
            }
            condemned = {kind for kind, _ in db.execute("SELECT kind, digest FROM condemned")}
        for kind, revision in floors.items():
            self._only_grows(f"{name} floor", kind, revision, excused=False)
        for kind, verified in active.items():
            self._only_grows(f"{name} active", kind, verified.document.revision, excused=kind in condemned)

    def _only_grows(self, what: str, kind: str, revision: int, *, excused: bool) -> None:
        before = self._revisions.get((what, kind), 0)
        self._revisions[what, kind] = revision
        if revision < before and excused:
            self.found.rollbacks += 1
        elif revision < before:
            self.found.breaches.append(f"{what}: {kind} went from revision {before} to {revision}")

    def _finish(self) -> None:
        """Stop in order, then count."""
        for name in SOURCES:
            self._roles[name].process.stop()
        for name in SOURCES:
            ledger = read_ledger(self._cluster.folder / name / "outbox.db")
            if ledger.imbalance or ledger.set_aside:
                self.found.breaches.append(f"{name}: the ledger does not balance: {ledger}")
            dropped = sum(sum(stream.dropped.values()) for stream in ledger.streams.values())
            if dropped:
                self.found.breaches.append(f"{name}: {dropped} events were dropped within the quota")
        found, promised, kept = self.found, self._promised(), self._kept()
        # What was put in the last moments may still wait in an outbox that has been stopped: that is pending, not lost.
        pending = {id_ for name in SOURCES for id_ in self._pending(name)}
        found.promised, found.kept = len(promised), len(kept)
        found.lost = len(promised - set(kept) - pending)
        found.twice = sum(count - 1 for count in kept.values()) + self._counted_twice() + self._same_bodies()
        found.repetitions = self._sum("duplicates")
        for count, what in (
            (found.lost, "promised events are not at the hub"),
            (found.twice, "events took effect twice"),
        ):
            if count:
                found.breaches.append(f"{count} {what}")
        if found.repetitions > MAX_REPETITIONS * max(found.kept, 1):
            found.breaches.append(f"{found.repetitions} repetitions of {found.kept} messages on the wire")
        if not found.kept:
            found.breaches.append("no event arrived: nothing was proved about them")

    def _promised(self) -> set[str]:
        """Whole lines of the journals; the last one may be cut off by a kill."""
        ids: set[str] = set()
        for name in SOURCES:
            with suppress(FileNotFoundError):
                ids.update(line for line in self._journal(name).read_text().split("\n")[:-1] if len(line) == 26)
        return ids

    def _kept(self) -> Counter[str]:
        return Counter(row[0] for row in self._select("SELECT id FROM events WHERE kind = ?", KIND))

    def _counted_twice(self) -> int:
        """The counter grows in the transaction that stores the event: a difference is an effect too many."""
        rows = sum(self._kept().values())
        return abs(self._sum("received") - rows)

    def _same_bodies(self) -> int:
        bodies = Counter(row[0] for row in self._select("SELECT node || ':' || body FROM events WHERE kind = ?", KIND))
        return sum(count - 1 for count in bodies.values())

    def _sum(self, column: str) -> int:
        assert column in ("received", "duplicates")
        (row,) = self._select(f"SELECT coalesce(sum({column}), 0) FROM event_counts WHERE kind = ?", KIND)  # noqa: S608
        return int(row[0])

    def _select(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._cluster.hub_data / "hub.sqlite", timeout=10)) as db:
            return db.execute(query, values).fetchall()

    def _pending(self, name: str) -> list[str]:
        with closing(sqlite3.connect(self._cluster.folder / name / "outbox.db", timeout=10)) as db:
            return [row[0] for row in db.execute("SELECT id FROM events")]

    def _journal(self, name: str) -> Path:
        return self._cluster.folder / f"{name}.journal"

    def _call(self, method: str, path: str, body: object = None) -> Any:
        """The answer, or None from a hub that is dead, starting, or busy."""
        headers = {
            "authorization": f"Bearer {(self._cluster.hub_data / 'admin.token').read_text().strip()}",
            "content-type": "application/json",
        }
        data = None if body is None else json.dumps(body).encode()
        try:
            answer = self._http.request(method, self._cluster.urls["hub"] + path, body=data, headers=headers)
            if answer.status == 503:
                return None
            if answer.status >= 300:
                raise DeployError(f"{method} {path}: {answer.status} {answer.data[:300]!r}")
            return json.loads(answer.data) if answer.data else {}
        except urllib3.exceptions.HTTPError:
            return None


def _command_of(process: Process, url: str | None) -> list[str]:
    """Its own command line, as the kernel has it, with the port that it chose: it has to come back there."""
    wait_until(f"{process.name} runs", lambda: bool(_arguments(process.pid)), 5.0, process)
    command = _arguments(process.pid)
    if "--http-port" in command and url is not None:
        command[command.index("--http-port") + 1] = str(urlsplit(url).port)
    return command


def _arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


def _say(text: str) -> None:
    print(text, flush=True)


def table(found: Findings) -> str:
    heals = sorted(found.heals) or [0.0]
    rows = [
        (
            "kill -9",
            sum(found.kills.values()),
            ", ".join(f"{name} {count}" for name, count in sorted(found.kills.items())),
        ),
        ("seconds", found.seconds, ""),
        ("changes of documents", found.changes, f"{found.rollbacks} rolled back by a node that had crashed too often"),
        ("events promised", found.promised, f"{found.kept} at the hub"),
        ("events lost", found.lost, "must be 0"),
        ("events applied twice", found.twice, "must be 0"),
        (
            "repetitions per message",
            round(found.repetitions / max(found.kept, 1), 3),
            f"at most {MAX_REPETITIONS:g} on average",
        ),
        (
            "in sync after healing",
            heals[-1],
            f"seconds, the worst of {len(heals)}; median {heals[len(heals) // 2]}; at most 30",
        ),
        ("breaches", len(found.breaches), ""),
    ]
    return "\n".join(f"{name:<26}{value!s:>10}   {note}" for name, value, note in rows)


def _settled(document: Mapping[str, Any]) -> bool:
    """In force; or killed three times before it had proved itself and so taken back, which a node cannot tell from a crash
    loop: it says so, and the hub knows."""
    if document["sync"] == "in_sync":
        return True
    taken_back = "ended this process" in (document["error"] or "")
    return bool(taken_back and document["sync"] == "refused" and document["reported"] == document["revision"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=600.0, help="spread over about so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--folder", type=Path, help="keep everything there; default: a folder that is removed when all held"
    )
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    with cluster(folder) as running:
        soak = Soak(running, options.seed)
        try:
            soak.start()
            found = soak.run(options.kills, options.seconds)
        finally:
            soak.stop()
    print(table(found))
    for breach in found.breaches:
        print(f"NOT KEPT: {breach}")
    if options.json:
        options.json.write_text(json.dumps({**found.__dict__, "kills": dict(found.kills)}, indent=2))
    if found.breaches:
        print(f"logs are in {running.logs}")
        return 1
    if options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
