"""Questions from the hub to a node, and their answers: `down/rpc` -> `up/rpc`. For looking only.

Neither is signed. A question can do nothing: `METHODS` is short and fixed, none of them changes anything, one runs at a time
and each is bounded in time and size. Only the hub's own user may write on `down/`, and only it can read `up/`; whoever took
the broker over would learn what a node's doctor says, which holds no secret. What changes a node stays in signed documents.

Sent at QoS 0: a node that is away must not find old questions when it comes back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Self
from uuid import uuid4

import msgspec

from sync.channel import LinkLike
from sync.clock import Clock
from sync.errors import Malformed, Refused, Unavailable
from sync.messages import MAX_MESSAGE_BYTES, decode, encode
from sync.topics import down, up

METHODS = ("doctor",)
"""All that may be asked. Whoever adds one has made sure that it changes nothing and tells no secret."""
MAX_SECONDS = 60.0
"""How long a question may wait for its answer, and how old it may be when it arrives."""
MAX_CALL_BYTES = 4096
MAX_ID = 64
MAX_ERROR = 500
MAX_WAITING = 64
"""Questions a hub waits for at once."""
REMEMBERED = 64
"""Ids a node has answered: MQTT may deliver a message twice."""

log = logging.getLogger(__name__)

Method = Callable[[], Awaitable[object]]


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """`sent`: Unix seconds by the hub's clock. `seconds`: how long the hub waits."""

    v: int = 1
    id: str
    method: str
    sent: float
    seconds: float


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`result` when `code` is empty, else `error` says why there is none."""

    v: int = 1
    id: str
    result: msgspec.Raw = msgspec.Raw(b"null")
    code: str = ""
    error: str = ""


class CallRefused(Refused):
    """The node would not or could not answer; `code` is its own."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Answerer:
    """A node's side, until the block ends. In the event loop; `hear` is what takes payloads of `down/rpc`."""

    def __init__(self, link: LinkLike, node_id: str, clock: Clock) -> None:
        self._link = link
        self._topic = up(node_id, "rpc")
        self._clock = clock
        self._methods: dict[str, Method] = {}
        self._answered: deque[str] = deque(maxlen=REMEMBERED)
        self._task: asyncio.Task[None] | None = None

    def offer(self, name: str, method: Method) -> None:
        """Answer questions of that name. Raises ValueError for one that is not in `METHODS`."""
        if name not in METHODS:
            raise ValueError(f"{name!r} is none of {METHODS}")
        self._methods[name] = method

    def hear(self, payload: bytes) -> None:
        """Raises Malformed; everything else is answered."""
        call = decode(payload, Call, MAX_CALL_BYTES)
        if not 0 < len(call.id) <= MAX_ID or not 0 < call.seconds <= MAX_SECONDS:
            raise Malformed(f"Call: an id of 1-{MAX_ID} characters and 0 to {MAX_SECONDS:g} seconds are needed")
        if call.id in self._answered:
            return
        self._answered.append(call.id)
        age = self._clock.wall() - call.sent
        method = self._methods.get(call.method) if call.method in METHODS else None
        if abs(age) > MAX_SECONDS:
            # This is often what a doctor is asked for: so it is told, not kept silent.
            self._refuse(
                call, "expired", f"by this node's clock the question was sent {age:.0f} s ago: the clocks differ"
            )
        elif method is None:
            self._refuse(call, "unknown_method", f"this node answers no {call.method[:40]!r}")
        elif self._task is not None and not self._task.done():
            self._refuse(call, "busy", "this node is answering another question: ask again in a minute")
        else:
            self._task = asyncio.create_task(self._answer(call, method), name=f"rpc {call.method}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Break off what is being answered."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=1.0)

    async def _answer(self, call: Call, method: Method) -> None:
        try:
            async with asyncio.timeout(call.seconds):
                result = msgspec.json.encode(await method())
        except TimeoutError:
            self._refuse(call, "late", f"no answer within {call.seconds:g} s")
            return
        except Exception as error:
            log.exception("a question of the hub could not be answered")
            self._refuse(call, "failed", f"{type(error).__name__} on the node: see its log")
            return
        answer = encode(Answer(id=call.id, result=msgspec.Raw(result)))
        if len(answer) > MAX_MESSAGE_BYTES:
            self._refuse(call, "too_large", f"the answer has {len(answer)} bytes, at most {MAX_MESSAGE_BYTES} are sent")
            return
        self._link.publish(self._topic, answer)

    def _refuse(self, call: Call, code: str, text: str) -> None:
        self._link.publish(self._topic, encode(Answer(id=call.id, code=code, error=text[:MAX_ERROR])))


class Asker:
    """The hub's side. In the event loop; `hear` is what takes payloads of `up/rpc`."""

    def __init__(self, link: LinkLike, clock: Clock) -> None:
        self._link = link
        self._clock = clock
        self._waiting: dict[tuple[str, str], asyncio.Future[Answer]] = {}

    async def ask(self, node_id: str, method: str, seconds: float) -> bytes:
        """The result as JSON. Raises Unavailable without an answer, CallRefused with the node's reason.

        Raises ValueError for what may not be asked.
        """
        if method not in METHODS or not 0 < seconds <= MAX_SECONDS:
            raise ValueError(f"{method!r} within {seconds:g} s may not be asked")
        if not self._link.connected:
            raise Unavailable("the hub is not connected to its broker")
        if len(self._waiting) >= MAX_WAITING:
            raise Unavailable(f"{MAX_WAITING} questions wait for their answers already")
        call = Call(id=uuid4().hex, method=method, sent=self._clock.wall(), seconds=seconds)
        key = node_id, call.id
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        try:
            self._link.publish(down(node_id, "rpc"), encode(call), qos=0)
            answer = await self._within(future, seconds)
        finally:
            del self._waiting[key]
        if answer is None:
            raise Unavailable(f"{node_id} did not answer within {seconds:g} s")
        if answer.code:
            raise CallRefused(answer.code[:40], f"{node_id}: {answer.error[:MAX_ERROR]}")
        return bytes(answer.result)

    def hear(self, node_id: str, payload: bytes) -> None:
        """An answer counts for the node that was asked, once. Raises Malformed."""
        answer = decode(payload, Answer)
        future = self._waiting.get((node_id, answer.id))
        if future is not None and not future.done():
            future.set_result(answer)

    async def _within(self, future: asyncio.Future[Answer], seconds: float) -> Answer | None:
        timer = asyncio.ensure_future(self._clock.sleep(seconds))
        both: set[asyncio.Future[Any]] = {future, timer}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
        return future.result() if future.done() else None
