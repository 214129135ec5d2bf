"""The service as grpc calls it, in the event loop: bytes in, bytes out, errors as status codes.

Messages are not parsed by grpc, which answers INTERNAL to one that is broken, but here. A call whose client has gone, or whose
deadline is over, is cancelled by grpc: the work ends as with any cancelled coroutine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc.aio  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from models.errors import InvalidRequest, Overloaded, TierlineError, TooLarge, TryAgain
from models.serving.caller import Caller, Peer
from models.serving.grpc.calls import METHODS, Method
from models.serving.grpc.codec import Asked, Heads, decode_request, encode_response
from models.serving.grpc.metadata import Said, read_metadata, read_peer
from models.serving.plane import DataPlane
from models.serving.predictor import InferResponse

log = logging.getLogger("tierline.grpc")

SERVICE = "inference.GRPCInferenceService"
MAX_DETAILS = 1024
"""Characters of an error's text that are sent: they travel in a header, which clients refuse when it is long."""
MAX_CALL_BYTES = 64 * 1024
"""Longest message of a call that is not an inference: protobuf may take a hundred times as much memory to read one."""

Context = Any
Handler = Callable[[bytes, Context], Awaitable[bytes]]


class Servicer:
    """Answers the unary calls. `encrypted`: connections are TLS."""

    def __init__(self, plane: DataPlane, *, encrypted: bool = False) -> None:
        self._plane = plane
        self._encrypted = encrypted
        self._heads: Heads = {}

    def handlers(self) -> dict[str, Handler]:
        """By name of the call."""
        return {"ModelInfer": self.infer} | {name: self._answering(name, method) for name, method in METHODS.items()}

    async def infer(self, data: bytes, context: Context) -> bytes:
        try:
            said = self.read(context)
            asked = self.decode(data)
            answer = await self.answer(asked, self.peer(context), said, context)
            if answer.trace is not None:
                await context.send_initial_metadata((("traceparent", answer.trace),))
            return encode_response(answer, asked.id)
        except Exception as error:  # noqa: BLE001 - told to the caller
            await refuse(context, error, "ModelInfer")

    def read(self, context: Context) -> Said:
        return read_metadata(context.invocation_metadata())

    def peer(self, context: Context) -> Peer:
        return read_peer(context.peer(), context.auth_context() if self._encrypted else None)

    def decode(self, data: bytes) -> Asked:
        return decode_request(data, self._heads)

    async def answer(self, asked: Asked, peer: Peer, said: Said, context: Context) -> InferResponse:
        """Raises errors of `models.errors`."""
        plane = self._plane
        caller = plane.access.identify(peer, said.authorization)
        plane.require(caller, asked.head.model)
        return await plane.predictor.infer(asked.request(caller, _deadline(said.budget, context), said.trace))

    def _answering(self, name: str, method: Method) -> Handler:
        async def answer(data: bytes, context: Context) -> bytes:
            try:
                caller = Caller()
                if not method.open:
                    caller = self._plane.access.identify(self.peer(context), self.read(context).authorization)
                answered = await method.act(self._plane, caller, _parse(method, data))
                return bytes(answered.SerializeToString())
            except Exception as error:  # noqa: BLE001 - told to the caller
                await refuse(context, error, name)

        return answer


async def refuse(context: Context, error: Exception, name: str) -> NoReturn:
    """End the call with the code of `error`. What nobody expected is logged and not shown."""
    code = grpc.StatusCode[error.grpc] if isinstance(error, TierlineError) else grpc.StatusCode.INTERNAL
    trailing: tuple[tuple[str, str], ...] = ()
    if isinstance(error, Overloaded):
        trailing = (("retry-after", str(max(1, round(error.retry_after + 0.5)))),)
    await context.abort(code, text_of(error, name), trailing)
    raise AssertionError("abort raises")


def text_of(error: BaseException, name: str) -> str:
    """What the caller is told. What is our fault is logged as that of the call `name`."""
    if isinstance(error, TierlineError):
        if error.http >= 500 and not isinstance(error, TryAgain):
            log.error("%s failed", name, exc_info=error)
        # A surrogate that came out of a broken name could not be sent.
        text = str(error).encode("utf-8", "replace").decode()
        return text if len(text) <= MAX_DETAILS else f"{text[: MAX_DETAILS - 1]}…"
    if isinstance(error, asyncio.CancelledError):
        return "the request was cancelled"
    log.error("%s failed unexpectedly", name, exc_info=error)
    return "internal error"


def _deadline(budget: float | None, context: Context) -> float | None:
    """Monotonic seconds: the sooner of what metadata says and the call's own deadline."""
    remaining: float | None = context.time_remaining()
    if remaining is None:
        remaining = budget
    elif budget is not None:
        remaining = min(budget, remaining)
    return None if remaining is None else time.monotonic() + remaining


def _parse(method: Method, data: bytes) -> Any:
    name = method.message.DESCRIPTOR.name
    if len(data) > MAX_CALL_BYTES:
        raise TooLarge(f"{name} has {len(data)} bytes, at most {MAX_CALL_BYTES} are accepted")
    try:
        return method.message.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the message is not a {name}") from error
