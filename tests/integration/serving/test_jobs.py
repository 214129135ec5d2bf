"""What was accepted is done, whatever happens to the processes that accepted and ran it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import job_worker
import pytest
from job_worker import OWNER, open_store
from redis_process import redis_process

from models.serving.jobs.desk import Jobs
from models.serving.jobs.job import CRASHED, MAX_ATTEMPTS, Answer, Failure

SECONDS = 20.0
"""For everything that a test waits for."""


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield str(tmp_path / "jobs.db")
        return
    with redis_process() as (url, _):
        yield url


@contextmanager
def worker(place: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    root = Path(job_worker.__file__).parents[1]
    command = [sys.executable, job_worker.__file__, place, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env={"PYTHONPATH": str(root)})
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)


def submitted(place: str, count: int) -> list[str]:
    """Ids that a process printed before it was killed in the same breath."""
    with worker(place, "submit", str(count)) as process:
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == -9
    return output.split()


def wait_for(path: Path) -> None:
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


async def results(place: str, ids: list[str]) -> list[Answer | Failure]:
    """Once all have ended."""
    jobs = Jobs(open_store(place), job_worker.ANSWER, ready=lambda: False)
    try:
        async with asyncio.timeout(SECONDS):
            while not all([(await jobs.get(OWNER, job_id)).is_final for job_id in ids]):
                await asyncio.sleep(0.05)
        return [await jobs.result(OWNER, job_id) for job_id in ids]
    finally:
        await jobs._store.close()


async def test_jobs_of_killed_processes_are_finished_by_another(place: str, tmp_path: Path) -> None:
    ids = submitted(place, 6)
    assert len(ids) == 6
    with worker(place, "hang", str(tmp_path / "begun")):
        wait_for(tmp_path / "begun")
    with worker(place, "answer"):
        answers = await results(place, ids)
    assert all(isinstance(answer, Answer) and b'"data":[7.0]' in answer.body for answer in answers)


async def test_a_job_whose_every_run_dies_is_failed_and_stops_killing(place: str, tmp_path: Path) -> None:
    ids = submitted(place, 1)
    for attempt in range(MAX_ATTEMPTS):
        marker = tmp_path / f"begun{attempt}"
        with worker(place, "hang", str(marker)):
            wait_for(marker)
    with worker(place, "answer"):
        assert await results(place, ids) == [Failure(CRASHED, 500)]
