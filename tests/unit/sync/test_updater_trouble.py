"""What else goes wrong around an update: cancelled in the wrong moment, started in a bad hour, replayed, never asked."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from sync.activation import MAX_STARTS, MAX_UNLUCKY
from sync.settings import Settings
from sync.windows import Window
from tests.unit.sync.conftest import digest_of


async def applied(node, envelope: bytes):
    node.updater.offer(envelope)
    await node.when(lambda: node.updater.report.revision == node.revision and node.updater.report.state == "applied")


async def probation(node, body: bytes = b'"v2"') -> None:
    """`v1` proved itself, `body` is in force and undecided."""
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided: 0 of 20 answers"
    node.updater.offer(node.package(body))
    await node.watched()


async def when_time_passes(node, ready) -> None:
    async with asyncio.timeout(5):
        while not ready():
            await asyncio.sleep(0.002)
            node.clock.advance(10)


class Passing(Exception):
    transient = True


# --- what was loaded is released ------------------------------------------------------------------------------------------


async def test_what_was_loaded_is_released_when_a_newer_document_comes_just_then(
    node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    inside, go, end_start = threading.Event(), threading.Event(), node.state.end_start

    def slow(kind: str, scope: str, slot: str, **more: bool) -> None:
        if slot == "candidate":
            inside.set()
            go.wait(3)
        end_start(kind, scope, slot, **more)

    with monkeypatch.context() as patch:
        patch.setattr(node.state, "end_start", slow)
        node.updater.offer(node.package(b'"v2"'))
        await node.when(inside.is_set)
    node.updater.offer(node.package(b'"v3"'))
    await node.when(lambda: node.updater._running is None or node.updater._running.document.revision == 3)
    go.set()
    await node.when(lambda: node.activator.active == b'"v3"')
    assert node.activator.discarded == [b'"v2"']


async def test_a_version_that_could_not_be_put_in_force_once_is_not_its_own_previous_one(node) -> None:
    await node.updater.start()
    commit, failures = node.activator.commit, [RuntimeError("once")]

    async def fails_once(token: object) -> None:
        if failures:
            raise failures.pop()
        await commit(token)

    node.activator.commit = fails_once
    node.activator.judgement = "undecided"
    node.updater.offer(node.package(b'"v1"'))
    await node.pass_time()
    await node.until("probation")
    slots = node.state.slots(node.kind, node.scope)
    assert (slots.active is not None, slots.previous) == (True, None)


# --- starting -------------------------------------------------------------------------------------------------------------


async def test_what_does_not_start_for_a_reason_that_passes_comes_back_without_network_or_window(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    await node.restart()
    node.fetcher.down = True
    node.settings = Settings(windows=(Window(start="00:00", minutes=1, days=("mon",)),))
    node.clock.advance(2e9)  # long after everything here expired
    node.activator.refuse[b'"v1"'] = Passing("no memory")
    await node.updater.start()
    assert node.updater.report.state == "failed"
    await when_time_passes(node, lambda: len(node.activator.prepared) > MAX_UNLUCKY + 1)
    assert node.activator.active is None
    node.activator.refuse.clear()
    await when_time_passes(node, lambda: node.activator.active == b'"v1"')
    assert node.fetcher.asked == []


async def test_what_starts_again_beside_an_older_version_still_waits_for_a_hold(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    await applied(node, node.package(b'"v2"'))
    await node.restart()
    node.activator.plan = lambda body, capabilities: (digest_of(b"file of " + body),)
    node.activator.refuse[b'"v2"'] = Passing("no memory")
    hold = node.holds.hold("robot in motion", 800)
    await node.updater.start()
    node.activator.refuse.clear()
    assert node.activator.active == b'"v1"'
    await node.until("held")
    node.holds.release(hold.id)
    await node.when(lambda: node.activator.active == b'"v2"')


async def test_a_deadline_too_short_for_loading_does_not_take_away_what_was_in_force(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    await node.restart()
    node.settings = Settings(deadlines={"preparing": 0.5})
    node.activator.gate = asyncio.Event()
    starting = asyncio.ensure_future(node.updater.start())
    await node.when(lambda: node.clock.sleepers > 0)
    node.clock.advance(10)
    await node.settle()
    node.activator.gate.set()
    await starting
    assert node.updater.report.state == "applied"
    assert node.activator.active == b'"v1"'


async def test_a_version_that_was_never_asked_and_kills_the_process_is_given_up(node) -> None:
    """Applied in a quiet night, it dies of the first request of the morning."""
    await probation(node)
    node.clock.advance(31)
    await node.until("applied")
    await node.when(lambda: node.state.slots(node.kind, node.scope).confirmed)
    node.activator.wanted = ()
    for _ in range(MAX_STARTS + 1):
        assert node.activator.active == b'"v2"'
        await node.restart(crash=True)
        node.activator.judgement = "undecided: 0 of 20 answers"
        await node.updater.start()
    assert node.activator.active == b'"v1"'
    assert node.updater.report.state == "rolled_back"


async def test_an_only_version_that_was_never_asked_survives_power_cuts(node) -> None:
    await node.updater.start()
    node.activator.judgement = "undecided: 0 of 20 answers"
    node.updater.offer(node.package(b'"v1"'))
    await node.watched()
    node.clock.advance(31)
    await node.until("applied")
    await node.when(lambda: node.state.slots(node.kind, node.scope).confirmed)
    for _ in range(MAX_STARTS + 2):
        await node.restart(crash=True)
        node.activator.judgement = "undecided: 0 of 20 answers"
        await node.updater.start()
        assert node.activator.active == b'"v1"'


async def test_a_version_that_proves_itself_after_its_probation_is_not_given_up_for_power_cuts(node) -> None:
    await probation(node)
    node.clock.advance(31)
    await node.until("applied")
    await node.when(lambda: node.clock.sleepers > 0)
    node.activator.judgement = "good"
    node.clock.advance(1)
    await node.when(lambda: node.state.slots(node.kind, node.scope).proved)


# --- side by side ---------------------------------------------------------------------------------------------------------


async def test_the_version_in_force_and_the_next_one_take_their_steps_one_after_the_other(
    node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await probation(node)
    inside, late, record = threading.Event(), threading.Event(), node.state.record

    def slow(kind: str, scope: str, progress) -> None:
        if progress.state == "verifying":
            inside.set()
            late.wait(0.2)
        if progress.state == "applied" and progress.revision == 2:
            late.set()
            time.sleep(0.1)
        record(kind, scope, progress)

    monkeypatch.setattr(node.state, "record", slow)
    node.updater.offer(node.package(b'"v3"'))
    await node.when(inside.is_set)
    node.activator.judgement = "good"
    node.clock.advance(2)
    await node.when(lambda: node.updater.report.state == "applied" and node.updater.report.applied == 3)
    assert "failed" not in [report.state for report in node.reports]


async def test_loading_the_version_to_go_back_to_keeps_nobody_waiting(node) -> None:
    await probation(node)
    node.activator.wanted = ()
    node.activator.gate, loaded = asyncio.Event(), len(node.activator.prepared)
    node.activator.judgement = "bad: wrong"
    node.clock.advance(1)
    await node.when(lambda: len(node.activator.prepared) > loaded)
    async with asyncio.timeout(1):
        await node.updater.settled()
    async with asyncio.timeout(3):
        await node.updater.close()
    assert node.activator.active == b'"v2"'
    node.updater._worker = None


async def test_a_newer_version_put_in_force_while_the_older_one_loads_stays(node) -> None:
    await probation(node)
    third = node.package(b'"v3"')
    node.activator.plan = lambda body, capabilities: (digest_of(b"file of " + body),)
    hold = node.holds.hold("robot in motion", 800)
    node.updater.offer(third)
    await node.until("held")
    gate, prepare = asyncio.Event(), node.activator.prepare

    async def slow(body: bytes, blobs) -> object:
        if body == b'"v1"':
            await gate.wait()
        return await prepare(body, blobs)

    node.activator.prepare = slow
    node.activator.judgement = "bad: wrong"
    node.clock.advance(1)
    await node.settle()
    node.activator.judgement = "good"
    node.holds.release(hold.id)
    await node.when(lambda: node.activator.active == b'"v3"')
    gate.set()
    await node.until("applied")
    await node.when(lambda: b'"v1"' in node.activator.discarded)
    assert node.activator.active == b'"v3"'
    assert node.updater.report.applied == 3


async def test_a_hold_that_ends_while_it_is_being_recorded_delays_no_longer(
    node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    hold = node.holds.hold("robot in motion", 900)
    inside, go, record = threading.Event(), threading.Event(), node.state.record

    def slow(kind: str, scope: str, progress) -> None:
        if progress.state == "held":
            inside.set()
            go.wait(3)
        record(kind, scope, progress)

    monkeypatch.setattr(node.state, "record", slow)
    node.updater.offer(node.package(b'"v2"'))
    await node.when(inside.is_set)
    node.holds.release(hold.id)
    go.set()
    await node.when(lambda: node.activator.active == b'"v2"')


async def test_seconds_on_hold_are_counted_once_across_a_restart(node) -> None:
    await node.updater.start()
    await applied(node, node.package(b'"v1"'))
    node.holds.hold("first", 800)
    node.updater.offer(node.package(b'"v2"'))
    await node.when(lambda: node.updater.report.state == "held" and node.clock.sleepers > 0)
    node.clock.advance(400)
    second = node.holds.hold("second", 900)
    await node.when(lambda: node.updater.report.detail == "second")
    node.clock.advance(50)
    await node.holds.keep(second)
    await node.restart(crash=True)
    node.activator.plan = lambda body, capabilities: (digest_of(b"file of " + body),)
    await node.updater.start()
    await node.when(lambda: node.updater.report.state == "held" and node.clock.sleepers > 0)
    node.clock.advance(440)
    await asyncio.sleep(0.1)
    assert node.activator.active == b'"v1"'
    node.clock.advance(11)
    await node.when(lambda: node.activator.active == b'"v2"')


# --- the disk -------------------------------------------------------------------------------------------------------------


async def test_a_refused_or_condemned_document_that_is_sent_again_wears_no_disk(
    node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.updater.start()
    node.activator.refuse[b'"v1"'] = ValueError("no")
    refused = node.package(b'"v1"')
    node.updater.offer(refused)
    await node.until("refused")
    told, writes, record = len(node.reports), [], node.state.record

    def counted(kind: str, scope: str, progress) -> None:
        writes.append(progress)
        record(kind, scope, progress)

    monkeypatch.setattr(node.state, "record", counted)
    for sent in range(1, 6):
        node.updater.offer(refused)
        await node.when(lambda sent=sent: len(node.reports) == told + sent)
    assert writes == []


async def test_a_document_without_files_is_applied_by_one_transaction(policy, monkeypatch: pytest.MonkeyPatch) -> None:
    await policy.updater.start()
    commits: list[str] = []
    policy.state._db.set_trace_callback(lambda text: commits.append(text) if text == "COMMIT" else None)
    for count in (1, 2):
        envelope = policy.document(b'"p"')
        await applied(policy, envelope)
        assert len(commits) == count
    policy.state._db.set_trace_callback(None)
    slots = policy.state.slots(policy.kind, policy.scope)
    assert (slots.active, slots.proved) == (envelope, True)
    stored = policy.state.progress(policy.kind, policy.scope)
    assert (stored.state, stored.revision) == ("applied", 2)
    assert {report.state for report in policy.reports} == {"applied"}


async def test_a_document_without_files_that_cannot_be_recorded_is_not_put_in_force(
    policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sync.errors import StoreFailed

    await policy.updater.start()

    def full(*args: object, **more: object) -> None:
        raise StoreFailed("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(policy.state, "activate", full)
        policy.updater.offer(policy.document(b'"p1"'))
        assert (await policy.until("failed")).error == "store_failed: disk full"
        assert (policy.activator.active, policy.activator.discarded[0]) == (None, b'"p1"')
        await policy.when(policy.is_retrying)
    await when_time_passes(policy, lambda: policy.activator.active == b'"p1"')
