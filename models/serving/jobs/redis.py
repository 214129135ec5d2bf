"""Jobs in Redis or Valkey, 7.0 or later: a stream with a consumer group, shared by every node that runs them.

A worker that dies loses its entries to `XAUTOCLAIM` once its lease has run out; the server's clock measures that. How much
survives a power cut is the server's setting: `appendonly yes` with `appendfsync always` keeps everything accepted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from hashlib import blake2b
from math import ceil
from typing import Any, cast

from models.errors import NotReady
from models.serving.cache.redis import connect
from models.serving.jobs.job import CRASHED, EXPIRED, MAX_ATTEMPTS, Answer, Failure, Job, JobLimits, Owner, State, Work
from models.serving.jobs.redis_script import SCRIPT
from models.serving.jobs.store import check_room, no_room

log = logging.getLogger("tierline.jobs.redis")

TIMEOUT_SECONDS = 5.0
"""Longest wait for one operation: it may carry a body of 64 MB."""
CONNECTIONS = 16
SWEEP_ROWS = 200
"""Jobs that one sweep changes at most: the server does nothing else meanwhile."""


class RedisJobs:
    """`JobStore` in the server at `url` (redis://, rediss:// or unix://), under keys that begin with `{namespace}:`."""

    def __init__(self, url: str, *, namespace: str = "tierline:jobs", timeout: float = TIMEOUT_SECONDS) -> None:
        """Raises ModuleNotFoundError without the package redis, ValueError for a URL it cannot use."""
        # Braces put all keys into one slot of a cluster, which a script needs.
        self._prefix = f"{{{namespace}}}:"
        self._timeout = timeout
        self._failing = False  # said once when it begins and once when it ends
        self._client = connect(url, timeout=timeout, connections=CONNECTIONS)
        self._script = self._client.register_script(SCRIPT)

    async def _run(self, operation: str, *arguments: Any) -> Any:
        try:
            call = self._script(keys=[self._prefix], args=[operation, *arguments])
            answer = await asyncio.wait_for(call, self._timeout)
        except Exception as error:
            if not self._failing:
                log.warning("the job store fails at %s: %s", operation, str(error) or type(error).__name__)
            self._failing = True
            raise NotReady("the job store does not answer") from error
        if self._failing:
            log.info("the job store answers again")
        self._failing = False
        return answer

    async def add(self, job: Job, work: Work, limits: JobLimits) -> None:
        share = 1.0 if job.owner.tenant is None else limits.tenant_share
        own = ceil(limits.queued * share), int(limits.bytes * share)
        fields = {
            "id": job.id,
            "tenant": _optional(job.owner.tenant),
            "client": _optional(job.owner.client),
            "model": job.model,
            "version": _optional(job.version),
            "created": repr(job.created),
            "updated": repr(job.updated),
            "expires": repr(job.expires),
            "ttl": repr(job.ttl),
            "state": job.state,
            "attempts": job.attempts,
            "backoffs": job.backoffs,
            "error": "",
            "error_status": 0,
            "webhook": job.webhook or "",
            "hook_tries": 0,
            "size": job.size,
            "header_length": _optional(work.header_length),
            "budget": _optional(work.budget),
            "trace": _optional(work.trace),
        }
        used = await self._run(
            "add",
            job.id,
            _optional(job.owner.tenant),
            _tag(job.owner),
            job.size,
            repr(job.created),
            repr(job.expires),
            work.body,
            limits.queued,
            limits.bytes,
            *own,
            *(part for item in fields.items() for part in item),
        )
        if used:
            check_room(job, limits, (used[0], used[1]), (used[2], used[3]))
            raise AssertionError("the script and check_room disagree on a limit")

    async def find(self, ids: Sequence[str]) -> list[Job]:
        return _jobs(await self._run("find", *ids))

    async def listing(self, owner: Owner, limit: int) -> list[Job]:
        return _jobs(await self._run("list", _tag(owner), limit))

    async def answer(self, job_id: str) -> Answer | None:
        found = await self._run("answer", job_id)
        return None if not found else Answer(found[0], _integer(found[1].decode()))

    async def claim(self, worker: str, now: float, lease: float) -> tuple[Job, Work] | None:
        found = await self._run("claim", worker, repr(now), round(lease * 1e3), MAX_ATTEMPTS)
        if not found:
            return None
        fields = _fields(found[0])
        budget = _text(fields["budget"])
        header_length = _integer(fields["header_length"])
        work = Work(found[1], header_length, None if budget is None else float(budget), _text(fields["trace"]))
        return _job(fields), work

    async def renew(self, ids: Collection[str], worker: str, now: float, lease: float) -> set[str]:
        return {job_id.decode() for job_id in await self._run("renew", worker, *ids)}

    async def release(self, job_id: str, worker: str, now: float, due: float) -> None:
        await self._run("release", job_id, worker, repr(now), repr(due))

    async def finish(
        self, job_id: str, worker: str, now: float, outcome: Answer | Failure, limits: JobLimits
    ) -> Job | None:
        if isinstance(outcome, Failure):
            left = await self._run("fail", job_id, worker, repr(now), outcome.error, outcome.status)
        else:
            full = no_room(job_id, len(outcome.body))
            header_length = _optional(outcome.header_length)
            end = full.error, full.status, outcome.body, header_length, limits.bytes
            left = await self._run("succeed", job_id, worker, repr(now), *end)
        return _job(_fields(left)) if left else None

    async def cancel(self, job_id: str, now: float) -> Job | None:
        left = await self._run("cancel", job_id, repr(now))
        return _job(_fields(left)) if left else None

    async def sweep(self, now: float) -> list[Job]:
        return _jobs(await self._run("sweep", repr(now), SWEEP_ROWS, EXPIRED, CRASHED))

    async def hooks(self, now: float, hold: float, limit: int) -> list[Job]:
        return _jobs(await self._run("hooks", repr(now), repr(now + hold), limit))

    async def hooked(self, job_id: str, due: float | None) -> None:
        await self._run("hooked", job_id, "" if due is None else repr(due))

    async def close(self) -> None:
        await self._client.aclose()


def _tag(owner: Owner) -> str:
    """A key's part that no other owner has: names may hold any character."""
    text = f"{_optional(owner.tenant)}\0{_optional(owner.client)}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _optional(value: object) -> str:
    """A value apart from none at all, which an empty text is not."""
    return "-" if value is None else f"={value}"


def _text(stored: str) -> str | None:
    return stored[1:] if stored.startswith("=") else None


def _integer(stored: str) -> int | None:
    text = _text(stored)
    return None if text is None else int(text)


def _fields(flat: Sequence[bytes]) -> dict[str, str]:
    return {flat[index].decode(): flat[index + 1].decode() for index in range(0, len(flat), 2)}


def _jobs(found: Sequence[Sequence[bytes]]) -> list[Job]:
    return [_job(_fields(flat)) for flat in found if flat]


def _job(fields: dict[str, str]) -> Job:
    return Job(
        id=fields["id"],
        owner=Owner(_text(fields["tenant"]), _text(fields["client"])),
        model=fields["model"],
        version=_text(fields["version"]),
        created=float(fields["created"]),
        updated=float(fields["updated"]),
        expires=float(fields["expires"]),
        ttl=float(fields["ttl"]),
        state=cast(State, fields["state"]),
        attempts=int(fields["attempts"]),
        backoffs=int(fields["backoffs"]),
        error=fields["error"] or None,
        error_status=int(fields["error_status"]),
        webhook=fields["webhook"] or None,
        hook_tries=int(fields["hook_tries"]),
        size=int(fields["size"]),
    )
