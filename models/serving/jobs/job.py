"""A job: one inference asked for now and answered later. Its states, what it is stored as and how it is shown. Pure.

Times are seconds of the epoch: they must mean the same after a restart.
"""

from __future__ import annotations

import secrets
from typing import Literal

import msgspec

from models.serving.caller import Caller

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]

TRANSITIONS: dict[State, tuple[State, ...]] = {
    # A queued job that is cancelled is gone.
    "queued": ("running", "failed"),
    # Back to queued: the node was too busy, or the process that ran it died.
    "running": ("queued", "succeeded", "failed", "cancelled"),
    "succeeded": (),
    "failed": (),
    "cancelled": (),
}
FINAL: frozenset[State] = frozenset(state for state, following in TRANSITIONS.items() if not following)

MAX_ATTEMPTS = 3
"""Runs that may end with their process: a request that kills whoever runs it must not do so for ever."""
CRASHED = "crashed: no run of this job was survived by its process"
EXPIRED = "the job was not finished within its time"
ID_LENGTH = 32
ROW_BYTES = 4096
"""What a job is charged beside its bodies: rows, indexes, headers."""


class Owner(msgspec.Struct, frozen=True):
    """Whose job it is: nobody else sees it. None = not authenticated."""

    tenant: str | None = None
    client: str | None = None

    @staticmethod
    def of(caller: Caller) -> Owner:
        return Owner(caller.tenant, caller.client)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a job beside its bodies.

    `ttl`: seconds that it may take, and that its result is kept; `expires`: when the present of these two ends.
    `attempts`: runs begun and not handed back; `backoffs`: times handed back. `error`, `error_status`: of a failed one, the
    text and HTTP status that inferring would have given. `webhook`: where the end is reported, None = nowhere; `hook_tries`:
    reports begun. `size`: bytes charged.
    """

    id: str
    owner: Owner
    model: str
    version: str | None
    created: float
    updated: float
    expires: float
    ttl: float
    state: State = "queued"
    attempts: int = 0
    backoffs: int = 0
    error: str | None = None
    error_status: int = 0
    webhook: str | None = None
    hook_tries: int = 0
    size: int = ROW_BYTES

    @property
    def is_final(self) -> bool:
        return self.state in FINAL


class Work(msgspec.Struct, frozen=True):
    """What to run: an infer request as it was sent. `header_length`: bytes of JSON before binary data, None = all is JSON.

    `budget`: seconds that one run may take, None = as long as the runner allows.
    """

    body: bytes
    header_length: int | None = None
    budget: float | None = None
    trace: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """The infer answer as it is sent. `header_length` as in `Work`."""

    body: bytes
    header_length: int | None = None


class Failure(msgspec.Struct, frozen=True):
    """The error that inferring ended with, and its HTTP status."""

    error: str
    status: int


class JobLimits(msgspec.Struct, frozen=True):
    """`queued`: jobs waiting or running. `bytes`: stored in all, results included. `tenant_share`: of either for one tenant.

    `ttl`, `max_ttl`: seconds; the default and the longest that a caller may ask for.
    """

    queued: int = 10_000
    bytes: int = 1 << 30
    tenant_share: float = 0.5
    ttl: float = 3600.0
    max_ttl: float = 7 * 86_400.0


def new_id() -> str:
    """128 random bits: knowing one id tells nothing about another."""
    return secrets.token_hex(ID_LENGTH // 2)


class _Error(msgspec.Struct):
    error: str
    status: int


class Status(msgspec.Struct, omit_defaults=True):
    """A job as callers see it: the answer to GET, and the body of a webhook."""

    job: str
    status: State
    model: str
    created: float
    updated: float
    expires: float
    attempts: int
    version: str | None = None
    result: str | None = None
    error: _Error | None = None


def status_of(job: Job) -> Status:
    return Status(
        job.id,
        job.state,
        job.model,
        round(job.created, 3),
        round(job.updated, 3),
        round(job.expires, 3),
        job.attempts,
        job.version,
        f"/v2/jobs/{job.id}/result" if job.state == "succeeded" else None,
        None if job.error is None else _Error(job.error, job.error_status),
    )
