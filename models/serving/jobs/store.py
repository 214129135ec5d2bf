"""The seam between jobs and what keeps them: SQLite by default, Redis or Valkey when several nodes share the work.

Every call is atomic and durable when it returns. Time comes in as `now` (seconds of the epoch). A store raises only errors
of `models.errors`: NotReady when it does not answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import ceil
from typing import Protocol

from models.errors import Overloaded
from models.serving.jobs.job import Answer, Failure, Job, JobLimits, Owner, Work

RETRY_AFTER_SECONDS = 5.0


class JobStore(Protocol):
    async def add(self, job: Job, work: Work, limits: JobLimits) -> None:
        """Store a new job. Raises Overloaded when that would pass a limit, NotReady."""
        ...

    async def find(self, ids: Sequence[str]) -> list[Job]:
        """Those of the jobs that exist."""
        ...

    async def listing(self, owner: Owner, limit: int) -> list[Job]:
        """The newest jobs of one owner, newest first."""
        ...

    async def answer(self, job_id: str) -> Answer | None:
        """The answer of a job that succeeded."""
        ...

    async def claim(self, worker: str, now: float, lease: float) -> tuple[Job, Work] | None:
        """Take the job that waits longest, or one whose worker let its lease run out. It is the worker's for `lease` seconds.

        Counts an attempt; a job that has had `MAX_ATTEMPTS` is left to `sweep`.
        """
        ...

    async def renew(self, ids: Collection[str], worker: str, now: float, lease: float) -> set[str]:
        """Hold on to running jobs. Returns those that are still the worker's: the others were cancelled or taken over."""
        ...

    async def release(self, job_id: str, worker: str, now: float, due: float) -> None:
        """Hand a job back to be run not before `due`; the attempt does not count."""
        ...

    async def finish(
        self, job_id: str, worker: str, now: float, outcome: Answer | Failure, limits: JobLimits
    ) -> Job | None:
        """Store how a run ended; the result expires `ttl` later. None when the job was no longer the worker's.

        An answer that would pass the limit of bytes makes the job fail.
        """
        ...

    async def cancel(self, job_id: str, now: float) -> Job | None:
        """A queued job is removed, a running one becomes cancelled, a final one stays. Returns it as it was left, or None."""
        ...

    async def sweep(self, now: float) -> list[Job]:
        """Remove what has expired; fail what took too long or killed its worker too often, and return that. Bounded."""
        ...

    async def hooks(self, now: float, hold: float, limit: int) -> list[Job]:
        """At most `limit` final jobs whose webhook is due, a try counted; each is not given out again for `hold` seconds."""
        ...

    async def hooked(self, job_id: str, due: float | None) -> None:
        """The webhook is to be tried again at `due`, or never (None)."""
        ...

    async def close(self) -> None: ...


def check_room(job: Job, limits: JobLimits, used: tuple[int, int], own: tuple[int, int]) -> None:
    """Raise Overloaded when `job` would pass a limit. `used`, `own`: (unfinished jobs, bytes) of all and of its tenant."""
    share = 1.0 if job.owner.tenant is None else limits.tenant_share
    for whose, (jobs, size), part in (("this node", used, 1.0), ("your tenant", own, share)):
        if jobs + 1 > ceil(limits.queued * part):
            raise Overloaded(f"{whose} has {jobs} unfinished jobs, no more are accepted", RETRY_AFTER_SECONDS)
        if size + job.size > limits.bytes * part:
            raise Overloaded(f"the jobs of {whose} hold {size} bytes, no more are accepted", RETRY_AFTER_SECONDS)


def no_room(job_id: str, size: int) -> Failure:
    """What a job becomes whose answer of `size` bytes finds no room."""
    return Failure(f"the answer of {size} bytes to job {job_id} finds no room: too many results are stored", 429)
