"""A node has its share of the hub's files and of its worker, and no more; a slot is free again however the transfer ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from cloud_hub import deltas, shares
from cloud_hub.auth import Principal, Role
from cloud_hub.deltas import Deltas, Pending
from cloud_hub.shares import PIECE_BYTES, SMALL_BYTES, SharedFile, Shares
from models.errors import Overloaded

ONE, TWO, THREE = (Principal(Role.NODE, f"acme.n-{number}") for number in range(3))
ADMIN = Principal(Role.ADMIN, "admin")
SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}}


class Reader:
    """The other side of an answer. `slow`: it takes nothing more after the head."""

    def __init__(self, slow: bool = False) -> None:
        self.slow = slow
        self.pieces: list[bytes] = []
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            if self.slow:
                await asyncio.Event().wait()
            self.pieces.append(message["body"])


def answer(desk: Shares, who: Principal, content: bytes) -> SharedFile:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 200_000):
            yield content[start : start + 200_000]

    return SharedFile(desk, who, len(content), chunks(), 200, {})


def begin(desk: Shares, who: Principal, reader: Reader, size: int = SMALL_BYTES + 1) -> asyncio.Task[None]:
    return asyncio.create_task(answer(desk, who, b"x" * size)(SCOPE, reader.receive, reader.send))


def test_one_node_has_its_slots_and_all_together_have_theirs() -> None:
    desk = Shares(slots=3, node_slots=2)
    with desk.slot(ONE), desk.slot(ONE):
        with pytest.raises(Overloaded, match="this node") as own, desk.slot(ONE):
            pass
        with desk.slot(TWO):
            with pytest.raises(Overloaded, match="3 files") as full, desk.slot(THREE):
                pass
            with desk.slot(ADMIN):
                assert desk.running == 4
        assert 0 < own.value.retry_after < full.value.retry_after
    assert desk.running == 0
    assert not desk._running


@pytest.mark.parametrize("size", [SMALL_BYTES + 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, 500_001])
async def test_the_file_arrives_as_it_is_in_small_pieces(size: int) -> None:
    reader, content = Reader(), bytes(index % 251 for index in range(size))
    await answer(Shares(), ONE, content)(SCOPE, reader.receive, reader.send)
    assert b"".join(reader.pieces) == content
    assert max(map(len, reader.pieces)) <= PIECE_BYTES


async def test_a_reader_that_takes_nothing_is_cut_off_and_one_that_leaves_frees_its_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk, stays, leaves = Shares(node_slots=2), Reader(slow=True), Reader(slow=True)
    leaving = begin(desk, ONE, leaves)
    await asyncio.sleep(0.01)
    assert desk.running == 1
    leaves.gone.set()
    await asyncio.wait_for(leaving, 5)
    assert desk.running == 0
    monkeypatch.setattr(shares, "PIECE_SECONDS", 0.01)
    await asyncio.wait_for(begin(desk, ONE, stays), 5)
    assert desk.running == 0


async def test_what_fits_the_servers_buffer_needs_no_slot() -> None:
    desk = Shares(node_slots=1)
    with desk.slot(ONE):
        await begin(desk, ONE, reader := Reader(), SMALL_BYTES)
        assert sum(map(len, reader.pieces)) == SMALL_BYTES
        with pytest.raises(Overloaded):
            await begin(desk, ONE, Reader(), SMALL_BYTES + 1)


def name(number: int) -> str:
    return f"sha256:{number:064x}"


async def test_a_node_waits_for_few_deltas_and_leaves_the_worker_to_others(tmp_path: Path) -> None:
    def approved(digests: Collection[str]) -> Mapping[str, int]:
        return dict.fromkeys(digests, 1_000_000)

    base, made = name(0), Deltas(tmp_path / "deltas", lambda digest: tmp_path / digest, approved)
    for number in range(1, deltas.NODE_WAITING + 1):
        with pytest.raises(Pending):
            await made.offer(name(number), [base], "acme.n-1")
    with pytest.raises(Overloaded, match="this node") as refused:
        await made.offer(name(100), [base], "acme.n-1")
    assert refused.value.retry_after > 0
    with pytest.raises(Pending):  # asked for already: nothing new for the worker
        await made.offer(name(1), [base], "acme.n-1")
    for asker in ("acme.n-2", None):
        with pytest.raises(Pending):
            await made.offer(name(100), [base], asker)
    with pytest.raises(Pending):  # another node's by now
        await made.offer(name(100), [base], "acme.n-1")
    assert len(made._waiting) == deltas.NODE_WAITING + 1
