"""The shared cache and the shared store of jobs against a real server."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from job_store_contract import BODY, CHECKS, NOW, a_job, added, taken
from msgspec.structs import replace
from redis_process import redis_process

from models.errors import NotReady
from models.serving.cache import Cache
from models.serving.cache.redis import RedisCache
from models.serving.jobs.job import JobLimits, Owner
from models.serving.jobs.redis import RedisJobs
from models.serving.predictor import InferRequest, InferResponse
from models.testing import StaticPredictor

KEY = bytes(range(32))
ANSWER = InferResponse(outputs={"y": np.float32([1, np.nan])}, model="m", package="p", version="1", tier="edge")
ASKED = InferRequest(model="m", inputs={"x": np.ones(3, np.float32)})


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with redis_process() as started:
        yield started


@pytest.fixture
async def jobs(server: tuple[str, int]) -> AsyncIterator[RedisJobs]:
    made = RedisJobs(server[0], namespace=f"test:{uuid.uuid4().hex}")
    yield made
    await made.close()


@pytest.fixture
async def cache(server: tuple[str, int]) -> AsyncIterator[RedisCache]:
    made = RedisCache(server[0], namespace=uuid.uuid4().hex, max_value_bytes=4096, timeout=0.5)
    yield made
    await made.close()


@pytest.mark.parametrize("name", CHECKS)
async def test_the_store_keeps_the_contract(jobs: RedisJobs, name: str) -> None:
    await CHECKS[name](jobs)


async def test_nothing_is_left_of_a_job_that_is_gone(jobs: RedisJobs) -> None:
    job = await added(jobs)
    await jobs.cancel(job.id, 0.0)
    names = {key.decode().removeprefix(jobs._prefix) for key in await jobs._client.keys(f"{jobs._prefix}*")}
    assert names <= {"queue", "load"}
    assert await jobs._client.xlen(f"{jobs._prefix}queue") == 0
    assert await jobs._client.hgetall(f"{jobs._prefix}load") == {b"jobs": b"0", b"bytes": b"0"}


async def test_a_dead_workers_job_is_found_behind_many_that_are_alive(jobs: RedisJobs) -> None:
    many = [a_job(Owner()) for _ in range(31)]
    for job in many:
        await jobs.add(job, BODY, JobLimits())
    alive, dead = [job.id for job in many[:-1]], many[-1]
    for _ in alive:
        await taken(jobs, "alive")
    assert (await taken(jobs, "dead")).id == dead.id
    await asyncio.sleep(0.06)  # the server's clock measures leases
    assert await jobs.renew(alive, "alive", NOW, 15.0) == set(alive)
    claimed = await jobs.claim("b", NOW, 0.05)
    assert claimed is not None
    assert claimed[0].id == dead.id


async def test_a_store_without_its_server_says_so_within_its_timeout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = RedisJobs(f"unix://{tmp_path}/nobody", timeout=0.2)
    for _ in range(3):
        with pytest.raises(NotReady):
            await jobs.find(["x"])
    await jobs.close()
    assert (
        len([each for each in caplog.records if each.name == "tierline.jobs.redis"]) == 1
    )  # said once, not at every call


async def written(cache: RedisCache) -> None:
    await asyncio.gather(*cache._writes)


async def test_an_answer_comes_back_bit_by_bit_and_expires(cache: RedisCache) -> None:
    assert await cache.get(KEY) is None
    cache.put(KEY, ANSWER)
    await written(cache)
    back = await cache.get(KEY)
    assert back is not None
    assert back.outputs["y"].tobytes() == ANSWER.outputs["y"].tobytes()
    assert 3_500_000 < await cache._client.pttl(cache._name(KEY)) <= 3_600_000


async def test_a_corrupt_value_is_a_miss_and_is_deleted(cache: RedisCache) -> None:
    cache.put(KEY, ANSWER)
    await written(cache)
    await cache._client.setrange(cache._name(KEY), 30, b"\xff\xff")
    assert await cache.get(KEY) is None
    await written(cache)
    assert await cache._client.exists(cache._name(KEY)) == 0


async def test_large_answers_are_neither_stored_nor_read(cache: RedisCache) -> None:
    cache.put(KEY, replace(ANSWER, outputs={"y": np.zeros(5000, np.uint8)}))
    await written(cache)
    assert await cache._client.exists(cache._name(KEY)) == 0
    await cache._client.set(cache._name(KEY), b"x" * 10_000)
    assert await cache.get(KEY) is None


class _Signed:
    def lookup(self, model: str, version: str | None) -> tuple[bytes, bool]:
        return b"digest", True


async def test_two_processes_worth_of_caches_share_one_run(cache: RedisCache) -> None:
    inner = StaticPredictor({"y": np.float32([7])})
    await Cache(inner, _Signed(), models={"m"}, second=cache).infer(ASKED)
    await written(cache)
    answer = await Cache(inner, _Signed(), models={"m"}, second=cache).infer(ASKED)
    assert answer.outputs["y"].tolist() == [7]
    assert len(inner.requests) == 1


async def test_a_server_that_hangs_costs_no_answer_is_left_alone_and_comes_back(server: tuple[str, int]) -> None:
    url, pid = server
    second = RedisCache(url, namespace=uuid.uuid4().hex, timeout=0.05)
    inner = StaticPredictor({"y": np.float32([7])})

    async def ask(number: int) -> float:
        cache = Cache(inner, _Signed(), models={"m"}, second=second)
        start = time.monotonic()
        asked = InferRequest(model="m", inputs={"x": np.int64([number])})
        assert (await cache.infer(asked)).outputs["y"].tolist() == [7]
        return time.monotonic() - start

    os.kill(pid, signal.SIGSTOP)
    try:
        for number in range(3):
            assert await ask(number) < 1.0
        assert second._outage.is_open
        errors = second.errors
        assert await ask(3) < 0.05  # nobody waits for it any more
        assert second.errors == errors
    finally:
        os.kill(pid, signal.SIGCONT)
    end = time.monotonic() + 10
    while second._outage.is_open:
        assert time.monotonic() < end
        await asyncio.sleep(0.1)
        await ask(4)
    await second.close()
