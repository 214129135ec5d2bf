"""Each check of the node's table says what is wrong, and what to do, when that one thing is broken."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doctor_nodes import BLOB, DAY, NODE, NOW, make_node, metadata, subject_in

from sync.doctor.check import Finding
from sync.doctor.node import NODE as TABLE
from sync.doctor.runner import run_checks
from sync.doctor.subject import NodeSubject
from sync.quota import Quota
from sync.state import Approval, Progress, StateStore
from sync.testing import FakeClock
from sync.trust import Keyring, SigningKey, digest_of, encode_keyring


def ask(subject: NodeSubject, name: str) -> Finding:
    return run_checks([check for check in TABLE if check.name == name], subject)[0].finding


@pytest.fixture
def node(tmp_path: Path) -> NodeSubject:
    return make_node(tmp_path)


OFFLINE = [
    check.name for check in TABLE if check.group not in ("network", "broker", "machine") and check.name != "clock.hub"
]


@pytest.mark.parametrize("name", OFFLINE)
def test_a_healthy_node_has_nothing_to_mend(node: NodeSubject, name: str) -> None:
    finding = ask(node, name)
    assert finding.status in ("ok", "skip"), finding
    assert finding.fix == ""


def with_state(subject: NodeSubject, change: Callable[[StateStore], Any]) -> None:
    state = StateStore(subject.data / "state.db")
    change(state)
    state.close()


def spoil(path: Path) -> None:
    for each in path.parent.glob(f"{path.name}-*"):
        each.unlink()
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))


def unbalance(subject: NodeSubject) -> None:
    with sqlite3.connect(subject.data / "outbox.db") as db:
        db.execute("UPDATE counters SET count = count + 2 WHERE what = 'enqueued'")
    db.close()


def other_keyring(state: StateStore) -> None:
    ring = encode_keyring(Keyring((SigningKey.from_bytes(b"\1" * 32).key("desired"),)))
    state.approve(Approval(NOW + DAY, NOW, digest_of(ring), ring))


def blob(subject: NodeSubject) -> Path:
    return subject.data / "blobs" / digest_of(BLOB).removeprefix("sha256:")


def cached(subject: NodeSubject, role: str, version: int, seconds: float) -> None:
    (subject.data / "tuf").mkdir(exist_ok=True)
    (subject.data / "tuf" / f"{role}.json").write_bytes(metadata(role, version, seconds))


def root_of(subject: NodeSubject, content: bytes) -> None:
    (subject.data.parent / "root.json").write_bytes(content)


BROKEN: list[tuple[str, Callable[[NodeSubject], Any], str, str, str]] = [
    # check, what is done to the node, status, what is found, what is to be done
    ("config.files", lambda n: (n.data.parent / "root.json").unlink(), "fail", "node.root", "join the hub again"),
    ("disk.room", lambda n: setattr(n, "quota", Quota(free_bytes=1 << 60)), "fail", "stay free", "make room"),
    ("disk.room", lambda n: setattr(n, "quota", Quota(max_bytes=1)), "warn", "files take 21 B of 1 B", "max_bytes"),
    ("disk.format", lambda n: (n.data / "format").write_text("99\n"), "fail", "format 99", "later release"),
    ("disk.state", lambda n: spoil(n.data / "state.db"), "fail", "state.db", "the hub sends all again"),
    ("disk.outbox", lambda n: (n.data / "outbox.db").write_bytes(b"x" * 9000), "fail", "outbox.db", "puts it aside"),
    ("disk.ledger", unbalance, "fail", "without a known end: alarm: 2", "support bundle"),
    ("store.present", lambda n: blob(n).unlink(), "fail", "1 of 1 files are missing", "restart the node"),
    ("store.hashes", lambda n: blob(n).write_bytes(b"other"), "fail", "damaged", "delete the damaged file"),
    ("identity.key", lambda n: (n.data.parent / "token").chmod(0o644), "fail", "others may read it", "chmod 600"),
    ("trust.root", lambda n: root_of(n, metadata("root", 1, -DAY)), "fail", "version 1 expired", "renew-root"),
    ("trust.root", lambda n: root_of(n, metadata("root", 1, 20 * DAY)), "warn", "20.0 days", "renew-root"),
    ("trust.root", lambda n: root_of(n, b"[]"), "fail", "no root metadata", "copy"),
    (
        "trust.timestamp",
        lambda n: setattr(n, "clock", FakeClock(NOW + 3 * DAY)),
        "fail",
        "expired 2.0 days ago",
        "network.files",
    ),
    ("trust.metadata", lambda n: cached(n, "targets", 2, -DAY), "fail", "expired: snapshot 5", "network.files"),
    ("trust.floor", lambda n: cached(n, "snapshot", 4, DAY), "warn", "snapshot 4 is below 5", "delete the folder tuf/"),
    ("trust.keyring", lambda n: with_state(n, other_keyring), "warn", "counts no more: desired", "deploy again"),
    ("trust.documents", lambda n: with_state(n, other_keyring), "warn", "bad_signature", "hub sends a new one"),
    (
        "trust.progress",
        lambda n: with_state(
            n,
            lambda s: s.record(
                "desired", f"node:{NODE}", Progress("refused", 4, "d", NOW - 7200, error="rejected: no")
            ),
        ),
        "warn",
        "desired 4 refused for 2.0 h: rejected: no",
        "under a new version",
    ),
    (
        "clock.floor",
        lambda n: setattr(n, "clock", FakeClock(NOW - DAY)),
        "fail",
        "before a time that is known",
        "set the clock",
    ),
]


@pytest.mark.parametrize(
    ("name", "harm", "status", "found", "fix"), BROKEN, ids=[f"{row[0]}-{row[3]}" for row in BROKEN]
)
def test_what_is_broken_is_named_with_its_fix(
    node: NodeSubject, name: str, harm: Callable[[NodeSubject], Any], status: str, found: str, fix: str
) -> None:
    harm(node)
    finding = ask(node, name)
    assert finding.status == status, finding
    assert found in finding.found
    assert fix in finding.fix


def test_a_stale_timestamp_is_a_warning_before_it_expires(node: NodeSubject) -> None:
    approval = node.kept().approval
    assert approval is not None
    with_state(node, lambda state: state.approve(replace(approval, refreshed=NOW - 2 * DAY)))
    fresh = subject_in(node.data.parent, node.node.broker)
    assert ask(fresh, "trust.timestamp").status == "warn"


def test_a_folder_that_cannot_be_written_is_named(node: NodeSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as system:
        # Taking the right away from the folder would not stop root, as whom some build machines run.
        system.setattr(Path, "open", refuse)
        finding = ask(node, "disk.writable")
    assert finding.status == "fail"
    assert "chown" in finding.fix


def test_a_running_node_is_seen_by_its_lock_and_not_disturbed(node: NodeSubject) -> None:
    with (node.data / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"process {os.getpid()}" in ask(node, "disk.lock").found
        assert ask(node, "broker.login").status == "skip"
    assert "nobody" in ask(node, "disk.lock").found


def test_nothing_is_changed_on_the_disk_by_looking(node: NodeSubject) -> None:
    def seen() -> dict[str, bytes]:
        # An empty write-ahead log may go: SQLite tidies up behind whoever closes a database last.
        files = [p for p in node.data.rglob("*") if p.is_file() and not p.name.endswith("-shm")]
        return {str(p): content for p in files if (content := p.read_bytes())}

    before = seen()
    run_checks([check for check in TABLE if check.name in OFFLINE], node)
    assert seen() == before


def test_a_node_that_never_ran_is_no_fault(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    for path in node.data.iterdir():
        if path.is_file():
            path.unlink()
    for name in ("disk.state", "disk.outbox", "trust.timestamp", "clock.floor", "store.present"):
        assert ask(node, name).status == "skip"


def test_a_table_of_another_release_is_read_as_far_as_it_goes(node: NodeSubject) -> None:
    with sqlite3.connect(node.data / "state.db") as db:
        db.execute("DROP TABLE progress")
    db.close()
    assert ask(node, "trust.progress").status == "skip"
    assert ask(node, "trust.documents").status == "ok"


def test_a_proxy_of_the_environment_is_told_without_its_password(node: NodeSubject) -> None:
    node.environ = {"https_proxy": "http://user:hush-hush-1@proxy.example:3128"}
    finding = ask(node, "machine.proxies")
    assert finding.status == "warn"
    assert finding.found == "https_proxy = proxy.example:3128: tierline does not use these"


def test_names_of_checks_are_unique_and_every_check_says_what_it_does_and_how_to_mend_it() -> None:
    assert len({check.name for check in TABLE}) == len(TABLE) >= 30
    for check in TABLE:
        assert check.what
        assert check.fix
        assert "." in check.name


def test_documents_are_json_that_holds_no_surprise(node: NodeSubject) -> None:
    assert json.loads(node.active("desired") or b"null") == {"models": {}}
