"""Holds and windows delay what is put in force, not what is fetched, and not for ever; a restart goes on where it was."""

from __future__ import annotations

import asyncio

import pytest

from sync.settings import Settings
from sync.state import StateStore
from sync.states import STATES
from sync.windows import Window
from tests.unit.sync.conftest import digest_of

HOUR = 3600.0


def window_in(node, seconds: float) -> Window:
    """Opens `seconds` from now, for an hour."""
    from datetime import UTC, datetime

    opening = datetime.fromtimestamp(node.clock.wall() + seconds, UTC)
    return Window(start=f"{opening:%H:%M}", minutes=60)


async def applied(node, envelope: bytes):
    node.updater.offer(envelope)
    await node.when(lambda: node.updater.report.revision == node.revision and node.updater.report.state == "applied")


async def held(node, body: bytes = b'"v2"') -> None:
    """`v1` is in force, the update to `body` is on the node and waits."""
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.holds.hold("robot in motion", 100)
    node.updater.offer(node.package(body))
    await node.when(lambda: node.updater.report.state == "held" and node.clock.sleepers > 0)


async def test_a_hold_delays_activation_but_not_the_download_and_says_why(node) -> None:
    await held(node)
    report = node.updater.report
    assert (report.detail, report.error, report.applied) == ("robot in motion", None, 1)
    assert all(node.store.has(digest) for digest in node.activator.wanted)
    assert node.activator.active == b'"v1"'
    node.holds.release(node.holds.current().id)
    await node.until("applied")
    assert node.activator.active == b'"v2"'


async def test_a_hold_that_runs_out_delays_no_longer(node) -> None:
    await held(node)
    node.clock.advance(101)
    await node.until("applied")


async def test_one_hold_after_the_other_delays_no_longer_than_the_settings_allow(node) -> None:
    node.settings = Settings(max_hold_seconds=250)
    await held(node)
    for _ in range(4):
        node.holds.hold("robot in motion", 100)
        await node.settle()
        node.clock.advance(60)
        await node.settle()
    assert node.activator.active == b'"v1"'
    node.clock.advance(20)
    await node.until("applied")
    assert node.holds.current() is not None


