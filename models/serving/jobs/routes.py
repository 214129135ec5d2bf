"""Jobs over HTTP: `/v2/jobs` as a handler of its own, and what `/v2/models/{model}/submit` does. Decodes, asks, encodes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import isfinite
from urllib.parse import parse_qs

import msgspec

from models.errors import Conflict, InvalidRequest, MethodNotAllowed, NotFound, TierlineError, TryAgain
from models.serving.caller import Caller
from models.serving.codec import MAX_JSON_BYTES, decode_request
from models.serving.exchange import (
    JSON,
    OCTETS,
    Handler,
    HttpRequest,
    HttpResponse,
    error_body,
    error_response,
    header_lines,
)
from models.serving.jobs.desk import Jobs
from models.serving.jobs.job import Failure, Job, Work, status_of
from models.serving.plane import DataPlane
from models.serving.rest_body import MAX_EXPANDED_BYTES, accepted_coding, content_coding, pack

log = logging.getLogger("tierline.rest")

PREFIX = "/v2/jobs"
WEBHOOK_HEADER = b"tierline-webhook"
TTL_HEADER = b"tierline-job-ttl-s"
LENGTH_HEADER = b"inference-header-content-length"
BUDGET_HEADER = b"tierline-deadline-ms"
DEFAULT_LISTED = 100
MAX_QUERY = 256
"""Longest query of a listing: `limit=` and a number."""


class _Pending(msgspec.Struct):
    error: str
    status: str


async def submit(
    plane: DataPlane, jobs: Jobs, caller: Caller, request: HttpRequest, model: str, version: str | None
) -> HttpResponse:
    """202 with the job's status and its Location. The body is checked now, run later.

    Raises NotFound for a model that the caller may not use, or that does not exist where this node decides what exists
    (elsewhere a tier above may have it: the job then ends with what that answers), Overloaded, what `decode_request` and
    `Jobs.submit` raise.
    """
    plane.require(caller, model)
    jobs.admit(caller)
    if plane.control is not None:
        plane.describe(caller, model, version)
    headers = request.headers
    length = _header_length(headers)
    trace = headers.get(b"traceparent")
    webhook = headers.get(WEBHOOK_HEADER)
    budget = _number(headers, BUDGET_HEADER)
    coding = content_coding(headers)
    body = request.body
    if coding is not None:
        limit = MAX_JSON_BYTES if length is None else MAX_EXPANDED_BYTES
        body = await jobs.expander.expand(body, coding, limit)
    try:
        decode_request(body, length, model=model, version=version)
        job = await jobs.submit(
            caller,
            model,
            version,
            Work(
                body,
                length,
                None if budget is None else budget / 1e3,
                None if trace is None else trace.decode("latin-1"),
            ),
            webhook=None if webhook is None else webhook.decode("latin-1"),
            ttl=_number(headers, TTL_HEADER),
        )
    finally:
        if coding is not None:
            jobs.expander.release(len(body))
    return _status(job, 202, header_lines([("location", f"{PREFIX}/{job.id}")]))


def job_handler(plane: DataPlane, jobs: Jobs) -> Handler:
    """Answers `/v2/jobs` and everything below it, errors included. Give it to `RestHandler` as `extra={PREFIX: ...}`."""

    async def handle(request: HttpRequest) -> HttpResponse:
        try:
            caller = plane.access.identify(request.peer, request.headers.get(b"authorization"))
            jobs.admit(caller)
            return await _answer(plane, jobs, caller, request)
        except TierlineError as error:
            if error.http >= 500 and not isinstance(error, TryAgain):
                log.exception("%s failed", request.path)
            return error_response(error)
        except Exception:
            log.exception("%s failed unexpectedly", request.path)
            return HttpResponse(500, JSON, error_body("internal error"))

    return handle


async def _answer(plane: DataPlane, jobs: Jobs, caller: Caller, request: HttpRequest) -> HttpResponse:
    match request.path.removeprefix(PREFIX).removesuffix("/").split("/"):
        case [""]:
            _allow(request, "GET", "HEAD")
            listed = await jobs.listing(caller, _limit(request.query))
            return HttpResponse(200, JSON, msgspec.json.encode({"jobs": [status_of(job) for job in listed]}))
        case ["", job_id]:
            _allow(request, "GET", "HEAD", "DELETE")
            if request.method == "DELETE":
                return _status(await jobs.cancel(caller, job_id))
            return _status(await jobs.get(caller, job_id))
        case ["", job_id, "result"]:
            _allow(request, "GET", "HEAD")
            return await _result(plane, jobs, caller, request, job_id)
    raise NotFound(f"there is nothing at {request.path}")


async def _result(plane: DataPlane, jobs: Jobs, caller: Caller, request: HttpRequest, job_id: str) -> HttpResponse:
    """What inferring would have answered, in the form asked for at submission."""
    job = await jobs.get(caller, job_id)
    plane.require(caller, job.model)
    try:
        outcome = await jobs.result(caller, job_id)
    except Conflict as error:
        return HttpResponse(error.http, JSON, msgspec.json.encode(_Pending(str(error), job.state)))
    if isinstance(outcome, Failure):
        return HttpResponse(outcome.status, JSON, error_body(outcome.error))
    headers = JSON
    if outcome.header_length is not None:
        headers = b"%binference-header-content-length: %d\r\n" % (OCTETS, outcome.header_length)
    answer = HttpResponse(200, headers, outcome.body)
    accepted = accepted_coding(request.headers)
    return answer if accepted is None else await pack(answer, accepted)


def _allow(request: HttpRequest, *methods: str) -> None:
    if request.method not in methods:
        raise MethodNotAllowed(f"{request.path} takes {' or '.join(methods)}, not {request.method}")


def _status(job: Job, status: int = 200, more: bytes = b"") -> HttpResponse:
    return HttpResponse(status, JSON + more, msgspec.json.encode(status_of(job)))


def _limit(query: str) -> int:
    given = parse_qs(query[:MAX_QUERY], keep_blank_values=True).get("limit", [str(DEFAULT_LISTED)])[-1]
    if not (given.isascii() and given.isdigit()) or len(given) > 9:
        raise InvalidRequest("limit is not a whole number")
    return int(given)


def _header_length(headers: Mapping[bytes, bytes]) -> int | None:
    value = headers.get(LENGTH_HEADER)
    if value is None:
        return None
    # int() would also take signs, spaces and underscores.
    if not value.isdigit() or len(value) > 18:
        raise InvalidRequest(f"inference-header-content-length {value.decode('latin-1')!r} is not a number of bytes")
    return int(value)


def _number(headers: Mapping[bytes, bytes], name: bytes) -> float | None:
    """The number that a header holds, whatever its unit."""
    value = headers.get(name)
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise InvalidRequest(f"{name.decode()} {value.decode('latin-1')!r} is not a number")
    return number
