"""Open Inference Protocol v2 over HTTP as a pure handler: decodes, asks the data plane, encodes. No sockets here.

Every error leaves as `{"error": "<text>"}` with the status of its class in `models.errors`. What nobody expected is logged
with its trace and leaves as 500 `{"error": "internal error"}`: internals are never shown. Inferring is here, everything
else a caller may ask is in `models.serving.rest_routes`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Coroutine, Mapping
from functools import lru_cache
from math import isfinite
from typing import Any

import msgspec

from models.errors import InvalidRequest, MethodNotAllowed, TierlineError, TryAgain, UnsupportedEncoding
from models.serving.access.pages import Pages
from models.serving.caller import Caller
from models.serving.codec import MAX_JSON_BYTES, Heads, OutputForm, decode_request, encode_response
from models.serving.exchange import (
    JSON,
    OCTETS,
    Handler,
    HttpHead,
    HttpRequest,
    HttpResponse,
    error_body,
    error_response,
)
from models.serving.plane import DataPlane
from models.serving.predictor import InferRequest, InferResponse
from models.serving.rest_body import MAX_EXPANDED_BYTES, Expander, accepted_coding, content_coding, pack
from models.serving.rest_routes import INFER, find_route

log = logging.getLogger("tierline.rest")

BINARY_HEADER = b"inference-header-content-length"
DEADLINE_HEADER = b"tierline-deadline-ms"

_PAGE_TYPES = frozenset((b"application/json", b"application/octet-stream", b""))
# What curl sends unasked stands beside JSON: the body is decoded as JSON whatever the header says.
_BODY_TYPES = _PAGE_TYPES | {b"application/x-www-form-urlencoded"}


class InferPlan(msgspec.Struct):
    """What the head of an infer request says, worked out once: clients send the same head again and again.

    `header_length`: bytes of JSON before binary data, None = all is JSON. `budget`: seconds, None = the policy's default.
    `coded`: the body came compressed, or the answer is to be: `content` and `accepted` say how, None = not at all.
    `revision`, `expires`: until when the caller is who they were.
    """

    model: str
    version: str | None
    header_length: int | None
    budget: float | None
    trace: str | None
    tenant: str | None
    client: str | None
    content: str | None
    accepted: str | None
    coded: bool
    revision: int
    expires: float


class RestHandler:
    """Answers the protocol's routes, and hands paths below a prefix of `extra` to another handler.

    A prefix is one or two segments, starts with '/' and matches itself and what is below it: "/blobs" takes /blobs and
    /blobs/x. `origins`, `host`: see `models.serving.access.pages.Pages`; they hold for `extra` too.
    """

    def __init__(
        self,
        plane: DataPlane,
        *,
        extra: Mapping[str, Handler] | None = None,
        origins: Collection[str] = (),
        host: str = "",
    ) -> None:
        self._plane = plane
        self._predictor = plane.predictor
        self._access = plane.access
        self._extra = dict(extra or {})
        self._pages = Pages(origins, host)
        self._heads: Heads = {}
        self._expander = Expander()

    def __call__(self, request: HttpRequest) -> Coroutine[Any, Any, HttpResponse]:
        plan = request.head.memo
        if plan is not None and plan.revision == self._access.revision:
            now = time.monotonic()
            if now < plan.expires and not plan.coded:
                # The coroutine itself, not one around it: a layer costs every request.
                return self._answer(request, plan, now)
        return self._other(request)

    async def _answer(self, request: HttpRequest, plan: InferPlan, now: float) -> HttpResponse:
        try:
            inference, form = self._decode(request.body, plan, now)
            return self._encode(await self._predictor.infer(inference), form, inference.id)
        except Exception as error:  # noqa: BLE001 - becomes the answer
            return _failed(request, error)

    async def _other(self, request: HttpRequest) -> HttpResponse:
        try:
            return await self._first(request)
        except Exception as error:  # noqa: BLE001 - becomes the answer
            return _failed(request, error)

    async def _first(self, request: HttpRequest) -> HttpResponse:
        head = request.head
        self._pages.require(head.headers)
        parts = head.path.split("/", 3)
        extra = self._extra.get("/".join(parts[:2])) or self._extra.get("/".join(parts[:3]))
        if extra is not None:
            if self._pages.is_misnamed(head):
                self._identify(head)
            return await extra(request)
        route = find_route(head.path)
        if head.method not in route.methods:
            raise MethodNotAllowed(f"{head.path} takes {' or '.join(route.methods)}, not {head.method}")
        revision = self._access.revision
        if route.act is INFER:
            caller = self._identify(head)
            self._plane.require(caller, route.model)
            plan = head.memo = _plan(head, route.model, route.version, caller, revision)
            infer = self._infer_coded if plan.coded else self._infer
            return await infer(request.body, plan, time.monotonic())
        caller = Caller() if route.open else self._identify(head)
        if head.method == "POST":
            _check_type(head.headers)
        return await route.act(self._plane, caller, request, route.model, route.version)

    def _identify(self, head: HttpHead) -> Caller:
        caller = self._access.identify(head.peer, head.headers.get(b"authorization"))
        if caller.client is None:
            self._pages.require_name(head)
        return caller

    async def _infer_coded(self, body: bytes, plan: InferPlan, now: float) -> HttpResponse:
        """Compressed in, out or both. The header's length counts bytes of the expanded body (Triton's extension)."""
        if plan.content is None:
            answer = await self._infer(body, plan, now)
        else:
            limit = MAX_JSON_BYTES if plan.header_length is None else MAX_EXPANDED_BYTES
            expanded = await self._expander.expand(body, plan.content, limit)
            try:
                answer = await self._infer(expanded, plan, now)
            finally:
                self._expander.release(len(expanded))
        return answer if plan.accepted is None else await pack(answer, plan.accepted)

    async def _infer(self, body: bytes, plan: InferPlan, now: float) -> HttpResponse:
        inference, form = self._decode(body, plan, now)
        return self._encode(await self._predictor.infer(inference), form, inference.id)

    def _decode(self, body: bytes, plan: InferPlan, now: float) -> tuple[InferRequest, OutputForm]:
        return decode_request(
            body,
            plan.header_length,
            model=plan.model,
            version=plan.version,
            deadline=None if plan.budget is None else now + plan.budget,
            trace=plan.trace,
            tenant=plan.tenant,
            client=plan.client,
            heads=self._heads,
        )

    def _encode(self, answer: InferResponse, form: OutputForm, request_id: str | None) -> HttpResponse:
        parts, header_length = encode_response(answer, form, request_id)
        headers = JSON if header_length is None else binary_headers(header_length)
        if answer.trace is not None:
            headers = b"%btraceparent: %b\r\n" % (headers, answer.trace.encode())
        return HttpResponse(200, headers, parts)


@lru_cache(maxsize=1024)
def binary_headers(header_length: int) -> bytes:
    """Of an answer whose JSON part is so long."""
    return b"%binference-header-content-length: %d\r\n" % (OCTETS, header_length)


def _failed(request: HttpRequest, error: Exception) -> HttpResponse:
    if isinstance(error, TierlineError):
        if error.http >= 500 and not isinstance(error, TryAgain):
            log.error("%s failed", request.path, exc_info=error)
        return error_response(error)
    log.error("%s failed unexpectedly", request.path, exc_info=error)
    return HttpResponse(500, JSON, error_body("internal error"))


def _plan(head: HttpHead, model: str, version: str | None, caller: Caller, revision: int) -> InferPlan:
    headers = head.headers
    _check_type(headers)
    content, accepted = content_coding(headers), accepted_coding(headers)
    length = headers.get(BINARY_HEADER)
    budget = headers.get(DEADLINE_HEADER)
    trace = headers.get(b"traceparent")
    return InferPlan(
        model,
        version,
        None if length is None else _header_length(length),
        None if budget is None else _budget(budget),
        None if trace is None else trace.decode("latin-1"),
        caller.tenant,
        caller.client,
        content,
        accepted,
        content is not None or accepted is not None,
        revision,
        caller.expires,
    )


def _check_type(headers: Mapping[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"")
    # A form is what a page may send to any site without asking first.
    known = _PAGE_TYPES if b"origin" in headers else _BODY_TYPES
    if kind not in known and kind.partition(b";")[0].strip().lower() not in known:
        raise UnsupportedEncoding(
            f"content type {kind.decode('latin-1')!r} is neither JSON nor application/octet-stream"
        )


def _header_length(value: bytes) -> int:
    # int() would also take signs, spaces and underscores.
    if not value.isdigit() or len(value) > 18:
        raise InvalidRequest(f"inference-header-content-length {value.decode('latin-1')!r} is not a number of bytes")
    return int(value)


def _budget(value: bytes) -> float:
    """Seconds that `value` milliseconds are."""
    try:
        remaining = float(value)
    except ValueError:
        remaining = float("nan")
    if not isfinite(remaining):
        raise InvalidRequest(f"tierline-deadline-ms {value.decode('latin-1')!r} is not a number of milliseconds")
    return remaining / 1e3
