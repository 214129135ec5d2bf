"""The service as grpc calls it, in the event loop: bytes in, bytes out, errors as status codes.

Unary calls too are given to us when their headers have come: who calls is known, or refused, before a message is waited for.
Messages are not parsed by grpc, which answers INTERNAL to one that is broken, but here. A call whose client has gone, or whose
deadline is over, is cancelled by grpc: the work ends as with any cancelled coroutine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, NoReturn

import grpc.aio  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from models.errors import DeadlineExceeded, InvalidRequest, Overloaded, TierlineError, TooLarge, TryAgain
from models.serving.caller import Caller, Peer
from models.serving.grpc.calls import METHODS, Method
from models.serving.grpc.codec import Asked, Heads, decode_request, encode_response
from models.serving.grpc.metadata import Said, read_metadata, read_peer
from models.serving.grpc.places import Places, who_of
from models.serving.plane import DataPlane
from models.serving.predictor import InferResponse

log = logging.getLogger("tierline.grpc")

SERVICE = "inference.GRPCInferenceService"
MAX_DETAILS = 1024
"""Characters of an error's text that are sent: they travel in a header, which clients refuse when it is long."""
MAX_CALL_BYTES = 64 * 1024
"""Longest message of a call that is not an inference: protobuf may take a hundred times as much memory to read one."""
MAX_CALLS = 512
"""Most calls at once that need a credential, beside streams; more are refused at once."""
MAX_CALLS_PER_CALLER = 256
"""Most of them of one caller: half, so that no one alone can take them all."""
MAX_OPEN_CALLS = 256
"""Most calls at once that need no credential. They have places of their own, and keep them while others are taken."""
MAX_OPEN_CALLS_PER_ADDRESS = 64
"""Most of them from one address; each is over at once, unless its answer is not read."""
MESSAGE_SECONDS = 60.0
"""Longest wait for the whole message of a call: the longest one takes as long at 10 Mbit/s."""

Context = Any
Handler = Callable[[AsyncIterator[bytes], Context], Awaitable[bytes]]


class Servicer:
    """Answers the unary calls. `encrypted`: connections are TLS."""

    def __init__(self, plane: DataPlane, *, encrypted: bool = False) -> None:
        self.plane = plane
        self._encrypted = encrypted
        self._heads: Heads = {}
        self._calls = Places("calls", MAX_CALLS, MAX_CALLS_PER_CALLER)
        self._open_calls = Places("open calls", MAX_OPEN_CALLS, MAX_OPEN_CALLS_PER_ADDRESS)
        self._reading: dict[Context, tuple[float, str]] = {}  # since when, which call; the oldest first
        self._timer: asyncio.TimerHandle | None = None  # one for all: it costs uvloop more than a call's other checks
        self._ending: set[asyncio.Task[None]] = set()

    def handlers(self) -> dict[str, Handler]:
        """By name of the call. They read their one message themselves."""
        return {"ModelInfer": self.infer} | {
            name: self._open(name, method) if method.open else self._answering(name, method)
            for name, method in METHODS.items()
        }

    async def infer(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        try:
            said = self.read(context)
            caller = self._admit(context, said)
            asked = self.decode(await self._message(context, "ModelInfer"))
            answer = await self.answer(asked, caller, said, context)
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

    async def answer(self, asked: Asked, caller: Caller, said: Said, context: Context) -> InferResponse:
        """Raises errors of `models.errors`."""
        plane = self.plane
        plane.require(caller, asked.head.model)
        return await plane.predictor.infer(asked.request(caller, _deadline(said.budget, context), said.trace))

    def end(self, context: Context, error: Exception, name: str) -> None:
        """End a call from outside of its handler, which then sees its next read fail.

        A read must not be cancelled instead: grpc would write the message to memory that is no longer there.
        """
        task = asyncio.get_running_loop().create_task(_refuse_quietly(context, error, name))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _admit(self, context: Context, said: Said) -> Caller:
        """Who calls, with a place for the call. Raises Overloaded and Unauthenticated."""
        peer = self.peer(context)
        caller = self.plane.access.identify(peer, said.authorization)
        self._calls.take(who_of(caller, peer), context)
        return caller

    async def _message(self, context: Context, name: str) -> bytes:
        """The one message of a unary call. Raises InvalidRequest when there is none."""
        loop = asyncio.get_running_loop()
        self._reading[context] = (loop.time(), name)
        if self._timer is None:
            self._timer = loop.call_later(MESSAGE_SECONDS, self._end_late)
        try:
            data = await context.read()
        finally:
            del self._reading[context]
        if data is grpc.aio.EOF:
            raise InvalidRequest(f"{name} was called without a message")
        return bytes(data)

    def _end_late(self) -> None:
        """End the calls that have waited for too long for their message, and look again when the next one will have."""
        loop = asyncio.get_running_loop()
        self._timer = None
        for context, (since, name) in self._reading.items():
            if loop.time() < since + MESSAGE_SECONDS:
                self._timer = loop.call_at(since + MESSAGE_SECONDS, self._end_late)
                break
            self.end(context, DeadlineExceeded(f"the message did not come within {MESSAGE_SECONDS:g} s"), name)

    def _answering(self, name: str, method: Method) -> Handler:
        async def answer(requests: AsyncIterator[bytes], context: Context) -> bytes:
            try:
                caller = self._admit(context, self.read(context))
                asked = _parse(method, await self._message(context, name))
                answered = await method.act(self.plane, caller, asked)
                return bytes(answered.SerializeToString())
            except Exception as error:  # noqa: BLE001 - told to the caller
                await refuse(context, error, name)

        return answer

    def _open(self, name: str, method: Method) -> Handler:
        # Their messages have no fields: not waited for, they cannot be held back to keep a call open.
        async def answer(requests: AsyncIterator[bytes], context: Context) -> bytes:
            try:
                self._open_calls.take(self.peer(context).address, context)
                answered = await method.act(self.plane, Caller(), method.message())
                return bytes(answered.SerializeToString())
            except Exception as error:  # noqa: BLE001 - told to the caller
                await refuse(context, error, name)

        return answer


async def refuse(context: Context, error: Exception, name: str) -> NoReturn:
    """End the call with the code of `error`. What nobody expected is logged and not shown."""
    if isinstance(error, grpc.aio.AbortError):
        raise error  # ended already, by `Servicer.end`
    code = grpc.StatusCode[error.grpc] if isinstance(error, TierlineError) else grpc.StatusCode.INTERNAL
    trailing: tuple[tuple[str, str], ...] = ()
    if isinstance(error, Overloaded):
        trailing = (("retry-after", str(max(1, round(error.retry_after + 0.5)))),)
    await context.abort(code, text_of(error, name), trailing)
    raise AssertionError("abort raises")


async def _refuse_quietly(context: Context, error: Exception, name: str) -> None:
    with suppress(Exception):  # the end of the call, or that it has ended by itself
        await refuse(context, error, name)


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
