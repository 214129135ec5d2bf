"""ModelStreamInfer: many requests under way on one stream, answered in order of completion.

A request that fails is answered with its `error_message`, and the stream goes on. A stream of an unknown caller is refused at
once, and ends when the caller's credential no longer holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio  # type: ignore[import-untyped]

from models.errors import DeadlineExceeded, Unauthenticated
from models.serving.caller import Caller
from models.serving.drive import Driven, drive
from models.serving.grpc import inference_pb2 as pb
from models.serving.grpc.codec import FINAL, Asked, encode_response
from models.serving.grpc.places import Places, who_of
from models.serving.grpc.servicer import MESSAGE_SECONDS, Context, Servicer, refuse, text_of
from models.serving.grpc.split import bytes_prefix, split_request
from models.serving.predictor import InferResponse

MAX_STREAMS = 64
"""Most streams at once, beside other calls."""
MAX_STREAMS_PER_CALLER = 32
"""Most of them of one caller: half, so that no one alone can take them all."""
FIRST_SECONDS = MESSAGE_SECONDS
"""Longest wait for the first message of a stream."""
IDLE_SECONDS = 300.0
"""A stream ends that has nothing under way, and on which nothing came, for this long: it holds one of few places."""
MAX_STREAM_INFLIGHT = 32
"""Most requests of one stream that are under way or whose answer is not sent yet; beyond, nothing more is read."""

_NAME = "ModelStreamInfer"
_INFER_RESPONSE = 2
"""Its field number in ModelStreamInferResponse."""


class StreamServicer:
    """Answers ModelStreamInfer; `servicer` knows what a request means."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer
        self._places = Places("streams", MAX_STREAMS, MAX_STREAMS_PER_CALLER)

    async def infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        try:
            stream = _Stream(self._servicer, context)
            self._places.take(who_of(stream.caller, stream.peer), context)
        except Exception as error:  # noqa: BLE001 - told to the caller
            await refuse(context, error, _NAME)
        else:
            await stream.run()


class _Stream:
    """Raises InvalidRequest for metadata that says nothing sensible, Unauthenticated for an unknown caller."""

    def __init__(self, servicer: Servicer, context: Context) -> None:
        self.servicer = servicer
        self.context = context
        self.said = servicer.read(context)
        self.peer = servicer.peer(context)
        self.loop = asyncio.get_running_loop()
        self.flights: set[_Flight] = set()
        self._access = servicer.plane.access
        self._revision = self._access.revision
        self.caller: Caller = self._access.identify(self.peer, self.said.authorization)
        self._landed: asyncio.Queue[_Flight | None] = asyncio.Queue()  # bounded by _free
        self._free = asyncio.Semaphore(MAX_STREAM_INFLIGHT)
        self._unanswered = 0
        self._all_read = False
        self._patience = FIRST_SECONDS
        self._idle_since = self.loop.time()

    async def run(self) -> None:
        """Until everything that came is answered and no more will come."""
        self._timer = self.loop.call_later(self._patience, self._look)
        writing = self.loop.create_task(self._write())
        try:
            await self._read()
            await writing
        except Unauthenticated as error:
            await refuse(self.context, error, _NAME)
        finally:
            self._timer.cancel()
            writing.cancel()
            for flight in tuple(self.flights):
                flight.cancel()
            # Its failure means that the client has gone, which grpc tells this task by cancelling it.
            await asyncio.gather(writing, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            await self._free.acquire()
            data = await self.context.read()
            if data is grpc.aio.EOF:
                break
            self._identify()
            self._unanswered += 1
            self._patience = IDLE_SECONDS
            _Flight(self, data).start()
        self._all_read = True
        self._end_when_done()

    def _identify(self) -> None:
        """Again, when the credential may no longer hold. Raises Unauthenticated."""
        revision = self._access.revision
        if revision != self._revision or not self.caller.is_current:
            self.caller = self._access.identify(self.peer, self.said.authorization)
            self._revision = revision

    def _look(self) -> None:
        """End the stream if it has been idle for too long, else look again when it may have been."""
        now = self.loop.time()
        due = self._idle_since + self._patience
        if self._unanswered:
            due = now + self._patience
        elif now >= due:
            late = DeadlineExceeded(f"nothing came on this stream for {self._patience:g} s")
            self.servicer.end(self.context, late, _NAME)
            return
        self._timer = self.loop.call_at(due, self._look)

    async def _write(self) -> None:
        while (flight := await self._landed.get()) is not None:
            await self.context.write(flight.message())
            self._free.release()

    def land(self, flight: _Flight) -> None:
        self.flights.discard(flight)
        self._landed.put_nowait(flight)
        self._unanswered -= 1
        self._idle_since = self.loop.time()
        self._end_when_done()

    def _end_when_done(self) -> None:
        if self._all_read and self._unanswered == 0:
            self._landed.put_nowait(None)


class _Flight:
    """One request of a stream, from its bytes to those of its answer."""

    __slots__ = ("_answer", "_asked", "_data", "_driven", "_error", "_stream")

    def __init__(self, stream: _Stream, data: bytes) -> None:
        self._stream = stream
        self._data = data
        self._asked: Asked | None = None
        self._answer: InferResponse | None = None
        self._error: BaseException | None = None
        self._driven: Driven[InferResponse] | None = None

    def start(self) -> None:
        stream = self._stream
        try:
            self._asked = stream.servicer.decode(self._data)
        except Exception as error:  # noqa: BLE001 - told to the caller
            self._done(None, error)
            return
        stream.flights.add(self)
        answering = stream.servicer.answer(self._asked, stream.caller, stream.said, stream.context)
        self._driven = drive(answering, self._done, stream.loop)

    def cancel(self) -> None:
        if self._driven is not None:
            self._driven.cancel()

    def _done(self, answer: InferResponse | None, error: BaseException | None) -> None:
        self._answer, self._error = answer, error
        self._stream.land(self)

    def message(self) -> bytes:
        if self._asked is not None and self._answer is not None:
            try:
                final = self._asked.head.parameters.get(FINAL) is True
                data = encode_response(self._answer, self._asked.id, final=final)
            except Exception as error:  # noqa: BLE001 - told to the caller
                self._error = error
            else:
                return bytes_prefix(_INFER_RESPONSE, len(data)) + data
        assert self._error is not None
        text = text_of(self._error, _NAME)
        message = pb.ModelStreamInferResponse(error_message=text, infer_response=pb.ModelInferResponse(id=self._id()))
        return bytes(message.SerializeToString())

    def _id(self) -> str | None:
        """As far as it can be told."""
        if self._asked is not None:
            return self._asked.id
        try:
            return split_request(self._data).id
        except Exception:  # noqa: BLE001 - refused for just that
            return None