async def test_a_hold_that_comes_while_it_loads_still_delays_it(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.activator.gate = asyncio.Event()
    node.updater.offer(node.package(b'"v2"'))
    await node.until("preparing")
    hold = node.holds.hold("robot in motion", 100)
    node.activator.gate.set()
    await node.until("held")
    assert (node.activator.active, len(node.activator.prepared)) == (b'"v1"', 2)
    node.holds.release(hold.id)
    await node.until("applied")
    assert len(node.activator.prepared) == 2, "what was loaded is not loaded again"


async def test_the_hub_can_force_an_update_through_holds_and_windows(node) -> None:
    await held(node)
    node.settings = Settings(force=1, windows=(window_in(node, 5 * HOUR),))
    node.gate.look_again()
    await node.settle()
    assert node.updater.report.state == "held"
    node.settings = Settings(force=2, windows=node.settings.windows)
    node.gate.look_again()
    await node.until("applied")


async def test_outside_its_window_an_update_is_fetched_and_waits_for_it_to_open(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.settings = Settings(windows=(window_in(node, 5 * HOUR),))
    node.updater.offer(node.package(b'"v2"'))
    report = await node.until("waiting")
    assert report.detail == "no maintenance window is open"
    assert all(node.store.has(digest) for digest in node.activator.wanted)
    for _ in range(4):
        node.clock.advance(HOUR)
        await node.settle()
        assert node.updater.report.state == "waiting"
        await node.when(lambda: node.clock.sleepers > 0)
    node.clock.advance(HOUR + 60)
    await node.until("applied")


async def test_the_first_version_of_all_waits_for_nobody_elses_window(policy) -> None:
    policy.settings = Settings(windows=(window_in(policy, 5 * HOUR),))
    policy.holds.hold("robot in motion")
    await policy.updater.start()
    policy.updater.offer(policy.document(b'"p1"'))
    await policy.until("applied")


async def test_going_back_from_a_bad_version_is_not_held(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided"
    node.updater.offer(node.package(b'"v2"'))
    await node.watched()
    node.holds.hold("robot in motion")
    node.activator.judgement, node.activator.wanted = "bad: wrong", ()
    node.clock.advance(1)
    await node.until("rolled_back")


async def test_a_newer_document_takes_the_place_of_one_that_is_held_with_what_it_had_loaded(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.activator.gate = asyncio.Event()
    node.updater.offer(node.package(b'"v2"'))
    await node.until("preparing")
    hold = node.holds.hold("robot in motion", 100)
    node.activator.gate.set()
    await node.until("held")
    node.updater.offer(node.package(b'"v3"'))
    await node.when(lambda: node.updater.report.revision == 3 and node.updater.report.state == "held")
    assert node.activator.discarded == [b'"v2"']
    node.holds.release(hold.id)
    await node.until("applied")
    assert node.activator.history == [b'"v1"', b'"v3"']


# --- deadlines ----------------------------------------------------------------------------------------------------------


async def test_a_preparation_that_never_ends_fails_at_its_deadline_and_is_tried_again(node) -> None:
    await node.updater.start()
    node.activator.gate = asyncio.Event()
    node.updater.offer(node.package(b'"v1"'))
    await node.when(lambda: len(node.activator.prepared) == 1 and node.clock.sleepers > 0)
    node.clock.advance(901)
    report = await node.until("failed")
    assert report.error == "unavailable: preparing was not over within 900 s"
    assert report.attempts == 1
    node.activator.gate.set()
    await node.pass_time()
    assert (await node.until("applied")).attempts == 1


async def test_a_fetch_that_never_ends_fails_at_the_deadline_the_settings_give(node) -> None:
    node.settings = Settings(deadlines={"fetching": 60})
    await node.updater.start()
    node.fetcher.gate = asyncio.Event()
    node.updater.offer(node.package(b'"v1"'))
    await node.when(lambda: node.updater.report.state == "fetching" and node.clock.sleepers > 0)
    node.clock.advance(61)
    assert (await node.until("failed")).error == "unavailable: fetching was not over within 60 s"


async def test_a_commit_that_never_ends_does_not_block_the_next_document(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    commit = node.activator.commit

    async def stuck(token: object) -> None:
        await asyncio.Event().wait()

    node.activator.commit = stuck
    node.updater.offer(node.package(b'"v2"'))
    await node.when(lambda: node.updater.report.state == "committing" and node.clock.sleepers > 0)
    node.updater.offer(node.package(b'"v3"'))
    await node.settle()
    node.activator.commit = commit
    node.clock.advance(61)
    await node.when(lambda: node.updater.report.revision == 3 and node.updater.report.state == "applied")
    assert node.activator.active == b'"v3"'


# --- restarts -----------------------------------------------------------------------------------------------------------


async def test_every_state_is_on_the_disk_before_it_is_entered(node) -> None:
    await node.updater.start()
    seen: list[tuple[str, str]] = []

    def look(kind: str, report) -> None:
        stored = node.state.progress(node.kind, node.scope)
        seen.append((report.state, stored.state))

    node.updater._journal._on_report = look
    await applied(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided"
    node.holds.hold("robot in motion", 50)
    node.updater.offer(node.package(b'"v2"'))
    await node.when(lambda: node.updater.report.state == "held" and node.clock.sleepers > 0)
    node.clock.advance(51)
    await node.watched()
    node.activator.judgement, node.activator.wanted = "bad: wrong", ()
    node.clock.advance(1)
    await node.until("rolled_back")
    assert all(reported == stored for reported, stored in seen)
    assert {state for state, _ in seen} == set(STATES) - {"idle", "waiting", "refused", "failed"}


async def test_an_update_that_was_held_is_held_again_after_a_kill_without_any_source(node) -> None:
    await held(node)
    await node.holds.keep(node.holds.current())
    await node.restart(crash=True)
    node.fetcher.down = True
    node.activator.plan = lambda body, capabilities: (digest_of(b"file of " + body),)
    await node.updater.start()
    assert (node.updater.report.state, node.updater.report.detail) == ("held", "robot in motion")
    assert node.activator.active == b'"v1"'
    await node.settle()
    assert node.updater.report.state == "held"
    node.clock.advance(101)
    await node.until("applied")
    assert node.activator.active == b'"v2"'


async def test_attempts_are_counted_across_restarts(node) -> None:
    await node.updater.start()
    node.fetcher.down = True
    envelope = node.package(b'"v1"')
    node.updater.offer(envelope)
    for attempts in (1, 2):
        await node.when(lambda attempts=attempts: node.is_retrying() and node.updater.report.attempts == attempts)
        node.clock.advance(100)
    await node.when(lambda: node.is_retrying() and node.updater.report.attempts == 3)
    await node.restart(crash=True)
    node.fetcher.down = True
    await node.updater.start()
    node.updater.offer(envelope)
    await node.when(lambda: node.is_retrying() and node.updater.report.attempts == 4)


async def test_a_version_on_probation_is_on_probation_after_a_kill_and_a_proved_one_is_not(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided"
    node.updater.offer(node.package(b'"v2"'))
    await node.watched()
    await node.restart(crash=True)
    node.activator.judgement = "undecided"
    await node.updater.start()
    assert (node.updater.report.state, node.updater.report.applied) == ("probation", 2)
    node.activator.judgement = "good"
    await node.when(lambda: node.clock.sleepers > 0)
    node.clock.advance(1)
    await node.until("applied")
    await node.restart(crash=True)
    node.activator.judgement = "undecided"
    await node.updater.start()
    assert node.updater.report.state == "applied"


async def test_a_rollback_is_still_told_after_a_restart_and_the_version_stays_condemned(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.activator.judgement = "bad: slow"
    first = node.activator.wanted
    envelope = node.package(b'"v2"')
    node.activator.wanted = ()
    node.updater.offer(envelope)
    await node.until("rolled_back")
    await node.restart(crash=True)
    node.activator.wanted = first
    await node.updater.start()
    report = node.updater.report
    assert (report.state, report.applied, report.revision) == ("rolled_back", 1, 2)
    assert "slow" in report.error
    node.updater.offer(envelope)
    await node.settle()
    assert node.activator.active == b'"v1"'


@pytest.mark.parametrize("cut", ["record", "roll_back"])
async def test_power_that_fails_around_a_rollback_leaves_the_good_version_or_the_bad_one_that_is_taken_back_again(
    node, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided"
    node.updater.offer(node.package(b'"v2"'))
    await node.watched()
    node.activator.wanted = ()

    class PowerCut(BaseException):
        pass

    real = getattr(StateStore, cut)

    def fail(self, *args: object) -> None:
        if cut == "record" and args[-1].state != "rolled_back":  # type: ignore[attr-defined]
            return real(self, *args)
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(StateStore, cut, fail)
        node.activator.judgement = "bad: wrong"
        node.clock.advance(1)
        with pytest.raises(PowerCut):
            await asyncio.wait_for(asyncio.shield(node.updater._worker), 3)
    await node.restart(crash=True)
    node.activator.judgement = "bad: wrong"
    await node.updater.start()
    assert node.activator.active == b'"v1"'
    assert node.updater.report.state == "rolled_back"


async def test_the_rollback_of_a_rollback(node) -> None:
    """v2 is taken back, v3 too: each time to v1, and both stay condemned as long as they are the newest."""
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    for body in (b'"v2"', b'"v3"'):
        node.activator.judgement = "undecided"
        envelope = node.package(body)
        node.updater.offer(envelope)
        await node.when(lambda body=body: node.activator.active == body)
        await node.watched()
        node.activator.judgement, node.activator.wanted = "bad: wrong", ()
        node.clock.advance(1)
        await node.until("rolled_back")
        assert node.activator.active == b'"v1"'
        node.updater.offer(envelope)
        await node.settle()
        assert node.activator.active == b'"v1"'
    node.activator.judgement = "good"
    await applied(node, node.package(b'"v4"'))
    assert node.activator.active == b'"v4"'


async def test_going_back_that_fails_is_tried_again(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided"
    node.updater.offer(node.package(b'"v2"'))
    await node.watched()
    node.activator.wanted = ()
    node.activator.refuse[b'"v1"'] = ValueError("no memory")
    node.activator.judgement = "bad: wrong"
    node.clock.advance(1)
    assert "going back failed" in (await node.until("failed")).error
    node.activator.refuse.clear()
    await node.when(lambda: node.clock.sleepers > 0)
    node.clock.advance(61)
    await node.until("rolled_back")
    assert node.activator.active == b'"v1"'


async def test_an_idle_version_is_applied_after_its_probation_and_the_report_says_undecided(node) -> None:
    await node.updater.start()
    node.activator.judgement = "undecided: 3 of 20 answers"
    node.updater.offer(node.package(b'"v1"'))
    await node.watched()
    node.clock.advance(31)
    assert (await node.until("applied")).detail == "undecided: 3 of 20 answers"
    assert node.activator.settled_times == 1


async def test_a_proved_version_is_watched_on_and_still_taken_back(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.activator.judgement = "good so far: 20 answers"
    await applied(node, node.package(b'"v2"'))
    assert node.updater.report.detail == "good so far: 20 answers"
    await node.when(lambda: node.clock.sleepers > 0)
    node.activator.judgement, node.activator.wanted = "bad: confidence fell", ()
    node.clock.advance(1)
    await node.until("rolled_back")
    assert node.activator.active == b'"v1"'


async def test_a_hold_that_comes_just_before_the_point_of_no_return_is_heeded(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    await node.when(lambda: node.updater._running is None)
    async with node.updater._point_of_no_return:
        node.updater.offer(node.package(b'"v2"'))
        await node.when(lambda: bool(node.updater._point_of_no_return._waiters))
        node.holds.hold("robot in motion", 100)
    await node.updater.settled()
    await node.until("held")
    assert node.activator.active == b'"v1"'
