"""The database keeps what was committed and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError

from cloud_hub.records import MAX_NAMED, Issued, Observation, Package
from cloud_hub.rollout import Deployment, Node, PackageRef
from cloud_hub.storage import Storage
from cloud_hub.tables import Table

REF = PackageRef("digits-cnn", "1")
PACKAGE = Package(REF, "sha256:m", b"{}", published=1.0)
DEPLOYMENT = Deployment("all", "*", {"tier": "edge"}, {"digits": REF})


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "hub.sqlite")


def test_the_migrations_build_exactly_the_tables_that_are_declared(tmp_path: Path) -> None:
    Storage(tmp_path / "hub.sqlite").close()
    with create_engine(f"sqlite:///{tmp_path / 'hub.sqlite'}").connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_a_commit_is_on_disk_before_it_is_acted_upon(storage: Storage) -> None:
    with storage.read() as records:
        pragma = {name: records._session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous")}
        assert records._session.scalar(text("PRAGMA foreign_keys")) == 1
    assert pragma == {"journal_mode": "wal", "synchronous": 2}  # 2 = FULL


def test_an_exception_rolls_everything_back(storage: Storage) -> None:
    def half_way() -> None:
        with storage.write() as records:
            records.add_package(PACKAGE, {"sha256:a": 1})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_way()
    with storage.read() as records:
        assert records.package(REF) is None
        assert records.approved_files() == {}


def test_what_was_written_is_read_after_opening_again(tmp_path: Path, storage: Storage) -> None:
    with storage.write() as records:
        records.add_package(PACKAGE, {"sha256:a": 1, "sha256:m": 2})
        assert records.put_deployment(DEPLOYMENT, at=2.0) is True
        records.add_node(Node("acme.edge-1", "edge", {"line": "2"}, ("g",)), "hash", "broker", at=3.0)
    storage.close()
    with Storage(tmp_path / "hub.sqlite").read() as records:
        assert records.package(REF) == PACKAGE
        assert records.deployments() == [DEPLOYMENT]
        assert records.nodes() == [Node("acme.edge-1", "edge", {"line": "2"}, ("g",))]
        assert records.approved_files() == {"sha256:a": 1, "sha256:m": 2}


def test_a_deployment_cannot_name_a_version_that_was_never_published(storage: Storage) -> None:
    with pytest.raises(IntegrityError), storage.write() as records:
        records.put_deployment(DEPLOYMENT, at=1.0)


def test_replacing_a_deployment_leaves_nothing_of_the_old_one(storage: Storage) -> None:
    with storage.write() as records:
        records.add_package(PACKAGE, {})
        records.put_deployment(DEPLOYMENT, at=1.0)
        replaced = Deployment("all", "acme", {}, {"letters": REF})
        assert records.put_deployment(replaced, at=2.0) is False
        assert records.deployments() == [replaced]
        assert records.delete_deployment("all") is True
        assert records.deployments() == []


def test_pages_follow_each_other_without_gap_or_repetition(storage: Storage) -> None:
    refs = [PackageRef(package, version) for package in ("a", "b") for version in ("1", "2")]
    with storage.write() as records:
        for ref in reversed(refs):
            records.add_package(Package(ref, "sha256:m", b"{}", 1.0), {})
        first = records.packages(3)
        rest = records.packages(3, after=first[-1].ref)
    assert [entry.ref for entry in first + rest] == refs


def test_a_node_that_left_keeps_the_time_when_it_left(storage: Storage) -> None:
    with storage.write() as records:
        records.add_node(Node("acme.edge-1", "edge"), "hash", "broker", at=1.0)
        for at, state in ((10.0, "ready"), (20.0, "lost"), (30.0, "lost")):
            records.observe(Observation("acme.edge-1", at, state=state, boot="b"))
        member = records.member("acme.edge-1")
        assert member is not None
        assert (member.state, member.left, member.seen) == ("lost", 20.0, 30.0)
        records.observe(Observation("acme.edge-1", 40.0, state="ready", boot="b"))
        member = records.member("acme.edge-1")
        assert member is not None
        assert member.left == 0.0


def test_a_stranger_leaves_no_trace(storage: Storage) -> None:
    with storage.write() as records:
        assert records.observe(Observation("acme.stranger", 1.0, state="ready")) == 0
        assert records.members() == []


def issued(scope: str, revision: int = 1, kind: str = "desired") -> Issued:
    return Issued(kind, scope, revision, 0, "k", "sha256:d", b"{}", b"{}", 1.0)


def test_documents_are_found_by_any_number_of_scopes(storage: Storage) -> None:
    scopes = [f"node:t.n{number}" for number in range(MAX_NAMED + 1)]
    with storage.write() as records:
        for scope in scopes:
            records.put_document(issued(scope))
        records.put_document(issued(scopes[0], kind="settings"))
    with storage.read() as records:
        assert set(records.documents_of(("desired",), [*scopes, "node:t.other"])) == {
            ("desired", each) for each in scopes
        }


def test_what_was_foreseen_is_never_older_than_what_was_written(storage: Storage) -> None:
    with storage.write() as records:
        records.put_document(issued("node:t.old"))
    with storage.write() as records:
        records.foresee(("desired",), ["node:t.old", "node:t.new", "node:t.gone"])
        assert records.document("desired", "node:t.new") is None
        for scope in ("node:t.old", "node:t.new", "node:t.gone"):
            records.put_document(issued(scope, 2))
        records.drop_documents("node:t.gone")
        records.burn("desired", "node:t.old", 7)
        found = [records.document("desired", f"node:t.{name}") for name in ("old", "new", "gone")]
    assert [each and (each.revision, each.floor) for each in found] == [(2, 7), (2, 0), None]


def test_nodes_that_speak_at_once_are_remembered_in_order(storage: Storage) -> None:
    with storage.write() as records:
        for name in ("a", "b"):
            records.add_node(Node(f"t.{name}", "edge", {}), name, name, 1.0)
        said = [Observation("t.b", 5.0, state="ready"), Observation("t.x", 5.0, state="ready")]
        assert records.observe(*said, Observation("t.b", 6.0, state="sleeping")) == 2
        members = records.members_named(["t.b", "t.a", "t.x"])
    assert [(each.node.id, each.state, each.seen) for each in members] == [("t.a", "", 0.0), ("t.b", "sleeping", 6.0)]
