"""What a server's status stands for: HTTP statuses and gRPC codes to the errors of `models.errors`. Pure."""

from __future__ import annotations

import msgspec

from models.errors import (
    CallerError,
    Conflict,
    DeadlineExceeded,
    EngineFailure,
    Forbidden,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    NotReady,
    Overloaded,
    PackageError,
    TierlineError,
    TooLarge,
    Unauthenticated,
    Unreachable,
    UnsupportedEncoding,
)
from models.serving.reply import Reply

MAX_RETRY_AFTER_SECONDS = 3600.0
"""Longest pause that a server may ask for and be believed."""
MAX_ERROR_TEXT = 1000
"""Characters of a foreign error text that are repeated."""

_HTTP: dict[int, type[TierlineError]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    405: MethodNotAllowed,
    409: Conflict,
    413: TooLarge,
    415: UnsupportedEncoding,
    422: PackageError,
    500: EngineFailure,
    503: NotReady,
    504: DeadlineExceeded,
}
_GRPC: dict[str, type[TierlineError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": Forbidden,
    "NOT_FOUND": NotFound,
    "UNIMPLEMENTED": MethodNotAllowed,
    "FAILED_PRECONDITION": Conflict,
    "ALREADY_EXISTS": Conflict,
    "INTERNAL": EngineFailure,
    "UNKNOWN": EngineFailure,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
}


class _Error(msgspec.Struct):
    error: str


def error_of(reply: Reply) -> TierlineError:
    """The error that an HTTP answer other than 200 stands for."""
    try:
        text = msgspec.json.decode(reply.body, type=_Error).error[:MAX_ERROR_TEXT]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        text = f"status {reply.status} without an explanation"
    if reply.status == 429:
        return Overloaded(text, _seconds(reply.headers.get(b"retry-after", b"").decode("latin-1")))
    kind = _HTTP.get(reply.status)
    if kind is None:
        kind = CallerError if 400 <= reply.status < 500 else Unreachable
    return kind(text)


def error_of_code(code: str, text: str, retry_after: str = "") -> TierlineError:
    """The error that a canonical gRPC code stands for; `retry_after` as the server sent it, in seconds.

    UNAVAILABLE is what a server says that is not ready and what a client says that reaches none: both become Unreachable.
    """
    text = text[:MAX_ERROR_TEXT] or f"{code} without an explanation"
    if code == "RESOURCE_EXHAUSTED":
        return Overloaded(text, _seconds(retry_after))
    return _GRPC.get(code, Unreachable)(text)


def _seconds(value: str) -> float:
    # A date, which HTTP allows as well, is not worth a clock that both sides share.
    return (
        min(float(value), MAX_RETRY_AFTER_SECONDS) if value.isascii() and value.isdigit() and len(value) < 19 else 1.0
    )
