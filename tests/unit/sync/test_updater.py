"""A verified document gets in force, a bad one never does, and the old version serves until then."""

from __future__ import annotations

import asyncio
import logging

import msgspec
import pytest

from sync.activation import MAX_STARTS, MAX_UNLUCKY
from sync.errors import BadSignature, Malformed, Replayed, StoreFailed, SyncError, Unavailable
from sync.fetch import Source
from sync.messages import Document
from sync.packages import REFRESH_GAP
from sync.trust import SigningKey, sign
from sync.updater import STATES


def states(node) -> list[str]:
    """The states reported, without repetitions."""
    found: list[str] = []
    for report in node.reports:
        if not found or found[-1] != report.state:
            found.append(report.state)
    return found


async def apply(node, envelope: bytes):
    node.updater.offer(envelope)
    await node.when(lambda: node.updater.report.revision == node.revision and node.updater.report.state == "applied")
    return node.updater.report


async def test_a_document_is_fetched_prepared_committed_and_reported(node) -> None:
    await node.updater.start()
    report = await apply(node, node.package(b'"v1"'))
    assert (report.applied, report.revision, report.error) == (1, 1, None)
    assert node.activator.active == b'"v1"'
    assert list(node.activator.prepared[0][1].values()) == [b'file of "v1"']
    assert states(node) == ["verifying", "fetching", "preparing", "committing", "probation", "applied"]


async def test_a_policy_is_in_force_without_any_file_or_source(policy) -> None:
    policy.fetcher.down = True
    await policy.updater.start()
    report = await apply(policy, policy.document(b'"p1"'))
    assert report.applied == 1
    assert policy.fetcher.asked == []
    assert policy.state.floor("policy", "tenant:acme").revision == 1


async def test_the_floor_of_a_policy_is_on_the_disk_before_it_is_in_force(policy) -> None:
    await policy.updater.start()
    seen: list[int] = []
    commit = policy.activator.commit

    async def spy(token: object) -> None:
        seen.append(policy.state.floor("policy", "tenant:acme").revision)
        await commit(token)

    policy.activator.commit = spy
    await apply(policy, policy.document(b'"p1"'))
    assert seen == [1]


async def test_the_same_document_again_is_reported_again_and_nothing_is_done(node) -> None:
    await node.updater.start()
    envelope = node.package(b'"v1"')
    await apply(node, envelope)
    count = len(node.reports)
    node.updater.offer(envelope)
    await node.when(lambda: len(node.reports) > count)
    assert node.updater.report.state == "applied"
    assert len(node.activator.prepared) == 1


def _elsewhere(node) -> bytes:
    scope, node.scope = node.scope, "node:acme.edge-2"
    try:
        return node.document(b'"x"', revision=9)
    finally:
        node.scope = scope


