"""Only what verified, unexpired metadata lists is approved; the keys of documents come from there too."""

from __future__ import annotations

import asyncio
from threading import Thread

import pytest

from sync.errors import BadSignature, Expired, Malformed, NotListed, Refused, Unavailable
from sync.fetch import Source
from sync.packages import (
    FRESH_SECONDS,
    POLL_SECONDS,
    RECHECK_SECONDS,
    REFRESH_BURST,
    REFRESH_GAP,
    UNKNOWN_KEY_GAP,
    Packages,
)
from sync.states import DEADLINES
from sync.testing import FakeRepository
from sync.trust import Keyring, SigningKey, encode_keyring
from tests.unit.sync.conftest import RING, SIGNER, FakeFetcher

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
STRANGER = SigningKey.from_bytes(b"\7" * 32)


def questions(node) -> int:
    return len(node.repository.asked)


async def burst(node) -> None:
    """Use up the refreshes that may begin at once."""
    for _ in range(REFRESH_BURST):
        await node.packages.refresh()


def again(node, client: FakeRepository | None = None) -> Packages:
    """A new process on the same disk."""
    return Packages(
        node.fetcher, node.state, b"root", node.clock, node.folder / "tuf", client=client or node.repository
    )


async def test_sizes_come_from_the_repository_which_is_asked_for_once(node) -> None:
    node.list_files({A: 1, B: 2})
    assert await node.packages.require([A, B]) == {A: 1, B: 2}
    assert await node.packages.require([B]) == {B: 2}
    assert questions(node) == 1


async def test_what_was_listed_a_while_ago_is_asked_again_before_an_update(node) -> None:
    node.list_files({A: 1})
    await node.packages.require([A])
    node.list_files({})
    node.clock.advance(RECHECK_SECONDS)
    with pytest.raises(NotListed):
        await node.packages.require([A])


async def test_without_network_what_was_listed_counts_until_it_expires(node) -> None:
    node.list_files({A: 1})
    node.repository.expires = node.clock.wall() + 1_000
    await node.packages.require([A])
    node.fetcher.down = True
    node.clock.advance(RECHECK_SECONDS)
    assert await node.packages.require([A]) == {A: 1}
    status = node.packages.status()
    assert status.fresh_until - status.now == 1_000 - RECHECK_SECONDS
    node.clock.advance(1_000)
    with pytest.raises(Expired):
        await node.packages.require([A])
    assert node.packages.refreshes == {"good": 1, "unavailable": 2}


async def test_after_a_restart_without_network_the_cached_metadata_answers(node) -> None:
    node.list_files({A: 1})
    await node.packages.require([A])
    node.fetcher.down = True
    assert await again(node).require([A]) == {A: 1}
    with pytest.raises(Unavailable):
        await again(node).require([B])


async def test_an_unknown_digest_is_not_listed_and_refreshes_are_rate_limited(node) -> None:
    node.list_files({A: 1})
    for _ in range(REFRESH_BURST):
        with pytest.raises(NotListed, match="sha256:bbb"):
            await node.packages.require([B])
    started = node.clock.monotonic()
    task = asyncio.create_task(node.packages.require([B]))
    await node.when(lambda: node.clock.sleepers == 1)
    assert questions(node) == REFRESH_BURST
    node.clock.advance(REFRESH_GAP)
    with pytest.raises(NotListed):
        await task
    assert node.clock.monotonic() - started == REFRESH_GAP


async def test_expired_metadata_approves_nothing_and_raises_an_alarm_that_goes_by_itself(node, caplog) -> None:
    node.list_files({A: 1})
    node.repository.expires = node.clock.wall() + 1_000
    await node.packages.require([A])
    assert node.packages.status().alarm == ""
    node.clock.advance(2_000)
    for _ in range(3):
        with pytest.raises(Expired):
            await node.packages.require([A])
        node.clock.advance(REFRESH_GAP)
    with pytest.raises(Expired):
        await node.packages.keyring(SIGNER.kid)
    assert node.packages.status().alarm.startswith("expired: ")
    assert sum("nothing new is accepted" in record.message for record in caplog.records) == 1
    node.repository.expires = node.clock.wall() + 1_000
    node.clock.advance(UNKNOWN_KEY_GAP)
    node.list_files({A: 1})
    assert await node.packages.require([A]) == {A: 1}
    assert node.packages.status().alarm == ""


async def test_a_timestamp_that_stays_old_is_a_freeze_that_is_told(node) -> None:
    await node.packages.refresh()
    node.clock.advance(FRESH_SECONDS + 1)
    assert node.packages.status().alarm.startswith("frozen: ")


async def test_a_known_key_costs_no_question(node) -> None:
    assert (await node.packages.keyring(SIGNER.kid)).find(SIGNER.kid) is not None
    assert questions(node) == 0


async def test_an_unknown_key_is_looked_up_once_and_then_not_for_a_while(node) -> None:
    for _ in range(5):
        assert (await node.packages.keyring(STRANGER.kid)).find(STRANGER.kid) is None
    assert questions(node) == 1
    node.clock.advance(UNKNOWN_KEY_GAP)
    node.repository.keyring = node.fetcher.keyring = encode_keyring(Keyring((STRANGER.key("desired"),)))
    ring = await node.packages.keyring(STRANGER.kid)
    assert ring.find(STRANGER.kid) is not None
    assert ring.find(SIGNER.kid) is None  # the old key was withdrawn by the same step
    assert questions(node) == 2


