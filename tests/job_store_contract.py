"""What every store of jobs must do, as checks that the tests of each store run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from msgspec.structs import replace

from models.errors import Overloaded
from models.serving.jobs.job import (
    CRASHED,
    EXPIRED,
    MAX_ATTEMPTS,
    ROW_BYTES,
    Answer,
    Failure,
    Job,
    JobLimits,
    Owner,
    Work,
    new_id,
)
from models.serving.jobs.store import JobStore

NOW = 1_800_000_000.25
LIMITS = JobLimits(queued=10, bytes=1 << 20)
MINE = Owner("acme", "camera")
BODY = Work(b"body")
ANSWER = Answer(b"\x00answer\xff", 3)


def a_job(
    owner: Owner = MINE, *, at: float = NOW, ttl: float = 100.0, body: int = 0, webhook: str | None = None
) -> Job:
    return Job(
        id=new_id(),
        owner=owner,
        model="m ü",
        version=None,
        created=at,
        updated=at,
        expires=at + ttl,
        ttl=ttl,
        webhook=webhook,
        size=ROW_BYTES + body,
    )


async def added(store: JobStore, job: Job | None = None, work: Work = BODY) -> Job:
    job = job or a_job(body=len(work.body))
    await store.add(job, work, LIMITS)
    return job


async def taken(store: JobStore, worker: str = "a", at: float = NOW) -> Job:
    claimed = await store.claim(worker, at, 15.0)
    assert claimed is not None
    return claimed[0]


async def check_a_job_comes_back_exactly_as_it_went_in(store: JobStore) -> None:
    for owner, version in ((MINE, "1"), (Owner(), None), (Owner("", ""), "")):
        job = replace(a_job(owner, webhook="https://x/y?z=1"), version=version)
        await added(store, job, Work(b"\x00\xff", 1, 0.5, "trace"))
        assert await store.find([job.id, new_id()]) == [job]
        claimed = await store.claim("w", NOW, 15.0)
        assert claimed is not None
        assert claimed[0] == replace(job, state="running", attempts=1)
        assert claimed[1] == Work(b"\x00\xff", 1, 0.5, "trace")
    await added(store, a_job(), Work(b""))
    claimed = await store.claim("w", NOW, 15.0)
    assert claimed is not None
    assert claimed[1] == Work(b"", None, None, None)


async def check_jobs_are_taken_in_order_each_by_one_worker(store: JobStore) -> None:
    jobs = [await added(store, a_job(at=NOW + index / 8)) for index in range(4)]
    assert [(await taken(store, at=NOW + 1)).id for _ in range(2)] == [job.id for job in jobs[:2]]
    claims = await asyncio.gather(*(store.claim(f"w{index}", NOW + 1, 15.0) for index in range(6)))
    assert sorted(claim[0].id for claim in claims if claim) == sorted(job.id for job in jobs[2:])


async def check_an_answer_is_kept_for_its_time(store: JobStore) -> None:
    job = await added(store)
    await taken(store)
    ended = await store.finish(job.id, "a", NOW + 5, ANSWER, LIMITS)
    assert ended is not None
    assert (ended.state, ended.expires, ended.updated) == ("succeeded", NOW + 105, NOW + 5)
    assert await store.answer(job.id) == ANSWER
    await store.sweep(NOW + 104)
    assert await store.find([job.id]) == [ended]
    await store.sweep(NOW + 106)
    assert await store.find([job.id]) == []
    assert await store.answer(job.id) is None


async def check_a_failure_is_kept_with_its_status(store: JobStore) -> None:
    job = await added(store)
    await taken(store)
    ended = await store.finish(job.id, "a", NOW, Failure("input 'ü' is missing", 400), LIMITS)
    assert ended is not None
    assert (ended.state, ended.error, ended.error_status) == ("failed", "input 'ü' is missing", 400)
    assert await store.answer(job.id) is None


async def check_only_the_worker_that_holds_a_job_can_end_it_and_only_once(store: JobStore) -> None:
    job = await added(store)
    await taken(store, "a")
    assert await store.finish(job.id, "b", NOW, ANSWER, LIMITS) is None
    assert await store.finish(job.id, "a", NOW, ANSWER, LIMITS) is not None
    assert await store.finish(job.id, "a", NOW, Failure("late", 500), LIMITS) is None
    assert await store.answer(job.id) == ANSWER


async def check_a_dead_workers_job_is_run_by_another_whose_answer_counts(store: JobStore) -> None:
    job = await added(store)
    await taken(store, "dead")
    assert await store.claim("b", NOW + 1, 15.0) is None
    claimed = await store.claim("b", NOW + 16, 0.0)  # a lease of nothing: whatever is held has run out
    assert claimed is not None
    assert (claimed[0].id, claimed[0].attempts) == (job.id, 2)
    assert await store.renew([job.id], "dead", NOW + 16, 15.0) == set()
    assert await store.finish(job.id, "dead", NOW + 17, ANSWER, LIMITS) is None
    assert await store.renew([job.id], "b", NOW + 16, 15.0) == {job.id}
    assert await store.finish(job.id, "b", NOW + 17, ANSWER, LIMITS) is not None


async def check_a_job_that_kills_its_workers_is_given_up(store: JobStore) -> None:
    job = await added(store)
    for attempt in range(MAX_ATTEMPTS):
        claimed = await store.claim(f"w{attempt}", NOW + 16 * attempt, 0.0)
        assert claimed is not None
    later = NOW + 16 * MAX_ATTEMPTS
    assert await store.claim("last", later, 0.0) is None
    (failed,) = await store.sweep(later)
    assert (failed.id, failed.state, failed.error, failed.error_status) == (job.id, "failed", CRASHED, 500)
    assert await store.sweep(later) == []


async def check_a_job_handed_back_waits_and_the_attempt_does_not_count(store: JobStore) -> None:
    job = await added(store)
    for index in range(MAX_ATTEMPTS + 2):
        held = await taken(store, "a", NOW + index)
        assert (held.attempts, held.backoffs) == (1, index)
        await store.release(job.id, "b", NOW, NOW)  # not its own: nothing happens
        await store.release(job.id, "a", NOW + index, NOW + index + 0.5)
        assert await store.claim("a", NOW + index + 0.25, 15.0) is None
    (waiting,) = await store.find([job.id])
    assert (waiting.state, waiting.attempts) == ("queued", 0)


async def check_cancelling(store: JobStore) -> None:
    queued = await added(store)
    left = await store.cancel(queued.id, NOW + 1)
    assert left is not None
    assert left.state == "cancelled"
    assert await store.find([queued.id]) == []
    assert await store.claim("a", NOW + 1, 15.0) is None

    running = await added(store)
    await taken(store, "a")
    left = await store.cancel(running.id, NOW + 1)
    assert left is not None
    assert left.state == "cancelled"
    assert await store.find([running.id]) == [left]
    assert await store.renew([running.id], "a", NOW + 1, 15.0) == set()
    assert await store.finish(running.id, "a", NOW + 1, ANSWER, LIMITS) is None
    assert await store.cancel(running.id, NOW + 2) == left
    assert await store.cancel(new_id(), NOW) is None

    handed_back = await added(store)
    await taken(store, "a")
    await store.release(handed_back.id, "a", NOW, NOW)
    await store.cancel(handed_back.id, NOW)
    assert await store.claim("a", NOW + 100, 15.0) is None


async def check_what_is_not_done_in_time_fails(store: JobStore) -> None:
    queued = await added(store)
    running = await added(store)
    await taken(store, "a")
    ended = await store.sweep(NOW + 101)
    assert {job.id for job in ended} == {queued.id, running.id}
    assert {(job.state, job.error, job.error_status) for job in ended} == {("failed", EXPIRED, 504)}
    assert await store.claim("a", NOW + 101, 0.0) is None
    await store.sweep(NOW + 202)
    assert await store.find([queued.id, running.id]) == []


async def check_a_listing_shows_the_newest_of_one_owner_alone(store: JobStore) -> None:
    mine = [await added(store, a_job(at=NOW + index)) for index in range(3)]
    for owner in (Owner("acme", "other"), Owner("acme"), Owner(None, "camera"), Owner()):
        await added(store, a_job(owner, at=NOW + 9))
    assert await store.listing(MINE, 2) == [mine[2], mine[1]]
    assert len(await store.listing(Owner(), 10)) == 1


async def check_unfinished_jobs_are_bounded_and_room_comes_back(store: JobStore) -> None:
    alone = Owner()
    jobs = [await added(store, a_job(alone)) for _ in range(LIMITS.queued)]
    with pytest.raises(Overloaded, match="unfinished"):
        await added(store, a_job(alone))
    await store.cancel(jobs[0].id, NOW)
    await added(store, a_job(alone))
    held = await taken(store)
    with pytest.raises(Overloaded):
        await added(store, a_job(alone))
    await store.finish(held.id, "a", NOW, ANSWER, LIMITS)
    await added(store, a_job(alone))


async def check_a_tenant_has_its_share_and_no_more(store: JobStore) -> None:
    for _ in range(LIMITS.queued // 2):
        await added(store)
    with pytest.raises(Overloaded, match="tenant") as refused:
        await added(store, a_job(Owner("acme", "another program")))
    assert refused.value.retry_after > 0
    await added(store, a_job(Owner("other")))


async def check_bytes_are_bounded_results_included(store: JobStore) -> None:
    alone = Owner()
    large = Work(b"x" * 600_000)
    first = await added(store, a_job(alone, body=600_000), large)
    with pytest.raises(Overloaded, match="bytes"):
        await added(store, a_job(alone, body=600_000), large)
    await taken(store)
    full = await store.finish(first.id, "a", NOW, Answer(b"y" * LIMITS.bytes), LIMITS)
    assert full is not None
    assert (full.state, full.error_status) == ("failed", 429)
    second = await added(store, a_job(alone, body=600_000), large)
    await taken(store)
    # The request's bytes are free again once the answer takes their place.
    ended = await store.finish(second.id, "a", NOW, Answer(b"y" * 900_000), LIMITS)
    assert ended is not None
    assert (ended.state, ended.size) == ("succeeded", ROW_BYTES + 900_000)
    with pytest.raises(Overloaded, match="bytes"):
        await added(store, a_job(alone, body=600_000), large)
    await store.sweep(NOW + 101)
    await added(store, a_job(alone, body=600_000), large)


async def check_a_webhook_is_due_at_the_end_and_again_until_it_is_taken(store: JobStore) -> None:
    silent = await added(store)
    await taken(store)
    await store.finish(silent.id, "a", NOW, ANSWER, LIMITS)
    job = await added(store, a_job(webhook="https://x"))
    await taken(store)
    assert await store.hooks(NOW, 20.0, 8) == []
    await store.finish(job.id, "a", NOW, ANSWER, LIMITS)
    (due,) = await store.hooks(NOW, 20.0, 8)
    assert (due.id, due.hook_tries, due.state) == (job.id, 1, "succeeded")
    assert await store.hooks(NOW + 1, 20.0, 8) == []
    (again,) = await store.hooks(NOW + 21, 20.0, 8)  # whoever had it has died
    assert again.hook_tries == 2
    await store.hooked(job.id, NOW + 30)
    assert len(await store.hooks(NOW + 30, 20.0, 8)) == 1
    await store.hooked(job.id, None)
    assert await store.hooks(NOW + 90, 20.0, 8) == []


CHECKS: dict[str, Callable[[JobStore], Awaitable[None]]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}
