"""One client that stays: its requests in, answers out as they become ready, news as it happens.

Reading stops while a request waits for its turn, or answers go unread. Taking back a request is read out of turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, cast

from models.errors import (
    Conflict,
    InvalidRequest,
    NotReady,
    TierlineError,
    TooLarge,
    TryAgain,
    Unauthenticated,
)
from models.serving.caller import Caller, Peer
from models.serving.codec import OutputForm, decode_request, encode_response
from models.serving.drive import Driven, drive
from models.serving.predictor import InferResponse
from models.serving.websocket.envelope import (
    MAX_TEXT_BYTES,
    Envelope,
    answer_binary,
    answer_text,
    cancelled_text,
    error_text,
    id_of,
    news_text,
    read_binary,
    read_text,
)
from models.serving.websocket.frames import END, GOING_AWAY, POLICY, UNIDENTIFIED, Frames
from models.serving.websocket.subscriptions import Subscriptions

if TYPE_CHECKING:
    from models.serving.websocket.server import WebSockets

log = logging.getLogger("tierline.websocket")

SLICE_BYTES = 2048
"""Bytes that are taken apart at once: they can hold 341 frames, which take a few milliseconds."""


class _Call:
    """A request in work and the form of its answer."""

    __slots__ = ("binary", "driven", "form", "inner_id", "request_id", "session")

    def __init__(self, session: Session, request_id: str, inner_id: str | None, form: OutputForm, binary: bool) -> None:
        self.session = session
        self.request_id = request_id
        self.inner_id = inner_id
        self.form = form
        self.binary = binary
        self.driven: Driven[InferResponse] | None = None

    def done(self, answer: InferResponse | None, error: BaseException | None) -> None:
        self.session.answered(self, answer, error)


class Session(asyncio.Protocol):
    """A connection after its handshake. `authorization`: as the handshake brought it."""

    def __init__(
        self, owner: WebSockets, peer: Peer, authorization: bytes | None, caller: Caller, revision: int
    ) -> None:
        self._owner = owner
        self._plane = owner.plane
        self._limits = owner.limits
        self._loop = asyncio.get_running_loop()
        self._peer = peer
        self._authorization = authorization
        self._caller = caller
        self._revision = revision
        self._frames = Frames(owner.limits.message_bytes, owner.limits.message_frames, MAX_TEXT_BYTES)
        self._calls: dict[str, _Call] = {}
        # By id, requests that wait until others are answered.
        self._queue: OrderedDict[str, tuple[Envelope, bytes, bool]] = OrderedDict()
        self._subscriptions = Subscriptions(owner.plane, owner.jobs, owner.limits.subscriptions, self._send)
        # Read and not yet taken: bytes, and frames of the bytes before them.
        self._unread: deque[bytes] = deque()
        self._events: Iterator[tuple[bool | None, bytes | None]] = iter(())
        self._turn_due = self._continue_due = False
        self._invalid = 0
        self._reading = self._writable = True
        self._draining = self._lost = self._flush_due = False
        self._heard = self._framed = owner.clock()  # when bytes came, and when a whole frame did
        self._pinged: float | None = None
        self._blocked = 0.0
        self._closing: float | None = None

    # --- called by the transport ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._owner.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._owner.forget(self)
        self._drop_unread()
        self._drop_work()

    def data_received(self, data: bytes) -> None:
        self._heard = self._owner.clock()
        self._unread.extend(data[at : at + SLICE_BYTES] for at in range(0, len(data), SLICE_BYTES))
        if not self._turn_due:
            self._turn()

    def _turn(self) -> None:
        """Take as many frames as one turn of the loop allows; the others after everybody else's turn."""
        self._turn_due = False
        left = self._limits.turn
        while left and not self._lost:
            event = next(self._events, None)
            if event is not None:
                left -= 1
                self._take(*event)
            elif self._unread:
                self._events = self._frames.receive(self._unread.popleft())
            else:
                break
        else:
            self._turn_due = not self._lost
        if self._turn_due:
            self._loop.call_soon(self._turn)
        self._flush()
        self._balance()

    def eof_received(self) -> bool:
        self._drop_unread()
        self._frames.end()
        self._flush()
        return False

    def pause_writing(self) -> None:
        self._writable = False
        self._blocked = self._owner.clock()
        self._balance()

    def resume_writing(self) -> None:
        self._writable = True
        self.tell_versions()
        self._continue()

    # --- messages in ---------------------------------------------------------------------------------------------------

    def _take(self, is_text: bool | None, message: bytes | None) -> None:
        self._framed = self._heard
        if message is None or not self._frames.is_open:
            return
        if is_text is None:
            self._pinged = None
        else:
            self._take_message(message, is_text)

    def _take_message(self, message: bytes, is_text: bool) -> None:
        request_id = ""
        try:
            envelope, body = read_text(message) if is_text else read_binary(message)
            request_id = envelope.id
            if envelope.op == "infer":
                self._admit(envelope, body, not is_text)
            else:
                _ACTS.get(envelope.op, Session._unknown)(self, envelope)
            self._invalid = 0
        except Exception as error:  # noqa: BLE001 - told to the caller
            self._refuse(request_id or (id_of(message) if is_text else ""), error)

    def _admit(self, envelope: Envelope, body: bytes, binary: bool) -> None:
        if not envelope.id:
            raise InvalidRequest("id is missing: answers come in any order")
        if envelope.id in self._calls or envelope.id in self._queue:
            raise Conflict(f"a request with id {envelope.id!r} is in work")
        if self._draining:
            raise NotReady("this server is closing")
        if self._queue or not self._writable or len(self._calls) >= self._limits.in_flight:
            self._queue[envelope.id] = (envelope, body, binary)
        else:
            self._start(envelope, body, binary)

    def _start(self, envelope: Envelope, body: bytes, binary: bool) -> None:
        caller = self._identified()
        self._plane.require(caller, envelope.model)
        inference, form = decode_request(
            body,
            envelope.header_length,
            model=envelope.model,
            version=envelope.version or None,
            deadline=None if envelope.budget is None else self._owner.clock() + envelope.budget,
            trace=envelope.traceparent,
            tenant=caller.tenant,
            client=caller.client,
            heads=self._owner.heads,
        )
        call = self._calls[envelope.id] = _Call(self, envelope.id, inference.id, form, binary)
        call.driven = drive(self._plane.predictor.infer(inference), call.done, self._loop)

    def _cancel(self, envelope: Envelope) -> None:
        call = self._calls.get(envelope.id)
        if call is not None and call.driven is not None:
            call.driven.cancel()
        elif self._queue.pop(envelope.id, None) is not None:
            self._send(cancelled_text(envelope.id))

    def _subscribe(self, envelope: Envelope) -> None:
        self._subscriptions.add_model(self._identified(), envelope.model)
        self._owner.watch()

    def _subscribe_job(self, envelope: Envelope) -> None:
        self._subscriptions.add_job(self._identified(), envelope.job)

    def _unsubscribe(self, envelope: Envelope) -> None:
        self._subscriptions.remove(envelope.model, envelope.job)

    def _unknown(self, envelope: Envelope) -> None:
        raise InvalidRequest(f"op {envelope.op!r} is not known")

    def _ping(self, envelope: Envelope) -> None:
        self._send(news_text("pong", id=envelope.id))

    def _identified(self) -> Caller:
        """The caller, asked for again when the credential may no longer hold. Raises Unauthenticated."""
        access = self._plane.access
        if access.revision != self._revision or not self._caller.is_current:
            revision = access.revision
            self._caller = access.identify(self._peer, self._authorization)
            self._revision = revision
        return self._caller

    # --- answers out -----------------------------------------------------------------------------------------------------

    def answered(self, call: _Call, answer: InferResponse | None, error: BaseException | None) -> None:
        """A call has ended; it counts no longer."""
        self._calls.pop(call.request_id, None)
        if self._lost:
            return
        if answer is not None:
            try:
                body, header_length = encode_response(answer, call.form, call.inner_id)
            except Exception as failed:  # noqa: BLE001 - told to the caller below
                error = failed
            else:
                if call.binary or header_length is not None:
                    self._send(answer_binary(call.request_id, body, header_length, answer.trace), binary=True)
                else:
                    self._send(answer_text(call.request_id, body, answer.trace))
        if error is not None:
            self._send(_refusal(call.request_id, error))
        if self._queue or self._draining:
            self._continue_soon()

    def _continue_soon(self) -> None:
        if not self._continue_due:
            self._continue_due = True
            self._loop.call_soon(self._continue)

    def _continue(self) -> None:
        """Start what waits, as far as there is room and one turn of the loop allows."""
        self._continue_due = False
        left = self._limits.turn
        while self._queue and self._writable and not self._lost and len(self._calls) < self._limits.in_flight:
            if not left:
                self._continue_soon()
                break
            left -= 1
            request_id, (envelope, body, binary) = self._queue.popitem(last=False)
            try:
                self._start(envelope, body, binary)
            except Exception as error:  # noqa: BLE001 - told to the caller
                self._refuse(request_id, error)
        if self._draining and not self._calls and not self._queue:
            self._close(GOING_AWAY, "this server is closing")
        self._balance()

    def _refuse(self, request_id: str, error: Exception) -> None:
        if isinstance(error, Unauthenticated):
            self._close(UNIDENTIFIED, str(error))
            return
        self._send(_refusal(request_id, error))
        self._invalid = self._invalid + 1 if isinstance(error, (InvalidRequest, TooLarge)) else 0
        if self._invalid >= self._limits.invalid_messages:
            self._close(POLICY, f"{self._invalid} messages in a row could not be read")

    def tell_versions(self, model: str | None = None) -> None:
        """Push the versions of a model, None = of all, that are not those told last."""
        if not self._writable:
            return
        if model is None:
            self._subscriptions.tell_all(self._caller)
        else:
            self._subscriptions.tell(self._caller, model)

    def _send(self, message: bytes, *, binary: bool = False) -> None:
        if self._lost or not self._frames.is_open:
            return
        if binary:
            self._frames.binary(message)
        else:
            self._frames.text(message)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        out = self._frames.take()
        if not out or self._lost or self._transport.is_closing():
            return
        ended = out[-1] == END
        self._transport.write(b"".join(out))
        if ended:
            self._end()
        elif self._transport.get_write_buffer_size() > self._limits.outgoing_bytes:
            log.warning("a WebSocket client left %d bytes unread: cut off", self._limits.outgoing_bytes)
            self._transport.abort()

    def _balance(self) -> None:
        wanted = self._writable and not self._queue and not self._turn_due
        if wanted != self._reading and not self._lost and not self._transport.is_closing():
            self._reading = wanted
            if wanted:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    # --- time and the end ------------------------------------------------------------------------------------------------

    def check_time(self) -> None:
        """Called once a second by the sweep."""
        now, limits = self._owner.clock(), self._limits
        if not self._writable and now - self._blocked > limits.write_seconds:
            self._transport.abort()
        elif self._closing is not None:
            if now - self._closing > limits.pong_seconds:
                self._transport.abort()
        elif not self._reading:
            self._pinged, self._framed = None, now  # it is our turn
        elif self._pinged is not None:
            # A frame that is still arriving holds up the pong behind it.
            arriving = self._heard > self._pinged and now - self._framed <= limits.message_seconds
            if now - self._pinged > limits.pong_seconds and not arriving:
                self._transport.abort()
        elif now - self._framed >= limits.ping_seconds and self._frames.is_open:
            self._pinged = now
            self._frames.ping()
            self._flush()

    def check_caller(self) -> None:
        """End the session of a caller whose credential does not hold any more."""
        try:
            self._identified()
        except Unauthenticated as error:
            self._close(UNIDENTIFIED, str(error))
        except TierlineError as error:
            log.debug("a WebSocket caller will be identified later: %s", error)

    def drain(self) -> None:
        """Take no more requests, answer those taken, close."""
        self._draining = True
        self._continue()

    def abort(self) -> None:
        self._transport.abort()

    def _close(self, code: int, reason: str) -> None:
        if self._closing is None:
            self._closing = self._owner.clock()
            self._frames.close(code, reason.encode()[:120].decode(errors="ignore"))  # 123 fit a control frame
            self._drop_work()
            self._flush()

    def _end(self) -> None:
        self._closing = self._owner.clock()
        self._drop_work()
        # Closing at once could destroy the close frame on its way to a client that is still sending.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _drop_unread(self) -> None:
        self._unread.clear()
        self._events = iter(())

    def _drop_work(self) -> None:
        self._queue.clear()
        for call in tuple(self._calls.values()):
            if call.driven is not None:
                call.driven.cancel()
        self._subscriptions.clear()


_ACTS: Mapping[str, Callable[[Session, Envelope], None]] = {
    "cancel": Session._cancel,
    "subscribe": Session._subscribe,
    "subscribe_job": Session._subscribe_job,
    "unsubscribe": Session._unsubscribe,
    "ping": Session._ping,
}


def _refusal(request_id: str, error: BaseException) -> bytes:
    if isinstance(error, asyncio.CancelledError):
        return cancelled_text(request_id)
    if isinstance(error, TierlineError):
        if error.http >= 500 and not isinstance(error, TryAgain):
            log.error("an inference failed", exc_info=error)
        return error_text(request_id, error)
    log.error("an inference failed unexpectedly", exc_info=error)
    return error_text(request_id, TierlineError("internal error"))
