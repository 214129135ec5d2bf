"""Updates in one file: from a real hub's repository to a node that never had a network, and everything it must refuse."""

from __future__ import annotations

import asyncio
import io
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import httpx
import msgspec
import pytest
from hub_in_memory import Bench

from cloud_hub.app import create_app
from cloud_hub.bundle_cli import bundle
from cloud_hub.hub import open_hub
from models.desired import decode_desired, digests_of
from sync import bundle_watch
from sync.bundle import MAX_METADATA_BYTES, Index, unpack
from sync.bundle_import import FOLDER, Taken, take_in
from sync.bundle_watch import Outcome
from sync.clock import SystemClock
from sync.errors import BadSignature, DigestMismatch, Expired, Malformed, NotListed, Replayed, SyncError, WrongScope
from sync.identity import Membership
from sync.member import Member, join
from sync.messages import Capabilities
from sync.quota import Quota
from sync.testing import FakeActivator, FakeClock, MemoryBroker, MemoryLink

NODE = "acme.edge-1"


@asynccontextmanager
async def running_hub(folder: Path) -> AsyncIterator[Bench]:
    broker = MemoryBroker()
    async with MemoryLink(broker) as link, open_hub(folder, link, epoch="e1") as hub:
        token = (hub.data / "admin.token").read_text().strip()
        headers = {"authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(create_app(hub))
        async with httpx.AsyncClient(transport=transport, base_url="http://hub", headers=headers) as client:
            yield Bench(hub, client, broker, link, FakeClock())


async def deployed(bench: Bench, version: str = "1") -> None:
    if version == "1":
        await bench.add_node(NODE)
        await bench.add_node("acme.edge-2")
    await bench.publish(version=version)
    await bench.deploy("all", {"digits": f"digits-cnn/{version}"}, expect=201 if version == "1" else 200)


async def exported(bench: Bench, path: Path, **query: str) -> Path:
    answer = await bench.client.get("/api/v1/bundle", params=query or {"node": NODE})
    assert answer.status_code == 200, answer.text
    path.write_bytes(answer.content)
    return path


class Gateway:
    """A node that reaches nobody."""

    def __init__(self, folder: Path, root: bytes, node: str = NODE) -> None:
        folder.mkdir(parents=True)
        (folder / "root.json").write_bytes(root)
        (folder / "token").write_bytes(b"secret")
        (folder / "token").chmod(0o600)
        self.config = folder / "node.toml"
        self.config.write_text(
            f'[node]\nid = "{node}"\ntier = "edge"\nbroker = "mqtt://127.0.0.1:1"\nroot = "root.json"\n'
            'credential = "token"\ndata = "data"\n\n[up]\nurl = "http://127.0.0.1:1"\n'
        )
        self.membership = Membership(
            id=node,
            tier="edge",
            broker="mqtt://127.0.0.1:1",
            root=folder / "root.json",
            credential=folder / "token",
            data=folder / "data",
        )
        self.desired, self.policy = FakeActivator(), FakeActivator()

    def plan_all(self) -> None:
        """Want every file that the document names."""
        self.desired.plan = lambda body, capabilities: digests_of(decode_desired(body))  # type: ignore[method-assign]

    async def take(self, path: Path, clock: FakeClock | SystemClock | None = None) -> Taken:
        return await asyncio.to_thread(take_in, path, self.membership, clock or SystemClock())

    def outcome(self, taken: Taken) -> Outcome:
        path = self.membership.data / FOLDER / f"{taken.name}.json"
        return msgspec.json.decode(path.read_bytes(), type=Outcome)

    @asynccontextmanager
    async def running(self, quota: Quota | None = None) -> AsyncIterator[Member]:
        self.plan_all()
        async with (
            MemoryLink(MemoryBroker()) as link,
            join(
                self.membership,
                activators={"desired": self.desired, "policy": self.policy},
                capabilities=Capabilities(tier="edge"),
                running=dict,
                link=link,
                quota=quota,
            ) as member,
        ):
            yield member


async def until(happened: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not happened():
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_watch, "POLL_SECONDS", 0.05)


@pytest.mark.parametrize("started", ["before", "after"])
async def test_a_node_without_any_network_is_updated_from_a_file(tmp_path: Path, started: str) -> None:
    async with running_hub(tmp_path / "hub") as bench:
        await deployed(bench)
        path = await exported(bench, tmp_path / "updates.tar")
        node = Gateway(tmp_path / "node", bench.hub.root)
    taken = await node.take(path) if started == "after" else None
    async with node.running() as member:
        taken = taken or await node.take(path)
        assert taken.documents == {"desired": 1}
        await until((node.membership.data / FOLDER / f"{taken.name}.json").exists)
        assert node.outcome(taken).states["desired"] in ("probation", "applied")
        assert node.desired.active is not None
        (_, blobs) = node.desired.prepared[0]
        assert b"model 1" in blobs.values()
        assert not (node.membership.data / FOLDER / taken.name).exists()
        assert [source.url for source in member.fetcher.sources] == ["mqtt:"]


async def test_a_stale_bundle_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub") as bench:
        await deployed(bench)
        old = await exported(bench, tmp_path / "old.tar")
        await deployed(bench, "2")
        new = await exported(bench, tmp_path / "new.tar")
        node = Gateway(tmp_path / "node", bench.hub.root)
    taken = await node.take(new)
    async with node.running():
        await until((node.membership.data / FOLDER / f"{taken.name}.json").exists)
    with pytest.raises(Replayed, match=r"must be >=|already accepted"):
        await node.take(old)
    late = FakeClock(time.time() + 8 * 86_400)
    with pytest.raises(Expired):
        await node.take(new, late)
    assert [path.name for path in (node.membership.data / FOLDER).iterdir()] == [f"{taken.name}.json"]


async def test_a_foreign_bundle_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub") as bench, running_hub(tmp_path / "other") as other:
        await deployed(bench)
        await deployed(other)
        path = await exported(bench, tmp_path / "updates.tar", node="acme.edge-2")
        foreign = await exported(other, tmp_path / "foreign.tar")
        node = Gateway(tmp_path / "node", bench.hub.root)
    with pytest.raises(WrongScope, match=r"for acme\.edge-2, this node is acme\.edge-1"):
        await node.take(path)
    with pytest.raises(BadSignature):
        await node.take(foreign)
    assert list((node.membership.data / FOLDER).iterdir()) == []


async def test_packages_alone_wait_as_a_source_for_the_document_that_names_them(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub") as bench:
        await deployed(bench)
        path = await exported(bench, tmp_path / "files.tar", package="digits-cnn/1")
        envelope = next(
            message.payload for message in reversed(bench.broker.log) if message.topic.endswith("edge-1/down/desired")
        )
        node = Gateway(tmp_path / "node", bench.hub.root)
    await node.take(path)
    async with node.running() as member:
        await until(lambda: len(member.fetcher.sources) == 2)
        member.updaters["desired"].offer(envelope)
        await until(lambda: node.desired.active is not None)


async def test_a_full_disk_fails_the_update_with_the_reason_and_room_lets_it_go_on(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub") as bench:
        await deployed(bench)
        path = await exported(bench, tmp_path / "updates.tar")
        node = Gateway(tmp_path / "node", bench.hub.root)
    await node.take(path)
    async with node.running(Quota(free_bytes=1 << 60)) as member:
        updater = member.updaters["desired"]
        await until(lambda: updater.report.state == "failed")
        assert "store_failed: no room for" in (updater.report.error or "")
        assert node.desired.active is None
        member.sweeper.quota = Quota()
        await until(lambda: node.desired.active is not None)


def entries(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as archive:
        return [(entry, archive.extractfile(entry).read()) for entry in archive]  # type: ignore[union-attr]


def rewritten(path: Path, changed: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    target = path.with_suffix(".bad")
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as archive:
        for entry, data in changed:
            archive.addfile(entry, io.BytesIO(data))
    return target


def smuggled(honest: list[tuple[tarfile.TarInfo, bytes]]) -> list[tuple[tarfile.TarInfo, bytes]]:
    """With a file that nobody approved, and an index that says so."""
    evil = b"never approved"
    index = msgspec.json.decode(honest[0][1], type=Index)
    more = msgspec.structs.replace(index, files={**index.files, f"sha256:{sha256(evil).hexdigest()}": len(evil)})
    data = msgspec.json.encode(more)
    blob = named(f"blobs/{sha256(evil).hexdigest()}", size=len(evil))
    return [(named("index.json", size=len(data)), data), *honest[1:], (blob, evil)]


def named(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.linkname = kind, size, link
    return entry


async def test_what_was_tampered_with_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub") as bench:
        await deployed(bench)
        path = await exported(bench, tmp_path / "updates.tar")
        node = Gateway(tmp_path / "node", bench.hub.root)
    honest = entries(path)
    blob = next(number for number, (entry, _) in enumerate(honest) if entry.name.startswith("blobs/"))
    stamp = next(number for number, (entry, _) in enumerate(honest) if entry.name == "tuf/timestamp.json")
    document = next(number for number, (entry, _) in enumerate(honest) if entry.name.startswith("documents/"))

    def with_data(number: int, change: Callable[[bytes], bytes]) -> list[tuple[tarfile.TarInfo, bytes]]:
        entry, data = honest[number]
        return [*honest[:number], (named(entry.name, size=len(change(data))), change(data)), *honest[number + 1 :]]

    def with_entry(entry: tarfile.TarInfo, data: bytes = b"") -> list[tuple[tarfile.TarInfo, bytes]]:
        return [*honest, (entry, data)]

    attacks: list[tuple[list[tuple[tarfile.TarInfo, bytes]], type[SyncError], str]] = [
        (with_data(blob, lambda data: b"X" + data[1:]), DigestMismatch, "other bytes"),
        (with_data(blob, lambda data: data + b"X"), Malformed, "not in the index"),
        (with_data(stamp, lambda data: data.replace(b'"version":', b'"version": 1')), SyncError, "."),
        (with_data(document, lambda data: data.replace(b"sig", b"gis")), SyncError, "."),
        (honest[:-1], Malformed, "missing"),
        (honest[1:], Malformed, "begins with"),
        (with_entry(named("../escape", size=1), b"x"), Malformed, "no name of a bundle"),
        (with_entry(named("/etc/cron.d/x", size=1), b"x"), Malformed, "no name of a bundle"),
        (with_entry(named("tuf/../../x.json", size=1), b"x"), Malformed, "no name of a bundle"),
        (with_entry(named("blobs/" + "0" * 64, tarfile.SYMTYPE, link="/etc/passwd")), Malformed, "no plain file"),
        (with_entry(named("blobs/" + "0" * 64, tarfile.LNKTYPE, link="index.json")), Malformed, "no plain file"),
        (with_entry(named("tuf", tarfile.DIRTYPE)), Malformed, "no plain file"),
        (with_entry(named("x", tarfile.XHDTYPE, size=4), b"9 a="), Malformed, "no plain file"),
        (with_entry(*honest[stamp]), Malformed, "twice"),
        (smuggled(honest), NotListed, "not an approved file"),
    ]
    for changed, error, text in attacks:
        with pytest.raises(error, match=text):
            await node.take(rewritten(path, changed))
        assert list((node.membership.data / FOLDER).iterdir()) == []
    for cut in (0, 100, 700, path.stat().st_size // 2, path.stat().st_size - 1024):
        short = path.with_suffix(".short")
        short.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(Malformed):
            await node.take(short)


def test_a_size_beyond_its_bound_is_refused_before_a_byte_of_it_is_read(tmp_path: Path) -> None:
    index = msgspec.json.encode(Index(format=1, made=0, files={}))
    head = named("index.json", size=len(index)).tobuf(tarfile.USTAR_FORMAT) + index + b"\0" * (-len(index) % 512)
    for entry in (
        named("tuf/timestamp.json", size=MAX_METADATA_BYTES + 1),
        named("documents/0.json", size=1 << 30),
        named("blobs/" + "0" * 64, size=(4 << 30) + 1),
        named("index.json", size=1 << 33),
    ):
        with pytest.raises(Malformed, match=r"at most|twice"):
            unpack(io.BytesIO(head + entry.tobuf(tarfile.GNU_FORMAT)), tmp_path)


async def test_the_commands_carry_an_update_from_a_folder_to_a_stopped_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_hub(tmp_path / "hub") as bench:
        await deployed(bench)
        node = Gateway(tmp_path / "node", bench.hub.root)
        stranger = Gateway(tmp_path / "stranger", bench.hub.root, "acme.edge-9")
        file = tmp_path / "updates.tar"
        export = ["export", "--data", str(tmp_path / "hub"), "--node", NODE, "-o", str(file)]
        assert await asyncio.to_thread(bundle, export) == 0
        assert await asyncio.to_thread(bundle, [*export[:4], "acme.nobody", "-o", str(file)]) == 2
    capsys.readouterr()
    assert await asyncio.to_thread(bundle, ["import", str(file), "--config", str(node.config)]) == 0
    assert "desired revision 1" in capsys.readouterr().out
    assert await asyncio.to_thread(bundle, ["import", str(file), "--config", str(stranger.config)]) == 2
    assert "refused: wrong_scope" in capsys.readouterr().err
    async with node.running():
        await until(lambda: node.desired.active is not None)
