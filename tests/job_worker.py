"""A process that takes part in a store of jobs: `job_worker.py STORE submit N | hang MARKER | answer`.

`submit` prints the ids of N accepted jobs and kills itself, `hang` makes MARKER when a run has begun and never ends it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import numpy as np

from models.serving.caller import Caller
from models.serving.jobs import Jobs, JobStore, RunnerSettings
from models.serving.jobs.job import Work
from models.serving.jobs.redis import RedisJobs
from models.serving.jobs.sqlite import SqliteJobs
from models.serving.predictor import InferRequest, InferResponse
from models.testing import StaticPredictor

LEASE_SECONDS = 1.0
OWNER = Caller("camera", "acme")
BODY = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}'
ANSWER = StaticPredictor({"y": np.float32([7])})


class Hanging:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    async def infer(self, request: InferRequest) -> InferResponse:
        self._marker.touch()
        await asyncio.Event().wait()
        raise AssertionError("never")


def open_store(place: str) -> JobStore:
    return RedisJobs(place) if "://" in place else SqliteJobs(Path(place))


async def main(place: str, what: str, *arguments: str) -> None:
    predictor = Hanging(Path(arguments[0])) if what == "hang" else ANSWER
    settings = RunnerSettings(concurrency=4, lease=LEASE_SECONDS, poll=0.1)
    jobs = Jobs(open_store(place), predictor, ready=lambda: True, settings=settings)
    if what == "submit":
        for _ in range(int(arguments[0])):
            print((await jobs.submit(OWNER, "m", None, Work(BODY))).id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    async with jobs.running():
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
