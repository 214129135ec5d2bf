"""A node builds another version beside its own, switches, and believes in it only once it has proved itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from sync.errors import Rejected, StoreFailed
from sync.holds import Holds
from sync.member import _gates
from sync.settings import Settings, SettingsBook
from sync.slot_builder import SlotBuilder
from sync.slots import Slot, Slots, SlotState, rolled_back
from sync.software import Software, Wheel, encode_software, name_of
from sync.state import StateStore
from sync.testing import FakeClock
from sync.upgrade import NotNow, Upgrade, upgrade_from

DIGEST = "sha256:" + "a" * 64
NEW = Software("0.2.0", (Wheel("tierline-0.2.0-py3-none-any.whl", DIGEST, 10),))
BODY = encode_software(NEW)


class FakeBuilder(SlotBuilder):
    """Builds nothing; `fails` is raised instead."""

    fails: Exception | None = None

    async def build(self, name: str, software: Software, blobs: Mapping[str, Path]) -> Slot:
        if self.fails is not None:
            raise self.fails
        return Slot(name, software.version, name_of(software))


class Site:
    """One node's slots; `next_process` is what the launcher starts afterwards."""

    def __init__(self, folder: Path) -> None:
        self.clock, self.slots = FakeClock(), Slots(folder)
        self.restarts = 0
        self.online = self.serving = True
        self.next_process()

    def next_process(self) -> None:
        self.upgrade = Upgrade(
            FakeBuilder(self.slots, "python"), self.clock, restart=self._restart, healthy_seconds=30.0
        )

    def _restart(self) -> None:
        self.restarts += 1

    def joined(self) -> None:
        self.upgrade.joined(lambda: self.online, lambda: self.serving)

    async def switch(self) -> None:
        self.joined()
        await self.upgrade.commit(await self.upgrade.prepare(BODY, {}))
        await self.pass_time(5)
        self.next_process()

    async def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            for _ in range(50):
                await asyncio.sleep(0.0002)
                if self.clock.sleepers:
                    break
            self.clock.advance(1)

    async def proving(self, seconds: int) -> SlotState:
        task = asyncio.create_task(self.upgrade.prove())
        await self.pass_time(seconds)
        task.cancel()
        await asyncio.wait({task})
        return self.slots.read()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


async def test_switching_is_on_the_disk_before_the_process_ends(site: Site) -> None:
    site.joined()
    assert site.upgrade.plan(BODY, {}) == (DIGEST,)
    await site.upgrade.commit(await site.upgrade.prepare(BODY, {}))
    state = site.slots.read()
    assert (state.current, state.confirmed, site.restarts) == (Slot("a", "0.2.0", name_of(NEW)), False, 0)
    assert state.connected
    assert state.served
    assert site.upgrade.verdict().startswith("undecided")
    await site.pass_time(3)
    assert site.restarts == 1


async def test_the_new_version_needs_no_file_and_builds_nothing_when_it_starts(site: Site) -> None:
    await site.switch()
    assert site.upgrade.plan(BODY, {}) == ()
    token = await site.upgrade.prepare(BODY, {})
    await site.upgrade.commit(token)
    assert site.restarts == 1
    assert site.upgrade.verdict().startswith("undecided")


async def test_it_proves_itself_by_doing_for_a_while_what_the_one_before_could(site: Site) -> None:
    await site.switch()
    site.joined()
    assert not (await site.proving(25)).confirmed
    assert (await site.proving(35)).confirmed
    assert site.upgrade.verdict() == "good"


async def test_a_version_that_serves_nothing_any_more_does_not_prove_itself(site: Site) -> None:
    await site.switch()
    site.serving = False
    site.joined()
    state = await site.proving(60)
    assert (state.confirmed, state.healthy) == (False, False)


async def test_a_version_that_does_not_reach_the_broker_is_healthy_but_not_proved(site: Site) -> None:
    await site.switch()
    site.online = False
    site.joined()
    state = await site.proving(60)
    assert (state.confirmed, state.healthy) == (False, True)


async def test_a_node_that_was_offline_when_it_switched_need_not_be_online_to_prove_it(site: Site) -> None:
    site.online = False
    await site.switch()
    site.joined()
    assert (await site.proving(60)).confirmed


async def test_what_was_taken_back_is_refused_with_the_reason_it_was(site: Site) -> None:
    await site.switch()
    site.slots.write(rolled_back(site.slots.read(), "it ended 3 times"))
    with pytest.raises(Rejected, match=r"0\.2\.0 was taken back: it ended 3 times"):
        site.upgrade.plan(BODY, {})


async def test_one_that_only_lacked_the_broker_is_built_again_when_that_is_there(site: Site) -> None:
    await site.switch()
    site.slots.write(rolled_back(site.slots.read(), "no connection", passing=True))
    site.online = False
    with pytest.raises(NotNow):
        await site.upgrade.prepare(BODY, {})  # a node that starts does not wait for it
    site.joined()
    building = asyncio.create_task(site.upgrade.prepare(BODY, {}))
    await site.pass_time(5)
    assert not building.done()
    site.online = True
    await site.pass_time(3)
    assert isinstance(await building, Slot)


async def test_a_full_disk_is_a_reason_to_try_again_and_a_broken_version_is_not(site: Site) -> None:
    site.joined()
    builder = site.upgrade._builder
    assert isinstance(builder, FakeBuilder)
    FakeBuilder.fails = StoreFailed("no space left")
    try:
        with pytest.raises(NotNow, match="no space left"):
            await site.upgrade.prepare(BODY, {})
        FakeBuilder.fails = Rejected("trying it failed")
        with pytest.raises(Rejected, match="trying it failed") as caught:
            await site.upgrade.prepare(BODY, {})
        assert not getattr(caught.value, "transient", False)
    finally:
        FakeBuilder.fails = None


def test_a_node_that_no_launcher_started_says_so() -> None:
    upgrade = upgrade_from({}, (), FakeClock())
    with pytest.raises(Rejected, match="not started by 'tierline launch'"):
        upgrade.plan(BODY, {})
    assert upgrade.verdict() == "good"


async def test_holds_delay_an_upgrade_and_the_revision_that_forces_models_forces_no_software(tmp_path: Path) -> None:
    clock, book = FakeClock(), SettingsBook(Settings(force=7))
    state = StateStore(tmp_path / "state.db")
    holds = Holds(clock, lambda: 900.0, state)
    gates = _gates(holds, book, clock)
    assert gates["software"].obstacle(1, 0.0) is None
    holds.hold("robot in motion")
    assert gates["desired"].obstacle(1, 0.0) is None
    assert gates["software"].obstacle(1, 0.0) is not None
    state.close()
