"""Jobs as a WebSocket session subscribes to them: told once, when the job has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from models.errors import TierlineError
from models.serving.caller import Caller
from models.serving.jobs.desk import Jobs
from models.serving.jobs.job import Job, status_of

Notify = Callable[[Mapping[str, Any]], None]


def job_feed(jobs: Jobs) -> Callable[[Caller, str, Notify], Callable[[], None]]:
    """What `WebSockets` takes. `notify` gets the status as `GET /v2/jobs/{id}` gives it, or `{"status": code, "error": text}`
    for a job that the caller may not know of."""

    def feed(caller: Caller, job_id: str, notify: Notify) -> Callable[[], None]:
        watching = _Watching(jobs, job_id, notify)
        task = asyncio.ensure_future(watching.begin(caller))

        def stop() -> None:
            task.cancel()
            watching.end()

        return stop

    return feed


class _Watching:
    def __init__(self, jobs: Jobs, job_id: str, notify: Notify) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self._notify = notify
        self._unsubscribe: Callable[[], None] | None = None

    async def begin(self, caller: Caller) -> None:
        try:
            self._jobs.admit(caller)
            # The store is asked first whose job it is: a subscription itself asks nobody.
            await self._jobs.get(caller, self._job_id)
            self._unsubscribe = self._jobs.subscribe(self._job_id, self._ended, caller)
        except TierlineError as error:
            self._notify({"status": error.http, "error": str(error)})

    def _ended(self, job: Job) -> None:
        self._notify(msgspec.to_builtins(status_of(job)))

    def end(self) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()
