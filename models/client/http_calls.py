"""The protocol over HTTP: what is sent and how answers are read. Pure; shared by the blocking and the asynchronous client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from math import ceil
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from models.client.answer import Answer, Metadata, ModelState, ModelStatistics
from models.client.calls import Call
from models.errors import InvalidRequest, NotFound, NotReady, Unreachable
from models.serving.codec_client import Heads, encode_request, header_length_of, read_response
from models.serving.codec_tensor import DECODE_ERRORS
from models.serving.endpoint import HEADER_VALUE
from models.serving.predictor import InferRequest
from models.serving.reply import Reply
from models.serving.status import error_of
from models.tensor import TensorSpec

T = TypeVar("T")


class HttpCall(Call[T]):
    """`head`: the request's up to the end of its last header but the deadline. `read`: raises what a refusal stands for."""

    __slots__ = ("body", "head", "read", "repeatable")

    def __init__(self, head: bytes, body: list[bytes], read: Callable[[Reply], T], *, repeatable: bool = True) -> None:
        self.head = head
        self.body = body
        self.read = read
        self.repeatable = repeatable

    def parts(self, milliseconds: int) -> list[bytes]:
        """The whole request, to be answered within `milliseconds`."""
        return [b"%btierline-deadline-ms: %d\r\n\r\n" % (self.head, milliseconds), *self.body]


def milliseconds_of(remaining: float) -> int:
    """Whole ones, so that the head of a program's requests stays the same, which is cheaper at both ends."""
    return ceil(remaining * 1e3)


class _ModelMetadata(msgspec.Struct):
    name: str
    versions: tuple[str, ...] = ()
    platform: str = ""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    parameters: dict[str, Any] = {}


class _Statistics(msgspec.Struct):
    model_stats: list[ModelStatistics] = []


class _State(msgspec.Struct):
    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class HttpCalls:
    """`prefix`: of every path. `authority`: the Host header. `peer`: the server's name in errors."""

    def __init__(self, prefix: str, authority: str, peer: str, token: str | None) -> None:
        if token is not None and not HEADER_VALUE.fullmatch(token):
            raise ValueError("the token holds characters that a header cannot carry")
        credential = "" if token is None else f"authorization: Bearer {token}\r\n"
        self._prefix = prefix
        self._peer = peer
        self._shared_head = f" HTTP/1.1\r\nhost: {authority}\r\n{credential}".encode("ascii")
        self._heads = Heads()
        self._infer_head = lru_cache(maxsize=256)(self._make_infer_head)

    def infer(self, request: InferRequest) -> HttpCall[Answer]:
        body = encode_request(request, self._heads)
        head = b"%bcontent-length: %d\r\ninference-header-content-length: %d\r\n" % (
            self._infer_head(request.model, request.version),
            sum(map(len, body)),
            len(body[0]),
        )
        if request.trace is not None:
            if not HEADER_VALUE.fullmatch(request.trace):
                raise InvalidRequest("trace holds characters that a header cannot carry")
            head += b"traceparent: %b\r\n" % request.trace.encode()
        return HttpCall(head, body, partial(self._answer, request))

    def live(self) -> HttpCall[bool]:
        return self._get("/v2/health/live", _is_well)

    def ready(self, model: str | None, version: str | None) -> HttpCall[bool]:
        path = "/v2/health/ready" if model is None else f"{_model_path(model, version)}/ready"
        return self._get(path, _is_well)

    def metadata(self, model: str, version: str | None) -> HttpCall[Metadata]:
        return self._get(_model_path(model, version), self._metadata)

    def index(self, ready_only: bool) -> HttpCall[list[ModelState]]:
        return self._post("/v2/repository/index", self._states, {"ready": ready_only}, repeatable=True)

    def load(self, model: str) -> HttpCall[None]:
        return self._post(f"/v2/repository/models/{quote(model, safe='')}/load", _done)

    def unload(self, model: str) -> HttpCall[None]:
        return self._post(f"/v2/repository/models/{quote(model, safe='')}/unload", _done)

    def config(self, model: str, version: str | None) -> HttpCall[Mapping[str, Any]]:
        return self._get(f"{_model_path(model, version)}/config", partial(self._json, dict[str, Any]))

    def statistics(self, model: str | None, version: str | None) -> HttpCall[Sequence[ModelStatistics]]:
        path = "/v2/models/stats" if model is None else f"{_model_path(model, version)}/stats"
        return self._get(path, self._statistics)

    def _answer(self, request: InferRequest, reply: Reply) -> Answer:
        if reply.status != 200:
            raise error_of(reply)
        outputs, head = read_response(reply.body, header_length_of(reply, self._peer), self._peer, self._heads)
        marks = head.parameters
        return Answer(
            outputs=outputs,
            model=request.model,
            version=head.model_version or request.version,
            package=marks.package,
            tier=marks.tier,
            confidence=marks.confidence,
            reason=marks.reason,
            degraded=marks.degraded,
            id=head.id,
        )

    def _metadata(self, reply: Reply) -> Metadata:
        known = self._json(_ModelMetadata, reply)
        package = known.parameters.get("package")
        package = package if isinstance(package, str) else None
        return Metadata(known.name, known.versions, known.platform, known.inputs, known.outputs, package)

    def _states(self, reply: Reply) -> list[ModelState]:
        return [
            ModelState(each.name, each.version, each.state, each.reason) for each in self._json(list[_State], reply)
        ]

    def _statistics(self, reply: Reply) -> Sequence[ModelStatistics]:
        return self._json(_Statistics, reply).model_stats

    def _json(self, kind: type[T], reply: Reply) -> T:
        _done(reply)
        try:
            return msgspec.json.decode(reply.body, type=kind)
        except DECODE_ERRORS as error:
            raise Unreachable(f"{self._peer} did not answer in the Open Inference Protocol: {error}") from error

    def _get(self, path: str, read: Callable[[Reply], T]) -> HttpCall[T]:
        return HttpCall(f"GET {self._prefix}{path}".encode("ascii") + self._shared_head, [], read)

    def _post(
        self, path: str, read: Callable[[Reply], T], value: object = None, *, repeatable: bool = False
    ) -> HttpCall[T]:
        body = msgspec.json.encode({} if value is None else value)
        head = f"POST {self._prefix}{path}".encode("ascii") + self._shared_head
        head += b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        return HttpCall(head, [body], read, repeatable=repeatable)

    def _make_infer_head(self, model: str, version: str | None) -> bytes:
        line = f"POST {self._prefix}{_model_path(model, version)}/infer".encode("ascii")
        return line + self._shared_head + b"content-type: application/octet-stream\r\n"


def _model_path(model: str, version: str | None) -> str:
    if not model:
        raise InvalidRequest("model is empty")
    try:
        versions = "" if version is None else f"/versions/{quote(version, safe='')}"
        return f"/v2/models/{quote(model, safe='')}{versions}"
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the model's name or version has no UTF-8 form: {error}") from error


def _is_well(reply: Reply) -> bool:
    error = None if reply.status == 200 else error_of(reply)
    # A server that is not ready answers 503 by Triton's custom, or 400.
    if error is not None and not isinstance(error, NotReady | NotFound | InvalidRequest):
        raise error
    return error is None


def _done(reply: Reply) -> None:
    if reply.status != 200:
        raise error_of(reply)
