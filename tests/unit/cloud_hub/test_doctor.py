"""Each of the hub's checks says what is wrong, and what to do, when that one thing is broken."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_in_memory import Bench

import tierline
from cloud_hub.authority import open_authority
from cloud_hub.certificates import HubCertificates
from cloud_hub.doctor import CHECKS
from cloud_hub.doctor_subject import BACKUP_FOLDER, PUBLIC_NAMES, HubSubject
from cloud_hub.identity_records import Known
from sync.doctor.check import Finding
from sync.doctor.runner import run_checks
from sync.events import ALARM, Event
from sync.messages import Capabilities, Reported, State
from sync.testing import FakeClock

DAY = 86_400.0


def ask(subject: HubSubject, name: str) -> Finding:
    return run_checks([check for check in CHECKS if check.name == name], subject)[0].finding


def subject_of(bench: Bench, **environ: str) -> HubSubject:
    return HubSubject(bench.hub.data, clock=bench.clock, environ=environ)


async def test_a_healthy_hub_fails_nothing_and_shows_that_root_keys_are_online(bench: Bench) -> None:
    await bench.publish()
    await bench.add_node("acme.edge-1")
    await bench.born("acme.edge-1")
    results = run_checks(CHECKS, subject_of(bench))
    assert [result for result in results if result.finding.status == "fail"] == []
    warned = {result.name for result in results if result.finding.status == "warn"} - {"machine.time", "machine.files"}
    assert warned == {"hub.process", "keys.root"}  # in one process with its test, so without its lock
    assert len(CHECKS) >= 25


def spoil(path: Path) -> None:
    for each in path.parent.glob(f"{path.name}-*"):
        each.unlink()
    path.write_bytes(path.read_bytes()[:4096] + b"\xa5" * 40_000)


def schema(number: str) -> Callable[[HubSubject], None]:
    def change(hub: HubSubject) -> None:
        with sqlite3.connect(hub.data / "hub.sqlite") as db:
            db.execute("UPDATE alembic_version SET version_num = ?", (number,))
        db.close()

    return change


def approved_file(hub: HubSubject) -> Path:
    with hub.records() as records:
        digest = next(iter(records.approved_files()))
    return hub.data / "blobs" / "sha256" / digest.removeprefix("sha256:")


def cut_blob(hub: HubSubject) -> None:
    path = approved_file(hub)
    path.chmod(0o600)
    path.write_bytes(b"")


def damage_blob(hub: HubSubject) -> None:
    path = approved_file(hub)
    path.chmod(0o600)
    path.write_bytes(b"x" * path.stat().st_size)


def later(seconds: float) -> Callable[[HubSubject], None]:
    return lambda hub: setattr(hub, "clock", FakeClock(hub.clock.wall() + seconds))


def certificate(hub: HubSubject) -> None:
    authority = open_authority(hub.data / "ca", hub.clock.wall())
    HubCertificates(hub.data / "tls", authority, ("hub.example",), hub.clock).refresh()


def wrong_name(hub: HubSubject) -> None:
    certificate(hub)
    hub.environ = {PUBLIC_NAMES: "hub.example,other.example"}


def old_backup(hub: HubSubject) -> None:
    folder = hub.data.parent / "backup"
    (folder / "keys").mkdir(parents=True)
    (folder / "ca").mkdir()
    (folder / "hub.sqlite").write_bytes(b"")
    os.utime(folder / "hub.sqlite", (hub.clock.wall() - 30 * DAY,) * 2)
    hub.environ = {BACKUP_FOLDER: str(folder)}


BROKEN: list[tuple[str, Callable[[HubSubject], Any], str, str, str]] = [
    ("disk.database", lambda h: spoil(h.data / "hub.sqlite"), "fail", "hub.sqlite", "backup"),
    ("disk.schema", schema("0001"), "warn", "schema 0001", "next start"),
    ("disk.schema", schema("9999"), "fail", "later release", "release that wrote it"),
    ("disk.files", cut_blob, "fail", "missing or cut", "publish the package again"),
    ("disk.files", damage_blob, "fail", "damaged", "publish the package again"),
    (
        "disk.backup",
        lambda h: setattr(h, "environ", {BACKUP_FOLDER: "/nowhere"}),
        "fail",
        "no backup of hub.sqlite",
        "every day",
    ),
    ("disk.backup", old_backup, "fail", "30.0 days old", "every day"),
    ("keys.permissions", lambda h: (h.data / "keys" / "bins.key").chmod(0o644), "fail", "keys/bins.key", "chmod 600"),
    ("keys.root", lambda h: None, "warn", "root-1, root-2, root-3", "two of three"),
    ("keys.roles", lambda h: (h.data / "keys" / "snapshot.key").unlink(), "fail", "role snapshot", "tierline keys"),
    ("keys.metadata", later(8 * DAY), "fail", "snapshot", "keys.roles"),
    ("keys.metadata", later(-1), "ok", "left: timestamp", ""),
    ("keys.timestamp", lambda h: (h.data / "tuf" / "timestamp.json").unlink(), "fail", "no timestamp", "keys.roles"),
    ("keys.authority", later(7400 * DAY), "fail", "authority 1 expired", "roll over"),
    ("keys.authority", lambda h: (h.data / "ca" / "1" / "cert.pem").unlink(), "fail", "missing", "backup"),
    ("keys.names", wrong_name, "fail", "not other.example", "--public-name"),
    ("keys.names", lambda h: (certificate(h), later(40 * DAY)(h)), "fail", "expired", "issues a new"),
]


@pytest.mark.parametrize(
    ("name", "harm", "status", "found", "fix"), BROKEN, ids=[f"{row[0]}-{row[3]}" for row in BROKEN]
)
async def test_what_is_broken_is_named_with_its_fix(
    bench: Bench, name: str, harm: Callable[[HubSubject], Any], status: str, found: str, fix: str
) -> None:
    await bench.publish()
    subject = subject_of(bench)
    harm(subject)
    finding = ask(subject, name)
    assert finding.status == status, finding
    assert found in finding.found
    assert fix in finding.fix


async def test_nodes_that_refuse_or_lag_or_are_away_are_named(bench: Bench) -> None:
    await bench.publish()
    for node in ("acme.edge-1", "acme.edge-2", "acme.edge-3"):
        await bench.add_node(node)
    await bench.deploy("d", {"digits": "digits-cnn/1"})
    await bench.born("acme.edge-1")
    await bench.reports("acme.edge-1", revision=2, applied=1, state="refused", error="rejected: no engine")
    await bench.born("acme.edge-2")
    await bench.says("acme.edge-2", "state", State(state="lost", boot="b1"))
    bench.clock.advance(3 * DAY)
    subject = subject_of(bench)
    lost = ask(subject, "fleet.lost")
    assert lost.status == "warn"
    assert "acme.edge-2 (3.0 days)" in lost.found
    assert "never seen: acme.edge-3" in lost.found
    sync = ask(subject, "fleet.sync")
    assert sync.status == "warn"
    assert "acme.edge-" in sync.found


async def test_alarms_refusals_expired_certificates_and_other_releases_are_told(bench: Bench) -> None:
    await bench.add_node("acme.edge-1")
    await bench.says("acme.edge-1", "reported", Reported(boot="b", seq=1, documents={}, refused={"bad_signature": 4}))
    await bench.says("acme.edge-1", "caps", Capabilities(tier="edge", software="0.9.1"))
    now = bench.clock.wall()
    with bench.hub.storage.write() as records:
        alarm = Event(id="e", seq=1, kind=ALARM, body=b"{}", priority=9, at=now)
        records.events.set_alarm("acme.edge-1", "frozen", True, "no fresh timestamp", alarm)
        records.identities.add(Known("1", "acme.edge-1", "f", b"k", 1, (), now - 9 * DAY, now - 2 * DAY))
    subject = subject_of(bench)
    assert "acme.edge-1: frozen, no fresh timestamp" in ask(subject, "fleet.alarms").found
    assert "bad_signature 4" in ask(subject, "fleet.refused").found
    expired = ask(subject, "fleet.certificates")
    assert (expired.status, "2.0 days ago" in expired.found) == ("warn", True)
    assert "acme.edge-1 (0.9.1)" in ask(subject, "fleet.releases").found


async def test_a_hub_that_does_not_run_is_told_and_nothing_waits_for_it(bench: Bench) -> None:
    subject = subject_of(bench)
    assert ask(subject, "hub.process").status == "warn"
    assert ask(subject, "hub.api").status == "skip"


async def test_nothing_is_changed_by_looking(bench: Bench) -> None:
    def seen() -> dict[str, bytes]:
        files = [path for path in bench.hub.data.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
        return {str(path): path.read_bytes() for path in files}

    before = seen()
    run_checks(CHECKS, subject_of(bench))
    assert seen() == before


async def test_neither_report_nor_bundle_of_a_hub_holds_a_secret(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tarfile

    monkeypatch.setenv("HUB_PASSWORD", "canary-hub-5f1e")
    await bench.add_node("acme.edge-1")
    data = bench.hub.data
    secrets = ["canary-hub-5f1e", (data / "admin.token").read_text().strip(), bench.tokens["acme.edge-1"]]
    secrets += [line for line in (data / "ca/1/key.pem").read_text().splitlines() if "-----" not in line]
    secrets += [path.read_bytes().hex() for path in data.glob("keys/*.key")]
    (tmp_path / "hub.log").write_text("\n".join(secrets[:-8]) + "\nall is well\n")
    arguments = ("--hub-data", str(data))
    tierline.main(["doctor", *arguments])
    tierline.main(["doctor", *arguments, "--json"])
    out = tmp_path / "b.tar.gz"
    assert tierline.main(["support-bundle", *arguments, "-o", str(out), "--log", str(tmp_path / "hub.log")]) == 0
    with tarfile.open(out) as archive:
        texts = [archive.extractfile(member).read().decode() for member in archive]  # type: ignore[union-attr]
    everything = "\n".join([*texts, capsys.readouterr().out])
    assert "acme.edge-1" in everything
    assert "all is well" in everything
    for secret in secrets:
        assert secret not in everything