async def test_the_keyring_survives_a_restart_without_network(node) -> None:
    node.repository.keyring = node.fetcher.keyring = encode_keyring(Keyring((STRANGER.key("desired"),)))
    await node.packages.refresh()
    node.fetcher.down = True
    assert (await again(node).keyring(STRANGER.kid)).find(STRANGER.kid) is not None


async def test_a_keyring_other_than_the_one_signed_for_is_refused(node) -> None:
    node.repository.keyring = encode_keyring(
        Keyring((STRANGER.key("desired"),))
    )  # the source still has the other bytes
    with pytest.raises(Refused):
        await node.packages.refresh()
    assert (await node.packages.keyring()).find(STRANGER.kid) is None


async def test_the_refusal_of_the_only_source_is_told(node) -> None:
    node.repository.failure = BadSignature("forged")
    with pytest.raises(BadSignature, match="forged"):
        await node.packages.require([A])


async def test_a_clock_below_what_was_signed_is_not_trusted(node) -> None:
    await node.packages.refresh()
    node.clock.advance(-30 * 86_400)
    node.clock.advance(0)
    await node.packages.refresh()
    assert node.repository.asked[-1].now == node.repository.issued


async def test_waiting_calls_share_one_refresh_whatever_they_ask_for(node) -> None:
    node.list_files({A: 1})
    await burst(node)
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
    assert questions(node) == REFRESH_BURST + 1


async def test_a_refresh_that_failed_is_shared_as_a_failure(node) -> None:
    await burst(node)
    node.fetcher.down = True
    waiting = [asyncio.create_task(node.packages.require([B])) for _ in range(3)]
    await node.when(lambda: node.clock.sleepers == 1)
    node.clock.advance(REFRESH_GAP)
    assert {type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)} == {Unavailable}


async def test_a_refresh_that_was_cancelled_answers_nobody(node) -> None:
    await burst(node)
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
    assert questions(node) == 0


async def test_the_first_keyring_of_a_node_is_fetched(node) -> None:
    assert node.packages.status().fresh_until > 0
    assert (await node.packages.keyring()) == RING


class Dripping(FakeFetcher):
    """Its first source gives away nothing before its transfers' own limits, which are far off."""

    cut = 0

    @property
    def sources(self) -> tuple[Source, ...]:
        return (Source("http://slow"), Source("http://good"))

    async def get(self, source: Source, path: str, limit: int) -> bytes:
        if source.url == "http://slow":
            try:
                await self._clock.sleep(10_000)
            except asyncio.CancelledError:
                self.cut += 1
                raise
        return await super().get(source, path, limit)


async def test_a_source_that_drips_leaves_time_for_the_next_one(node) -> None:
    node.list_files({A: 1})
    fetcher = Dripping(node.store, node.clock)
    packages = Packages(fetcher, node.state, b"root", node.clock, node.folder / "tuf", client=node.repository)
    asked = asyncio.create_task(packages.require([A]))
    await node.when(lambda: node.clock.sleepers > 0 and questions(node) == 1)
    await asyncio.sleep(0.05)
    node.clock.advance(DEADLINES["verifying"] / 4)
    async with asyncio.timeout(3):
        assert await asked == {A: 1}
    assert fetcher.cut == 1


async def test_what_waits_for_a_dripping_source_no_longer_leaves_no_transfer_behind(node) -> None:
    fetcher = Dripping(node.store, node.clock)
    packages = Packages(fetcher, node.state, b"root", node.clock, node.folder / "tuf", client=node.repository)
    asked = asyncio.create_task(packages.require([A]))
    await node.when(lambda: questions(node) == 1)
    await asyncio.sleep(0.05)
    asked.cancel()
    await asyncio.wait({asked})
    await node.when(lambda: fetcher.cut == 1)


async def test_looking_for_news_outlives_a_process_without_threads(node, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    looking = asyncio.create_task(node.packages.run())
    await node.when(lambda: node.clock.sleepers == 1)
    with monkeypatch.context() as patch:
        patch.setattr("sync.daemon.Thread.start", refuse)
        node.clock.advance(POLL_SECONDS * 1.5)
        await node.settle()
        await node.when(lambda: looking.done() or node.clock.sleepers == 1)
    assert not looking.done()
    looking.cancel()


async def test_who_lacks_a_keyring_looks_for_one_sooner_than_who_has_one(node) -> None:
    node.packages._approval = node.packages._keyring = None
    node.fetcher.down = True
    looking = asyncio.create_task(node.packages.run())
    with pytest.raises(Unavailable):
        await node.packages.keyring()
    node.fetcher.down = False
    await node.when(lambda: node.clock.sleepers >= 1)
    before = questions(node)
    for _ in range(10):
        node.clock.advance(POLL_SECONDS / 100)
        await node.settle()
    await node.when(lambda: questions(node) > before)
    looking.cancel()
