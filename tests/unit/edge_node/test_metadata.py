"""Metadata is passed on as fresh as it can be had, kept for when the hub is away, and never without bound."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edge_node import metadata
from edge_node.metadata import FRESH_SECONDS, SHARED_SECONDS, MetadataMirror
from models.errors import NotFound, Overloaded, Unreachable
from models.serving.exchange import HttpHead, HttpRequest
from sync.errors import Absent, Unavailable
from sync.fetch import Source


class Hub:
    """A source: `files` are what it has, `down` makes it unreachable."""

    def __init__(self, **files: bytes) -> None:
        self.files = {name.replace("_", "."): data for name, data in files.items()}
        self.down = False
        self.asked: list[str] = []
        self.now = 1_000.0
        self.sources = (Source("http://hub"),)

    async def get(self, source: Source, path: str, limit: int) -> bytes:
        name = path.removeprefix("/tuf/")
        self.asked.append(name)
        if self.down:
            raise Unavailable("down")
        if name not in self.files:
            raise Absent(name)
        return self.files[name]

    def mirror(self, folder: Path) -> MetadataMirror:
        return MetadataMirror(self, folder / "mirror", lambda: self.now)  # type: ignore[arg-type]


@pytest.fixture
def hub() -> Hub:
    made = Hub()
    made.files = {"timestamp.json": b"t1", "1.root.json": b"r1", "7.snapshot.json": b"s7"}
    return made


async def ask(mirror: MetadataMirror, name: str) -> object:
    return (await mirror.metadata(HttpRequest(HttpHead("GET", f"/tuf/{name}", "", {})))).body


async def test_the_timestamp_is_asked_for_each_time_and_versioned_files_once(hub: Hub, tmp_path: Path) -> None:
    mirror = hub.mirror(tmp_path)
    for _ in range(3):
        assert await ask(mirror, "timestamp.json") == b"t1"
        assert await ask(mirror, "7.snapshot.json") == b"s7"
        hub.now += SHARED_SECONDS
    assert hub.asked == ["timestamp.json", "7.snapshot.json", "timestamp.json", "timestamp.json"]


async def test_while_the_hub_is_away_the_last_files_are_served_also_after_a_restart(hub: Hub, tmp_path: Path) -> None:
    mirror = hub.mirror(tmp_path)
    await ask(mirror, "timestamp.json")
    hub.down = True
    hub.now += SHARED_SECONDS
    assert await ask(mirror, "timestamp.json") == b"t1"
    assert await ask(hub.mirror(tmp_path), "timestamp.json") == b"t1"
    with pytest.raises(Unreachable):
        await ask(mirror, "7.snapshot.json")


async def test_what_the_hub_does_not_have_is_missing_and_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    mirror = hub.mirror(tmp_path)
    with pytest.raises(NotFound):
        await ask(mirror, "2.root.json")
    hub.files["2.root.json"] = b"r2"
    assert await ask(mirror, "2.root.json") == b"r2"


async def test_a_forged_file_does_not_stay_for_ever(hub: Hub, tmp_path: Path) -> None:
    mirror = hub.mirror(tmp_path)
    hub.files["7.snapshot.json"] = b"forged"
    assert await ask(mirror, "7.snapshot.json") == b"forged"
    hub.files["7.snapshot.json"] = b"s7"
    hub.now += FRESH_SECONDS
    assert await ask(mirror, "7.snapshot.json") == b"s7"


@pytest.mark.parametrize(
    "name", ["", "../state.db", "passwd", "0.root.json", "1.bin-zz.json", "1.root.json/..", "x" * 500]
)
async def test_only_names_of_metadata_exist(hub: Hub, tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound):
        await ask(hub.mirror(tmp_path), name)
    assert hub.asked == []


async def test_the_longest_unused_files_go_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "MAX_KEPT_BYTES", 20)
    mirror = hub.mirror(tmp_path)
    for number in range(1, 6):
        hub.files[f"{number}.snapshot.json"] = b"x" * 8
        await ask(mirror, f"{number}.snapshot.json")
    assert sorted(path.name for path in (tmp_path / "mirror").iterdir()) == ["4.snapshot.json", "5.snapshot.json"]


class Hole(Hub):
    """A hub that swallows what is sent to it, until `opened`."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = asyncio.Event()
        self.asking = self.most = 0

    async def get(self, source: Source, path: str, limit: int) -> bytes:
        self.asking += 1
        self.most = max(self.most, self.asking)
        try:
            await self.opened.wait()
            return await super().get(source, path, limit)
        finally:
            self.asking -= 1


async def test_devices_wait_together_for_a_hub_that_swallows_questions_and_get_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "ANSWER_SECONDS", 0.05, raising=False)
    hole = Hole()
    hole.files["timestamp.json"] = b"t1"
    hole.opened.set()
    mirror = hole.mirror(tmp_path)
    await ask(mirror, "timestamp.json")
    hole.opened.clear()
    hole.now += SHARED_SECONDS
    async with asyncio.timeout(1):
        assert await asyncio.gather(*(ask(mirror, "timestamp.json") for _ in range(50))) == [b"t1"] * 50
        with pytest.raises(Overloaded):
            await ask(mirror, "7.snapshot.json")
    hole.opened.set()


async def test_one_answer_of_a_hub_that_is_away_is_for_all_who_wait(hub: Hub, tmp_path: Path) -> None:
    hub.down = True
    mirror = hub.mirror(tmp_path)
    found = await asyncio.gather(*(ask(mirror, "7.snapshot.json") for _ in range(50)), return_exceptions=True)
    assert {type(error) for error in found} == {Unreachable}
    assert len(hub.asked) == 1


async def test_however_many_names_devices_make_up_few_questions_are_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "ANSWER_SECONDS", 0.05, raising=False)
    hole = Hole()
    mirror = hole.mirror(tmp_path)
    tasks = [asyncio.create_task(ask(mirror, f"{number}.root.json")) for number in range(1, 201)]
    await asyncio.wait(tasks, timeout=0.5)
    assert hole.most <= 16
    assert {type(task.exception()) for task in tasks if task.done()} == {Overloaded}
    hole.opened.set()
    await asyncio.wait(tasks)
