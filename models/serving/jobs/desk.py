"""Where jobs are handed in and asked for: what every frontend calls. Keeps callers apart and tells who waits when one ends."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

from models.errors import Conflict, InvalidRequest, NotFound, Overloaded, TierlineError
from models.serving.caller import Caller
from models.serving.jobs.job import ID_LENGTH, ROW_BYTES, Answer, Failure, Job, JobLimits, Owner, Work, new_id
from models.serving.jobs.runner import Runner, RunnerSettings
from models.serving.jobs.store import JobStore
from models.serving.jobs.webhook import TIMEOUT_SECONDS, Webhooks
from models.serving.predictor import Predictor
from models.serving.rest_body import Expander

log = logging.getLogger("tierline.jobs")

MAX_SUBSCRIBERS = 4096
"""Callbacks that may wait for jobs at once."""
OWNER_SHARE = 0.25
"""Of the callbacks, for one owner."""
MAX_ASKING = 32
"""Calls to the store that one owner may have under way; the store takes 256 in all and the runner needs some of them."""
MAX_ASKING_NAMELESS = 192
"""The same for all callers without a name together."""
BUSY_RETRY_SECONDS = 0.25
MAX_WATCHED = 256
"""Jobs that are looked up in one second because someone waits for them: another node may have ended them."""
MAX_DELIVERIES = 8
"""Webhooks that are called at once."""
MAX_LISTED = 1000
TICK_SECONDS = 1.0
CLOSE_SECONDS = 5.0

NOBODY = Owner()

Ended = Callable[[Job], None]


@dataclass(frozen=True, eq=False)
class _Subscriber:
    owner: Owner
    callback: Ended


class Jobs:
    """Asynchronous inference over a store and a predictor. For one event loop; `async with jobs.running()` makes it work.

    `ready`: whether the models are loaded. `webhooks` None = none are allowed. `admit`: called by frontends once for each
    request of a caller, raises Overloaded for one too many; None = nobody asks too often.
    """

    def __init__(
        self,
        store: JobStore,
        predictor: Predictor,
        *,
        ready: Callable[[], bool],
        limits: JobLimits | None = None,
        settings: RunnerSettings | None = None,
        webhooks: Webhooks | None = None,
        admit: Callable[[Caller], None] | None = None,
        clock: Callable[[], float] = time.time,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.expander = Expander()  # bounds what compressed submissions expand to, all together
        self.admit = admit or _anybody
        self._store = store
        self._limits = limits or JobLimits()
        self._webhooks = webhooks or Webhooks()
        self._clock = clock
        self._uniform = uniform
        self._subscribers: dict[str, list[_Subscriber]] = {}
        self._subscribed = 0
        self._subscribed_by: dict[Owner, int] = {}  # those with none are left out
        self._asking: dict[Owner, int] = {}  # the same
        self._deliveries: set[asyncio.Task[None]] = set()
        self._runner = Runner(
            store,
            predictor,
            ready=ready,
            ended=self._publish,
            limits=self._limits,
            settings=settings or RunnerSettings(),
            clock=clock,
            uniform=uniform,
        )

    # --- what callers ask ---------------------------------------------------------------------------------------------

    async def submit(
        self,
        caller: Caller,
        model: str,
        version: str | None,
        work: Work,
        *,
        webhook: str | None = None,
        ttl: float | None = None,
    ) -> Job:
        """Stored durably when this returns. `ttl`: seconds that it may take, and that its result is kept.

        Raises InvalidRequest, Forbidden for a webhook that is not allowed, Overloaded beyond a limit, NotReady.
        """
        if webhook is not None:
            self._webhooks.check(webhook)
        seconds = self._limits.ttl if ttl is None else ttl
        if not 0 < seconds <= self._limits.max_ttl:
            raise InvalidRequest(f"tierline-job-ttl-s is not between 0 and {self._limits.max_ttl:g} seconds")
        now = self._clock()
        job = Job(
            id=new_id(),
            owner=Owner.of(caller),
            model=model,
            version=version,
            created=now,
            updated=now,
            expires=now + seconds,
            ttl=seconds,
            webhook=webhook,
            size=ROW_BYTES + len(work.body),
        )
        with self._turn(caller):
            await self._store.add(job, work, self._limits)
        self._runner.wake()
        return job

    async def get(self, caller: Caller, job_id: str) -> Job:
        """Raises NotFound for a job that does not exist or is another's."""
        with self._turn(caller):
            found = await self._store.find([job_id]) if len(job_id) == ID_LENGTH else []
        if not found or found[0].owner != Owner.of(caller):
            raise NotFound(f"there is no job '{job_id[:64]}'")
        return found[0]

    async def result(self, caller: Caller, job_id: str) -> Answer | Failure:
        """How it ended. Raises NotFound; Conflict while it has not, or when it was cancelled."""
        job = await self.get(caller, job_id)
        if job.state == "failed":
            return Failure(job.error or "", job.error_status)
        if job.state != "succeeded":
            raise Conflict(f"job '{job.id}' has no result: it is {job.state}")
        answer = await self._store.answer(job.id)
        if answer is None:
            raise NotFound(f"there is no job '{job.id}'")  # it expired this moment
        return answer

    async def cancel(self, caller: Caller, job_id: str) -> Job:
        """A queued job is gone, a running one cancelled, an ended one left as it is. Raises NotFound."""
        before = await self.get(caller, job_id)
        with self._turn(caller):
            left = await self._store.cancel(job_id, self._clock())
        if left is None:
            raise NotFound(f"there is no job '{job_id}'")
        self._runner.cancel(job_id)
        if not before.is_final:
            self._publish(left)
        return left

    async def listing(self, caller: Caller, limit: int) -> list[Job]:
        """The caller's own, newest first. `limit`: 1 to 1000. Raises InvalidRequest."""
        if not 1 <= limit <= MAX_LISTED:
            raise InvalidRequest(f"limit is not between 1 and {MAX_LISTED}")
        with self._turn(caller):
            return await self._store.listing(Owner.of(caller), limit)

    @contextmanager
    def _turn(self, caller: Caller) -> Iterator[None]:
        """One call to the store. Raises Overloaded when the caller has too many under way."""
        owner = Owner.of(caller)
        limit = MAX_ASKING_NAMELESS if owner == NOBODY else MAX_ASKING
        if self._asking.get(owner, 0) >= limit:
            raise Overloaded(f"{limit} of your calls wait for the job store already", BUSY_RETRY_SECONDS)
        _count(self._asking, owner, 1)
        try:
            yield
        finally:
            _count(self._asking, owner, -1)

    def subscribe(self, job_id: str, callback: Ended, caller: Caller = Caller()) -> Callable[[], None]:  # noqa: B008 - frozen
        """Call `callback(job)` once, in the loop, when the job has ended; returns what takes that back.

        At once if it ends on this node, within a second or so if it has ended already or ends on another; never for one that
        does not exist. Ask `get` first whether the caller may know of the job. Raises Overloaded.
        """
        owner = Owner.of(caller)
        share = 1.0 if owner == NOBODY else OWNER_SHARE
        own = self._subscribed_by.get(owner, 0)
        if self._subscribed >= MAX_SUBSCRIBERS or own >= MAX_SUBSCRIBERS * share:
            raise Overloaded("too many callers wait for jobs")
        subscriber = _Subscriber(owner, callback)
        self._subscribers.setdefault(job_id, []).append(subscriber)
        self._subscribed += 1
        _count(self._subscribed_by, owner, 1)

        def unsubscribe() -> None:
            waiting = self._subscribers.get(job_id, [])
            if subscriber in waiting:
                waiting.remove(subscriber)
                self._ended_subscription(subscriber)
                if not waiting:
                    del self._subscribers[job_id]

        return unsubscribe

    def _ended_subscription(self, subscriber: _Subscriber) -> None:
        self._subscribed -= 1
        _count(self._subscribed_by, subscriber.owner, -1)

    # --- the work -------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run jobs, report their ends and remove what has expired while inside; closes the store on leaving."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._store.close)
            await stack.enter_async_context(self._runner.running())
            ticking = asyncio.create_task(self._tick_forever())
            try:
                yield
            finally:
                tasks = {ticking, *self._deliveries}
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=CLOSE_SECONDS)

    async def _tick_forever(self) -> None:
        while True:
            try:
                await self.tick()
            except TierlineError as error:
                log.debug("the job store was not swept: %s", error)
            except Exception:
                log.exception("sweeping jobs failed unexpectedly")
            await asyncio.sleep(TICK_SECONDS * self._uniform(0.75, 1.0))

    async def tick(self) -> None:
        """What is to be done once a second: expire, deliver, look after jobs that others may have ended."""
        for job in await self._store.sweep(self._clock()):
            self._runner.cancel(job.id)
            self._publish(job)
        room = MAX_DELIVERIES - len(self._deliveries)
        if room:
            self._deliver(await self._store.hooks(self._clock(), 2 * TIMEOUT_SECONDS, room))
        if self._subscribers:
            watched = list(self._subscribers)[:MAX_WATCHED]
            for job_id in watched:  # to the end of the line
                self._subscribers[job_id] = self._subscribers.pop(job_id)
            for job in await self._store.find(watched):
                if job.is_final:
                    self._publish(job)

    def _deliver(self, due: list[Job]) -> None:
        for job in due:
            task = asyncio.create_task(self._report(job))
            self._deliveries.add(task)
            task.add_done_callback(self._deliveries.discard)

    async def _report(self, job: Job) -> None:
        try:
            await self._store.hooked(job.id, await self._webhooks.deliver(job))
        except TierlineError as error:
            log.debug("the webhook of job %s will be sent again: %s", job.id, error)

    def _publish(self, job: Job) -> None:
        waiting = self._subscribers.pop(job.id, [])
        for subscriber in waiting:
            self._ended_subscription(subscriber)
        for subscriber in waiting:
            try:
                subscriber.callback(job)
            except Exception:
                log.exception("a subscriber of job %s failed", job.id)


def _anybody(_: Caller) -> None:
    """Nobody asks too often."""


def _count(counts: dict[Owner, int], owner: Owner, change: int) -> None:
    left = counts.get(owner, 0) + change
    if left:
        counts[owner] = left
    else:
        del counts[owner]