BAD = {
    "garbage": lambda node: b"garbage",
    "replay": lambda node: node.document(b'"old"', revision=1),
    "other contents under the revision in force": lambda node: node.document(b'"forged"', revision=2),
    "expired": lambda node: node.document(b'"late"', revision=9, expires=1.0),
    "another scope": _elsewhere,
}
CODES = {
    "garbage": "malformed",
    "replay": "replayed",
    "other contents under the revision in force": "replayed",
    "expired": "expired",
    "another scope": "wrong_scope",
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_offer_is_counted_reported_and_changes_nothing(node, name: str) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    await apply(node, node.package(b'"v2"'))
    node.updater.offer(BAD[name](node))
    report = await node.until("refused")
    assert report.applied == 2
    assert report.error.startswith(f"{CODES[name]}: ")
    assert node.updater.refusals == {CODES[name]: 1}
    assert node.activator.active == b'"v2"'
    assert node.state.floor(node.kind, node.scope).revision == 2


async def test_a_flood_of_garbage_does_not_push_a_good_document_out(node) -> None:
    await node.updater.start()
    node.updater.offer(node.package(b'"v1"'))
    for _ in range(5):
        node.updater.offer(b"garbage")
    await node.when(lambda: node.activator.active == b'"v1"')
    await node.settle()
    assert node.updater.report.applied == 1


async def test_a_file_that_is_not_approved_is_never_fetched(node) -> None:
    await node.updater.start()
    envelope = node.package(b'"v1"')
    node.list_files({})
    node.updater.offer(envelope)
    report = await node.until("failed")
    assert report.error.startswith("not_listed: ")
    assert not [path for path in node.fetcher.asked if path.startswith("sha256:")]
    assert node.state.floor(node.kind, node.scope).revision == 0


async def test_a_refused_document_is_taken_once_its_files_are_approved(node) -> None:
    await node.updater.start()
    envelope = node.package(b'"v1"')
    files = dict(node.repository.files)
    node.list_files({})
    node.updater.offer(envelope)
    await node.until("failed")
    node.list_files(files)
    await node.pass_time()
    assert (await node.until("applied")).applied == 1


@pytest.mark.parametrize("error", [Malformed("garbage"), BadSignature("forged"), Replayed("old")])
async def test_bad_metadata_delays_an_update_and_never_ends_it(node, error: SyncError) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    envelope = node.package(b'"v2"')
    node.repository.failure = error
    node.updater.offer(envelope)
    report = await node.until("failed")
    assert report.error.startswith(f"{error.code}: ")
    assert (report.applied, node.updater.refusals[error.code]) == (1, 1)
    node.repository.failure = None
    await node.pass_time()
    assert (await node.until("applied")).applied == 2


async def test_a_newer_document_takes_the_place_of_one_whose_file_is_wrong(node) -> None:
    await node.updater.start()
    first = node.package(b'"v1"')
    node.fetcher.files[node.activator.wanted[0]] = b"tampered"
    node.updater.offer(first)
    await node.until("failed")
    node.fetcher.files.clear()
    node.updater.offer(node.package(b'"v2"'))
    assert (await node.until("applied")).applied == 2


async def test_wrong_bytes_are_never_loaded_and_the_update_waits_for_the_right_ones(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    envelope = node.package(b'"v2"')
    (digest,) = node.activator.wanted
    good, node.fetcher.files[digest] = node.fetcher.files[digest], b"tampered"
    node.updater.offer(envelope)
    report = await node.until("failed")
    assert report.error.startswith("digest_mismatch: ")
    assert (report.applied, report.revision) == (1, 2)
    assert node.activator.active == b'"v1"'
    assert node.state.slots(node.kind, node.scope).candidate == envelope
    node.fetcher.files[digest] = good
    await node.pass_time()
    assert (await node.until("applied")).applied == 2


async def test_a_stream_of_garbage_does_not_switch_rolling_back_off(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided"
    node.updater.offer(node.package(b'"v2"'))
    await node.watched()
    node.activator.judgement = "bad: wrong"
    node.activator.wanted = ()
    for _ in range(4):
        node.clock.advance(0.5)
        for _ in range(3):
            node.updater.offer(b"garbage")
        await node.settle()
    await node.when(lambda: node.activator.active == b'"v1"')


async def test_a_disk_that_refuses_after_the_preparation_does_not_condemn_the_version(
    node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.updater.start()
    activate, left = node.state.activate, [MAX_STARTS + 1]

    def full(verified, envelope: bytes, now: float) -> None:
        if verified.document.kind == "desired" and left[0]:
            left[0] -= 1
            raise StoreFailed("disk full")
        activate(verified, envelope, now)

    monkeypatch.setattr(node.state, "activate", full)
    node.updater.offer(node.package(b'"v1"'))
    for attempt in range(MAX_STARTS + 1):
        await node.when(lambda attempt=attempt: left[0] <= MAX_STARTS - attempt and node.clock.sleepers > 0)
        node.clock.advance(100)
    assert (await node.until("applied")).applied == 1


async def test_power_cuts_do_not_condemn_a_version_that_proved_itself(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    await apply(node, node.package(b'"v2"'))
    await node.settle()
    node.activator.wanted = ()
    for _ in range(MAX_STARTS + 2):
        await node.restart(crash=True)
        node.activator.judgement = "undecided"
        await node.updater.start()
        assert node.activator.active == b'"v2"'


async def test_an_only_version_that_kills_the_process_is_not_started_for_ever(node) -> None:
    await node.updater.start()
    node.activator.judgement = "undecided"
    node.updater.offer(node.package(b'"v1"'))
    await node.until("probation")
    for _ in range(MAX_STARTS):
        await node.restart(crash=True)
        node.activator.judgement = "undecided"
        await node.updater.start()
        assert node.activator.active == b'"v1"'
    await node.restart(crash=True)
    await node.updater.start()
    assert node.activator.active is None
    assert node.updater.report.state == "failed"
    assert "3 times" in node.updater.report.error
    slots = node.state.slots(node.kind, node.scope)
    assert slots.active is None and slots.candidate is not None


async def test_what_the_activator_rejects_is_refused_with_its_reason_and_not_tried_again(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    node.activator.refuse[b'"v2"'] = ValueError("golden outputs differ")
    envelope = node.package(b'"v2"')
    node.updater.offer(envelope)
    report = await node.until("refused")
    assert report.error == "rejected: golden outputs differ"
    node.updater.offer(envelope)
    await node.settle()
    assert [body for body, _ in node.activator.prepared] == [b'"v1"', b'"v2"']
    assert node.activator.active == b'"v1"'


async def test_a_preparation_that_fails_for_a_passing_reason_is_tried_again(node) -> None:
    await node.updater.start()
    node.activator.refuse[b'"v1"'] = OutOfMemory("not now")
    node.updater.offer(node.package(b'"v1"'))
    assert (await node.until("failed")).error == "unavailable: not now"
    node.activator.refuse.clear()
    await node.when(lambda: node.clock.sleepers > 0)
    node.clock.advance(100)
    assert (await node.until("applied")).applied == 1


async def test_bad_luck_without_end_is_the_versions_own_fault(node) -> None:
    await node.updater.start()
    node.activator.refuse[b'"v1"'] = OutOfMemory("not now")
    node.updater.offer(node.package(b'"v1"'))
    for attempt in range(1, MAX_UNLUCKY):
        await node.when(lambda attempt=attempt: len(node.activator.prepared) == attempt and node.is_retrying())
        node.clock.advance(100)
    assert (await node.until("refused")).error == "rejected: not now"
    assert len(node.activator.prepared) == MAX_UNLUCKY


class OutOfMemory(Exception):
    transient = True


async def test_a_body_may_not_need_what_its_document_does_not_declare(node) -> None:
    await node.updater.start()
    envelope = node.package(b'"v1"')
    node.activator.wanted = ("sha256:" + "f" * 64,)
    node.updater.offer(envelope)
    report = await node.until("refused")
    assert "does not declare" in report.error


async def test_an_unreachable_source_is_tried_again_until_it_answers(node) -> None:
    await node.updater.start()
    envelope = node.package(b'"v1"')
    node.fetcher.down = True
    node.updater.offer(envelope)
    for attempts in range(1, 5):
        await node.when(lambda n=attempts: node.is_retrying() and node.updater.report.attempts == n)
        assert node.updater.report.error.startswith("unavailable: ")
        node.fetcher.down = attempts < 4
        node.clock.advance(100)
    await node.until("applied")
    assert node.activator.active == b'"v1"'


async def test_a_newer_document_takes_the_place_of_one_under_way(node) -> None:
    await node.updater.start()
    node.fetcher.gate = asyncio.Event()
    first, second = node.package(b'"v1"'), None
    node.updater.offer(first)
    await node.until("fetching")
    second = node.package(b'"v2"')
    node.updater.offer(second)
    await node.when(
        lambda: len([item for item in node.fetcher.asked if item.startswith("sha256:")]) == 2 or node.clock.sleepers > 0
    )
    node.clock.advance(1)
    await node.settle()
    node.fetcher.gate.set()
    await node.when(lambda: node.updater.report.state == "applied")
    assert node.activator.history == [b'"v2"']
    assert node.updater.report.applied == 2


async def test_an_older_document_does_not_stop_a_newer_one_under_way(node) -> None:
    await node.updater.start()
    node.fetcher.gate = asyncio.Event()
    node.updater.offer(node.package(b'"v5"', revision=5))
    await node.until("fetching")
    node.updater.offer(node.document(b'"v4"', revision=4))
    node.updater.offer(b"garbage")
    await node.settle()
    assert node.updater.report.state == "fetching"
    assert node.updater.refusals == {"replayed": 1, "malformed": 1}
    node.fetcher.gate.set()
    await node.until("applied")
    assert node.activator.active == b'"v5"'


async def test_a_bad_verdict_rolls_back_and_the_version_is_never_taken_again(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    envelope = node.package(b'"v2"')
    node.activator.judgement = "undecided"
    node.updater.offer(envelope)
    await node.watched()
    node.activator.judgement = "bad: one answer in two is an error"
    node.activator.wanted = ()
    node.clock.advance(1)
    report = await node.until("rolled_back")
    assert "one answer in two" in report.error
    assert (report.applied, report.revision) == (1, 2)
    assert node.activator.active == b'"v1"'
    node.activator.judgement = "good"
    await node.restart()
    await node.updater.start()
    assert node.activator.active == b'"v1"'
    node.updater.offer(envelope)
    report = await node.until("rolled_back")
    assert (report.applied, node.activator.active) == (1, b'"v1"')


async def test_without_a_previous_version_a_bad_one_keeps_serving_and_says_so(node) -> None:
    await node.updater.start()
    node.activator.judgement = "bad: slow"
    node.updater.offer(node.package(b'"v1"'))
    report = await node.until("failed")
    assert "no previous version" in report.error
    assert (report.applied, node.activator.active) == (1, b'"v1"')


async def test_probation_ends_after_its_time_and_the_verdict_stays_open(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided"
    node.updater.offer(node.package(b'"v2"'))
    await node.watched()
    node.clock.advance(31)
    await node.until("applied")
    await node.when(lambda: node.clock.sleepers > 0)
    node.activator.judgement = "bad: late"
    node.activator.wanted = ()
    node.clock.advance(1)
    await node.until("rolled_back")
    assert node.activator.active == b'"v1"'


async def test_the_version_in_force_is_watched_while_the_next_one_cannot_be_fetched(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided"
    node.updater.offer(node.package(b'"v2"'))
    await node.watched()
    envelope = node.package(b'"v3"')
    node.fetcher.down = True
    node.updater.offer(envelope)
    await node.when(lambda: node.updater.report.state == "failed" and node.clock.sleepers >= 2)
    node.activator.judgement = "bad: wrong"
    node.activator.wanted = ()
    node.clock.advance(1)
    await node.when(lambda: node.activator.active == b'"v1"')
    assert node.updater.report.applied == 1


async def test_a_version_on_probation_is_not_what_rolling_back_goes_to(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided"
    for body in (b'"v2"', b'"v3"'):
        node.updater.offer(node.package(body))
        await node.when(lambda body=body: node.activator.active == body)
        await node.watched()
    node.activator.judgement = "bad: wrong"
    node.activator.wanted = ()
    node.clock.advance(1)
    await node.until("rolled_back")
    assert node.activator.active == b'"v1"'


async def test_a_restart_without_network_serves_the_stored_version_even_when_it_has_expired(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"', expires=node.clock.wall() + 10))
    await node.restart()
    node.fetcher.down = True
    node.clock.advance(10_000_000)
    await node.updater.start()
    assert node.activator.active == b'"v1"'
    assert node.updater.report.state == "applied"
    assert node.fetcher.asked == []


async def test_a_version_that_kills_the_process_three_times_is_given_up(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided"
    node.updater.offer(node.package(b'"v2"'))
    await node.until("probation")
    node.activator.wanted = ()
    active = []
    for _ in range(4):
        await node.restart(crash=True)
        node.activator.judgement = "undecided"
        await node.updater.start()
        active.append(node.activator.active)
    assert active == [b'"v2"', b'"v2"', b'"v2"', b'"v1"']
    assert node.updater.report.state == "rolled_back"


async def test_restarts_in_good_order_are_no_crashes(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    node.activator.judgement = "undecided"
    node.updater.offer(node.package(b'"v2"'))
    await node.until("probation")
    for _ in range(6):
        await node.restart()
        node.activator.judgement = "undecided"
        await node.updater.start()
        assert node.activator.active == b'"v2"'


async def test_a_candidate_that_kills_the_process_while_it_loads_is_given_up(node) -> None:
    await node.updater.start()
    envelope = node.package(b'"v1"')
    node.fetcher.gate = asyncio.Event()
    node.updater.offer(envelope)
    await node.until("fetching")
    files = node.fetcher.files
    await node.restart(crash=True)
    for _ in range(3):
        node.state.begin_start(node.kind, node.scope, "candidate")
    node.fetcher.files = files
    await node.updater.start()
    report = await node.until("refused")
    assert "3 times" in report.error
    node.updater.offer(envelope)
    await node.until("rolled_back")
    assert node.activator.active is None


async def test_a_candidate_is_taken_up_again_after_a_restart(node) -> None:
    await node.updater.start()
    envelope = node.package(b'"v1"')
    node.fetcher.gate = asyncio.Event()
    node.updater.offer(envelope)
    await node.until("fetching")
    files = node.fetcher.files
    await node.restart(crash=True)
    node.fetcher.files = files
    await node.updater.start()
    await node.until("applied")
    assert node.activator.active == b'"v1"'


async def test_a_stored_version_that_does_not_start_leaves_the_previous_one_and_is_repaired(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    first = node.activator.wanted[0]
    await apply(node, node.package(b'"v2"'))
    second = node.activator.wanted[0]
    files = node.fetcher.files
    node.store.path(second).unlink()
    await node.restart()
    plan = {b'"v1"': (first,), b'"v2"': (second,)}
    node.activator.plan = lambda body, capabilities: plan[body]
    node.fetcher.down = True
    await node.updater.start()
    assert node.activator.active == b'"v1"'
    assert "are gone" in node.updater.report.error
    await node.when(lambda: node.clock.sleepers > 0)
    node.fetcher.down, node.fetcher.files = False, files
    node.clock.advance(100)
    await node.until("applied")
    assert node.activator.active == b'"v2"'


async def test_a_full_disk_is_reported_and_tried_again(node, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.updater.start()

    def full(*args: object) -> None:
        raise StoreFailed("disk full")

    envelope = node.package(b'"v1"')
    with monkeypatch.context() as patch:
        patch.setattr(node.state, "activate", full)
        patch.setattr(node.state, "accept", full)
        node.packages._known = None
        node.updater.offer(envelope)
        report = await node.until("failed")
        assert report.error == "store_failed: disk full"
        await node.when(lambda: node.clock.sleepers > 0)
    node.clock.advance(100)
    await node.settle()
    await node.when(lambda: node.clock.sleepers > 0 or node.updater.report.state == "applied")
    node.clock.advance(100)
    await node.until("applied")


async def test_every_step_taken_in_these_tests_is_in_the_table(node, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="sync.updater"):
        await test_a_bad_verdict_rolls_back_and_the_version_is_never_taken_again(node)
    assert caplog.records == []
    assert set(STATES) == {state for row in STATES.values() for state in row.values()} | {"idle"}


async def test_needed_names_every_file_of_a_stored_document(node) -> None:
    await node.updater.start()
    await apply(node, node.package(b'"v1"'))
    await apply(node, node.package(b'"v2"'))
    assert node.updater.needed() == set(node.fetcher.files)


async def test_a_document_that_came_before_the_keyring_is_taken_up_when_it_comes(policy) -> None:
    policy.packages._approval = policy.packages._keyring = None
    policy.fetcher.down = True
    await policy.updater.start()
    policy.updater.offer(policy.document(b'"p1"'))
    policy.updater.offer(b"garbage that comes later")
    await policy.when(lambda: policy.updater.refusals["unavailable"] == 1 and policy.updater.refusals["malformed"] == 1)
    policy.clock.advance(REFRESH_GAP)
    policy.fetcher.down = False
    await policy.packages.refresh()
    assert (await policy.until("applied")).revision == 1


async def test_of_documents_that_came_before_the_keyring_the_newest_is_in_force_and_none_is_a_replay(policy) -> None:
    policy.packages._approval = policy.packages._keyring = None
    policy.fetcher.down = True
    await policy.updater.start()
    for number in (1, 2, 3):
        policy.clock.advance(REFRESH_GAP)
        policy.updater.offer(policy.document(f'"p{number}"'.encode()))
        await policy.when(lambda count=number: policy.updater.refusals["unavailable"] == count)
    policy.clock.advance(REFRESH_GAP)
    policy.fetcher.down = False
    await policy.packages.refresh()
    await policy.until("applied")
    await policy.settle()
    report = policy.updater.report
    assert (report.applied, report.state, policy.updater.refusals["replayed"]) == (3, "applied", 0)


async def test_a_source_that_swallows_questions_does_not_put_off_rolling_back(
    policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    await policy.updater.start()
    await apply(policy, policy.document(b'"p1"'))
    policy.activator.judgement = "undecided"
    policy.updater.offer(policy.document(b'"p2"'))
    await policy.watched()
    policy.activator.judgement = "bad: wrong"
    swallowed = asyncio.Event()

    async def swallow(source: Source, path: str, limit: int) -> bytes:
        swallowed.set()
        await policy.clock.sleep(10_000)
        raise Unavailable("swallowed")

    monkeypatch.setattr(policy.fetcher, "get", swallow)
    document = Document("policy", policy.scope, 9, policy.clock.wall(), (), msgspec.Raw(b"1"))
    policy.updater.offer(sign(document, [SigningKey.from_bytes(b"\7" * 32)]))
    async with asyncio.timeout(3):
        await swallowed.wait()
    policy.clock.advance(5)
    await policy.when(lambda: policy.activator.active == b'"p1"')


async def test_signed_times_ahead_of_the_clock_do_not_add_up(policy) -> None:
    await policy.updater.start()
    start = policy.clock.wall()
    await apply(policy, policy.document(b'"p1"', issued=start + 299))
    assert policy.state.time_floor() <= start
    policy.updater.offer(policy.document(b'"p2"', issued=start + 598))
    await policy.when(lambda: policy.updater.refusals["expired"] == 1)
    policy.repository.issued = start + 299
    await policy.packages.refresh()
    policy.clock.advance(REFRESH_GAP)
    policy.repository.issued = start + 598
    await policy.packages.refresh()
    assert policy.state.time_floor() <= start + 300
