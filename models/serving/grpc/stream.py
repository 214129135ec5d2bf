"""ModelStreamInfer: many requests under way on one stream, answered in order of completion.

A request that fails is answered with its `error_message`, and the stream goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio  # type: ignore[import-untyped]

from models.errors import Overloaded
from models.serving.drive import Driven, drive
from models.serving.grpc import inference_pb2 as pb
from models.serving.grpc.codec import FINAL, Asked, encode_response
from models.serving.grpc.servicer import Context, Servicer, refuse, text_of
from models.serving.grpc.split import bytes_prefix, split_request
from models.serving.predictor import InferResponse

MAX_STREAMS = 64
"""Most streams at once; of the calls that a server takes, they may not take all."""
MAX_STREAM_INFLIGHT = 32
"""Most requests of one stream that are under way or whose answer is not sent yet; beyond, nothing more is read."""

_INFER_RESPONSE = 2
"""Its field number in ModelStreamInferResponse."""


class StreamServicer:
    """Answers ModelStreamInfer; `servicer` knows what a request means."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer
        self._open = 0

    async def infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        self._open += 1
        try:
            if self._open > MAX_STREAMS:
                raise Overloaded(f"{MAX_STREAMS} streams are open, no more are accepted")  # noqa: TRY301
            stream = _Stream(self._servicer, context)
        except Exception as error:  # noqa: BLE001 - told to the caller
            await refuse(context, error, "ModelStreamInfer")
        else:
            await stream.run()
        finally:
            self._open -= 1


class _Stream:
    """Raises InvalidRequest for metadata that says nothing sensible."""

    def __init__(self, servicer: Servicer, context: Context) -> None:
        self.servicer = servicer
        self.context = context
        self.said = servicer.read(context)
        self.peer = servicer.peer(context)
        self.loop = asyncio.get_running_loop()
        self.flights: set[_Flight] = set()
        self._landed: asyncio.Queue[_Flight | None] = asyncio.Queue()  # bounded by _free
        self._free = asyncio.Semaphore(MAX_STREAM_INFLIGHT)
        self._unanswered = 0
        self._all_read = False

    async def run(self) -> None:
        """Until everything that came is answered and no more will come."""
        writing = self.loop.create_task(self._write())
        try:
            await self._read()
            await writing
        finally:
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
            self._unanswered += 1
            _Flight(self, data).start()
        self._all_read = True
        self._end_when_done()

    async def _write(self) -> None:
        while (flight := await self._landed.get()) is not None:
            await self.context.write(flight.message())
            self._free.release()

    def land(self, flight: _Flight) -> None:
        self.flights.discard(flight)
        self._landed.put_nowait(flight)
        self._unanswered -= 1
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
        answering = stream.servicer.answer(self._asked, stream.peer, stream.said, stream.context)
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
        text = text_of(self._error, "ModelStreamInfer")
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
