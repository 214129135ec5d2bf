"""Only what a good catalogue lists is approved, and a node keeps the last one it saw."""

from __future__ import annotations

import asyncio

import pytest

from sync import packages
from sync.errors import Malformed, NotListed, Refused, Unavailable
from sync.packages import REFRESH_GAP, Packages
from tests.unit.sync.conftest import RING

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


async def test_sizes_come_from_the_catalogue_which_is_asked_for_once(node) -> None:
    node.list_files({A: 1, B: 2})
    assert await node.packages.require([A, B]) == {A: 1, B: 2}
    assert await node.packages.require([B]) == {B: 2}
    assert node.fetcher.asked == ["/catalog"]
    assert node.packages.envelope() == node.fetcher.catalog[0]


async def test_the_catalogue_survives_a_restart_without_network(node) -> None:
    node.list_files({A: 1})
    await node.packages.require([A])
    node.fetcher.down = True
    again = Packages(node.fetcher, node.state, RING, node.clock)
    assert await again.require([A]) == {A: 1}
    with pytest.raises(Unavailable):
        await again.require([B])


async def test_an_unknown_digest_is_not_listed_and_refreshes_are_rate_limited(node) -> None:
    node.list_files({A: 1})
    with pytest.raises(NotListed, match="sha256:bbb"):
        await node.packages.require([B])
    started = node.clock.monotonic()
    task = asyncio.create_task(node.packages.require([B]))
    await node.when(lambda: node.clock.sleepers == 1)
    assert node.fetcher.asked == ["/catalog"]
    node.clock.advance(REFRESH_GAP)
    with pytest.raises(NotListed):
        await task
    assert node.clock.monotonic() - started == REFRESH_GAP


async def test_an_older_catalogue_is_a_replay(node) -> None:
    node.list_files({A: 1}, revision=5)
    await node.packages.require([A])
    node.clock.advance(REFRESH_GAP)
    node.list_files({A: 1, B: 2}, revision=4)
    with pytest.raises(Refused):
        await node.packages.require([B])


async def test_a_forged_or_stale_mirror_is_passed_over_for_a_source_that_lists_the_file(node) -> None:
    node.list_files({A: 1}, revision=1)
    stale = node.fetcher.catalog[0]
    node.list_files({A: 1, B: 2}, revision=2)
    node.fetcher.catalog = [b"forged", stale, *node.fetcher.catalog]
    assert await node.packages.require([B]) == {B: 2}


async def test_an_expired_catalogue_approves_nothing_new(node) -> None:
    node.list_files({A: 1}, expires=node.clock.wall() + 1_000)
    await node.packages.require([A])
    node.clock.advance(2_000)
    with pytest.raises(Refused):
        await node.packages.require([A])


@pytest.mark.parametrize("files", [{A: 0}, {A: 1 << 40}, {"nonsense": 1}])
async def test_a_catalogue_that_makes_no_sense_is_refused(node, files: dict[str, int]) -> None:
    node.list_files(files)
    with pytest.raises(Malformed):
        await node.packages.require([A])


async def test_a_mirror_passes_on_a_fresh_catalogue_and_the_last_good_one_without_network(node) -> None:
    with pytest.raises(Unavailable):
        await node.packages.current()
    node.clock.advance(REFRESH_GAP)
    node.list_files({A: 1}, revision=1)
    first = node.fetcher.catalog[0]
    assert await node.packages.current() == first
    node.clock.advance(REFRESH_GAP)
    node.list_files({A: 1, B: 2}, revision=2)
    assert await node.packages.current() == node.fetcher.catalog[0] != first
    node.clock.advance(REFRESH_GAP)
    node.fetcher.down = True
    assert await node.packages.current() == node.fetcher.catalog[0]


async def test_waiting_devices_share_one_refresh(node) -> None:
    node.list_files({A: 1})
    await node.packages.current()
    node.clock.advance(REFRESH_GAP / 10)
    waiting = [asyncio.create_task(node.packages.current()) for _ in range(10)]
    await node.when(lambda: node.clock.sleepers == 1)
    node.clock.advance(REFRESH_GAP)
    await asyncio.gather(*waiting)
    assert node.fetcher.asked == ["/catalog"] * 2


async def test_waiting_calls_share_one_refresh_whatever_they_ask_for(node) -> None:
    node.list_files({A: 1})
    await node.packages.require([A])
    strangers = [asyncio.create_task(node.packages.require([f"sha256:{number:064x}"])) for number in range(20)]
    await node.when(lambda: node.clock.sleepers == 1)
    node.list_files({A: 1, B: 2})
    own = asyncio.create_task(node.packages.require([B]))
    await asyncio.sleep(0)
    node.clock.advance(REFRESH_GAP)
    async with asyncio.timeout(3):
        assert await own == {B: 2}
        refused = await asyncio.gather(*strangers, return_exceptions=True)
    assert {type(error) for error in refused} == {NotListed}
    assert node.fetcher.asked == ["/catalog"] * 2


async def test_a_refresh_that_failed_is_shared_as_a_failure(node) -> None:
    node.list_files({A: 1})
    await node.packages.require([A])
    node.fetcher.down = True
    waiting = [asyncio.create_task(node.packages.require([B])) for _ in range(3)]
    await node.when(lambda: node.clock.sleepers == 1)
    node.clock.advance(REFRESH_GAP)
    assert {type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)} == {Unavailable}


async def test_a_refresh_that_was_cancelled_answers_nobody(node) -> None:
    node.list_files({A: 1})
    await node.packages.require([A])
    first = asyncio.create_task(node.packages.require([B]))
    await node.when(lambda: node.clock.sleepers == 1)
    node.list_files({A: 1, B: 2})
    second = asyncio.create_task(node.packages.require([B]))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    await node.when(lambda: node.clock.sleepers == 1)
    node.clock.advance(REFRESH_GAP)
    assert await second == {B: 2}


async def test_what_is_no_digest_is_refused_without_asking_anybody(node) -> None:
    for text in ("garbage", "sha256:" + "A" * 64, ""):
        with pytest.raises(Malformed):
            await node.packages.require([text])
    assert node.fetcher.asked == []


async def test_a_catalogue_is_verified_once_for_each_refresh(node, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []
    verify = packages.verify

    def counting(envelope: bytes, *args: object, **options: object) -> object:
        calls.append(envelope)
        return verify(envelope, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(packages, "verify", counting)
    node.list_files({A: 1})
    await node.packages.require([A])
    assert calls == node.fetcher.catalog
