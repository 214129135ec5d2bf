"""Runs queued jobs beside the traffic: few at once, with low priority, stepping back when the node is busy.

At least once: a job whose process dies is run again by whoever finds its lease run out. What a second run answers counts;
the first one's is refused by the store.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from models.errors import NotReady, Overloaded, TierlineError, Unreachable
from models.serving.codec import decode_request, encode_response
from models.serving.jobs.job import Answer, Failure, Job, JobLimits, Work, new_id
from models.serving.jobs.store import JobStore
from models.serving.predictor import Predictor

log = logging.getLogger("tierline.jobs")

LOW_PRIORITY = 3
MAX_RUN_SECONDS = 300.0
"""Longest run of a job whose caller named no deadline; half of what a router honours."""
FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 30.0
MAX_BACKOFFS_COUNTED = 16
STORE_TRIES = 5
"""Times that a result is offered to a store which does not answer; then the job is run again once its lease is over."""
CLOSE_SECONDS = 5.0
MAX_ERROR_TEXT = 2000
"""Characters of an error that are stored: an engine's may quote whole tensors."""
_LATER = (Overloaded, NotReady, Unreachable)


class RunnerSettings(msgspec.Struct, frozen=True):
    """`concurrency`: runs at once. `lease`: seconds after which a dead worker's jobs are run by another.

    `poll`: seconds between looks for jobs that others have queued or left.
    """

    concurrency: int = 2
    lease: float = 15.0
    poll: float = 1.0


class Runner:
    """`ready`: whether the models are loaded; before that no job is taken. `ended` is told every job that ends here."""

    def __init__(
        self,
        store: JobStore,
        predictor: Predictor,
        *,
        ready: Callable[[], bool],
        ended: Callable[[Job], None],
        limits: JobLimits,
        settings: RunnerSettings,
        clock: Callable[[], float] = time.time,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._store = store
        self._predictor = predictor
        self._ready = ready
        self._ended = ended
        self._limits = limits
        self._settings = settings
        self._clock = clock
        self._uniform = uniform
        self._worker = new_id()
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There may be something to run."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Stop the job's run if it is under way here."""
        run = self._runs.get(job_id)
        if run is not None:
            run.cancel()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take jobs while inside; on leaving, runs under way are handed back."""
        tasks = [asyncio.create_task(self._take_forever()), asyncio.create_task(self._renew_forever())]
        try:
            yield
        finally:
            for task in (*tasks, *self._runs.values()):
                task.cancel()
            await asyncio.wait((*tasks, *self._runs.values()), timeout=CLOSE_SECONDS)

    async def _take_forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                while self._ready() and len(self._runs) < self._settings.concurrency:
                    if not await self._take():
                        break
            except TierlineError as error:
                log.debug("no job can be taken: %s", error)
            except Exception:
                log.exception("taking a job failed unexpectedly")
            try:
                # Jittered: nodes that share a store should not ask it at the same moment.
                async with asyncio.timeout(self._settings.poll * self._uniform(0.5, 1.0)):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _take(self) -> bool:
        claimed = await self._store.claim(self._worker, self._clock(), self._settings.lease)
        if claimed is None:
            return False
        job, work = claimed
        if job.id in self._runs:
            return True  # our own: the process stood still for longer than the lease, which is renewed now
        run = self._runs[job.id] = asyncio.create_task(self._run(job, work))
        run.add_done_callback(lambda _: self._gone(job.id))
        return True

    def _gone(self, job_id: str) -> None:
        del self._runs[job_id]
        self._wake.set()

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease / 3)
            held = list(self._runs)
            if not held:
                continue
            try:
                kept = await self._store.renew(held, self._worker, self._clock(), self._settings.lease)
            except TierlineError as error:
                log.debug("leases could not be renewed: %s", error)
                continue
            for job_id in held:
                if job_id not in kept:
                    self.cancel(job_id)

    async def _run(self, job: Job, work: Work) -> None:
        try:
            outcome: Answer | Failure = await self._infer(job, work)
        except _LATER as error:
            await self._hand_back(job, error)
            return
        except asyncio.CancelledError:
            # Leaving, or cancelled by its owner: then there is nothing to hand back, and the store knows.
            await self._let_go(job, 0.0)
            raise
        except TierlineError as error:
            outcome = Failure(_readable(error), error.http)
        except Exception:
            log.exception("job %s failed unexpectedly", job.id)
            outcome = Failure("internal error", 500)
        await self._finish(job, outcome)

    async def _infer(self, job: Job, work: Work) -> Answer:
        budget = MAX_RUN_SECONDS if work.budget is None else min(work.budget, MAX_RUN_SECONDS)
        request, form = decode_request(
            work.body,
            work.header_length,
            model=job.model,
            version=job.version,
            deadline=time.monotonic() + budget,
            trace=work.trace,
            tenant=job.owner.tenant,
            client=job.owner.client,
        )
        answer = await self._predictor.infer(msgspec.structs.replace(request, priority=LOW_PRIORITY))
        parts, header_length = encode_response(answer, form, request.id)
        return Answer(b"".join(parts), header_length)

    async def _hand_back(self, job: Job, error: TierlineError) -> None:
        """The node is busy, or a tier is away: later, and later each time."""
        delay = min(FIRST_BACKOFF_SECONDS * 2.0 ** min(job.backoffs, MAX_BACKOFFS_COUNTED), MAX_BACKOFF_SECONDS)
        if isinstance(error, Overloaded):
            delay = max(delay, min(error.retry_after, MAX_BACKOFF_SECONDS))
        await self._let_go(job, delay * self._uniform(1.0, 1.5))

    async def _let_go(self, job: Job, delay: float) -> None:
        now = self._clock()
        try:
            await self._store.release(job.id, self._worker, now, now + delay)
        except TierlineError as error:
            log.debug("job %s will be taken up when its lease is over: %s", job.id, error)

    async def _finish(self, job: Job, outcome: Answer | Failure) -> None:
        for attempt in range(STORE_TRIES):
            try:
                left = await self._store.finish(job.id, self._worker, self._clock(), outcome, self._limits)
            except TierlineError:
                await asyncio.sleep(FIRST_BACKOFF_SECONDS * 2**attempt * self._uniform(0.5, 1.0))
                continue
            if left is not None:
                self._ended(left)
            return
        log.warning("the result of job %s could not be stored: it will be run again", job.id)


def _readable(error: TierlineError) -> str:
    # A surrogate out of a broken name has no UTF-8 form.
    return str(error)[:MAX_ERROR_TEXT].encode("utf-8", "replace").decode()
