"""A session without a socket: order, back-pressure, time, identity, news, and an end that is said."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, ClassVar, cast

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from models.errors import DeadlineExceeded, Forbidden, MethodNotAllowed, NotFound, NotReady, Overloaded, Unauthenticated
from models.serving.caller import Caller, Peer
from models.serving.exchange import HttpHead, HttpRequest, HttpResponse, Upgrade
from models.serving.index import ModelDescription
from models.serving.plane import DataPlane
from models.serving.predictor import InferRequest, InferResponse
from models.serving.websocket.limits import WebSocketLimits
from models.serving.websocket.server import WebSockets
from models.serving.websocket.session import Session

KEY = base64.b64encode(bytes(16))
HEADERS = {
    b"host": b"h",
    b"connection": b"Upgrade",
    b"upgrade": b"websocket",
    b"sec-websocket-key": KEY,
    b"sec-websocket-version": b"13",
}
REQUEST = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}


class Gated:
    """Answers with its input when `release` says so, at once when there is no gate."""

    def __init__(self) -> None:
        self.seen: list[InferRequest] = []
        self.gate: asyncio.Event | None = None
        self.cancelled: list[str] = []

    async def infer(self, request: InferRequest) -> InferResponse:
        self.seen.append(request)
        if request.model == "bug":
            raise KeyError("a secret")
        if request.model == "late":
            raise DeadlineExceeded("too late")
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.append(request.model)
                raise
        return InferResponse(outputs=request.inputs, model=request.model, package="p", version="1", tier="edge")


class Index:
    def __init__(self) -> None:
        self.versions: dict[str, tuple[str, ...]] = {"m": ("1",), "n": ("1",)}

    def names(self) -> list[str]:
        return sorted(self.versions)

    def describe(self, model: str, version: str | None) -> ModelDescription:
        if model not in self.versions:
            raise NotFound(f"model '{model}' is not served here")
        return ModelDescription(model, "p", self.versions[model], "onnx_fp32", (), ())

    def is_ready(self, model: str, version: str | None) -> bool:
        return True


class Tokens:
    def __init__(self) -> None:
        self.revision = 0
        self.refuses = False
        self.asked: list[bytes | None] = []

    def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
        self.asked.append(authorization)
        if self.refuses:
            raise Unauthenticated("the token has expired")
        return Caller(client="c", tenant="t")

    def may_use(self, caller: Caller, model: str) -> bool:
        return model != "hidden"


class Watched:
    """A control that can only be watched."""

    def __init__(self) -> None:
        self.changed: Callable[[str], None] | None = None

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        self.changed = changed

        def stop() -> None:
            self.changed = None

        return stop


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.unread = 0
        self.reading = True
        self.ended = self.aborted = self.closed = False

    def write(self, data: Any) -> None:
        assert not self.ended
        self.sent.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return self.unread

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.aborted = self.closed = True


class Setting:
    """A server's half and a client's, joined by hand."""

    made: ClassVar[list[Setting]] = []

    def __init__(self, *, access: Any = None, control: Any = None, jobs: Any = None, **limits: Any) -> None:
        self.predictor, self.index, self.access, self.now = Gated(), Index(), access or Tokens(), 100.0
        plane = DataPlane(self.predictor, self.index, ready=lambda: True, access=self.access, control=control)
        self.server = WebSockets(plane, jobs=jobs, limits=WebSocketLimits(**limits), clock=lambda: self.now)
        self.made.append(self)

    async def open(self, **headers: bytes) -> Client:
        head = HttpHead("GET", "/v2/ws", "", HEADERS | {name.encode(): value for name, value in headers.items()})
        response = await self.server(HttpRequest(head))
        assert isinstance(response.body, Upgrade)
        session = cast(Session, response.body.start())
        return Client(self, session)


class Client:
    def __init__(self, setting: Setting, session: Session) -> None:
        self.setting = setting
        self.session = session
        self.transport = FakeTransport()
        self.protocol = ClientProtocol(parse_uri("ws://h/v2/ws"), state=State.OPEN, max_size=None)
        session.connection_made(self.transport)

    def text(self, **envelope: Any) -> None:
        self.protocol.send_text(json.dumps(envelope).encode())
        self.push()

    def infer(self, request_id: str, model: str = "m", **more: Any) -> None:
        self.text(op="infer", id=request_id, model=model, request=REQUEST, **more)

    def push(self) -> None:
        self.session.data_received(b"".join(self.protocol.data_to_send()))

    def frames(self) -> list[Frame]:
        data, self.transport.sent = b"".join(self.transport.sent), []
        if data:
            self.protocol.receive_data(data)
        return cast(list[Frame], self.protocol.events_received())

    async def messages(self) -> list[Any]:
        for _ in range(6):
            await asyncio.sleep(0)
        return [json.loads(bytes(frame.data)) for frame in self.frames() if frame.opcode is Opcode.TEXT]

    async def close_code(self) -> int | None:
        for _ in range(6):
            await asyncio.sleep(0)
        for frame in self.frames():
            if frame.opcode is Opcode.CLOSE:
                return int.from_bytes(bytes(frame.data)[:2], "big")
        return None


@pytest.fixture(autouse=True)
async def _nothing_is_left() -> AsyncIterator[None]:
    yield
    while Setting.made:
        for session in tuple(Setting.made.pop().server.sessions):
            session.connection_lost(None)
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_a_request_is_answered_with_its_id_and_the_callers_name() -> None:
    setting = Setting()
    client = await setting.open(authorization=b"Bearer x")
    client.infer("ä", version="7", deadline_ms=500, traceparent="00-1")
    (answer,) = await client.messages()
    assert (answer["op"], answer["id"]) == ("answer", "ä")
    assert answer["response"]["outputs"] == [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}]
    (seen,) = setting.predictor.seen
    assert (seen.version, seen.deadline, seen.tenant, seen.client, seen.trace) == ("7", 100.5, "t", "c", "00-1")
    assert setting.access.asked == [b"Bearer x"]


async def test_a_binary_request_gets_a_binary_answer() -> None:
    client = await Setting().open()
    head = (
        b'{"inputs":[{"name":"x","datatype":"UINT8","shape":[2],"parameters":{"binary_data_size":2}}],'
        b'"parameters":{"binary_data_output":true}}'
    )
    envelope = b'{"op":"infer","id":"1","model":"m","header_length":%d}' % len(head)
    client.protocol.send_binary(struct.pack("<I", len(envelope)) + envelope + head + b"\1\2")
    client.push()
    await asyncio.sleep(0)
    (frame,) = client.frames()
    data = bytes(frame.data)
    (length,) = struct.unpack_from("<I", data)
    answer = json.loads(data[4 : 4 + length])
    assert frame.opcode is Opcode.BINARY
    assert (answer["op"], answer["id"]) == ("answer", "1")
    assert json.loads(data[4 + length :][: answer["header_length"]])["outputs"][0]["shape"] == [2]
    assert data.endswith(b"\1\2")


@pytest.mark.parametrize(
    ("envelope", "status", "words"),
    [
        ({"op": "infer", "model": "m", "request": REQUEST}, 400, "id is missing"),
        ({"op": "infer", "id": "1", "model": "hidden", "request": REQUEST}, 404, "hidden"),
        ({"op": "infer", "id": "1", "model": "late", "request": REQUEST}, 504, "too late"),
        ({"op": "infer", "id": "1", "model": "bug", "request": REQUEST}, 500, "internal error"),
        ({"op": "infer", "id": "1", "model": "m"}, 400, "not valid"),
        ({"op": "infer", "id": "1", "model": "m", "request": {"inputs": 1}}, 400, "inputs"),
        ({"op": "infer", "id": "1", "model": 1}, 400, "model"),
        ({"op": "dance", "id": "1"}, 400, "dance"),
        ({"op": "subscribe", "id": "1", "model": "none"}, 404, "none"),
        ({"op": "subscribe", "id": "1", "model": "hidden"}, 404, "hidden"),
        ({"op": "subscribe_job", "id": "1", "job": "j"}, 404, "jobs"),
    ],
)
async def test_a_message_that_cannot_be_served_is_refused_alone(
    envelope: dict[str, Any], status: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = await Setting().open()
    with caplog.at_level(logging.CRITICAL):
        client.text(**envelope)
        (answer,) = await client.messages()
    assert (answer["op"], answer["id"], answer["status"]) == ("error", envelope.get("id"), status)
    assert words in answer["error"]
    client.infer("2")
    assert [each["op"] for each in await client.messages()] == ["answer"]


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([Frame(Opcode.TEXT, b"\xff")], 1007),
        ([Frame(Opcode.TEXT, b"", fin=False)] * 2, 1002),
        ([Frame(Opcode.CONT, b"x")], 1002),
        ([b"\xc1\x80\0\0\0\0"], 1002),  # a reserved bit: compressed, as was never agreed
        ([b"\x81\x00"], 1002),  # not masked
        ([Frame(Opcode.BINARY, b"x" * 101)], 1009),
        ([Frame(Opcode.BINARY, b"x" * 60, fin=False), Frame(Opcode.CONT, b"x" * 60)], 1009),
        ([Frame(Opcode.TEXT, b"", fin=False)] + [Frame(Opcode.CONT, b"", fin=False)] * 8, 1009),
    ],
)
async def test_what_breaks_the_protocol_ends_the_session(frames: list[Frame | bytes], code: int) -> None:
    setting = Setting(message_bytes=100, message_frames=8)
    client = await setting.open()
    client.session.data_received(
        b"".join(frame if isinstance(frame, bytes) else frame.serialize(mask=True) for frame in frames)
    )
    assert await client.close_code() == code
    assert client.transport.ended
    client.session.data_received(Frame(Opcode.TEXT, b"{}").serialize(mask=True))  # no more is said to it
    assert client.frames() == []
    setting.now += 21
    setting.server.sweep()
    assert client.transport.aborted


async def test_a_message_in_pieces_is_one_message() -> None:
    client = await Setting().open()
    message = json.dumps({"op": "infer", "id": "1", "model": "m", "request": REQUEST}).encode()
    wire = b"".join(
        frame.serialize(mask=True)
        for frame in (
            Frame(Opcode.TEXT, message[:9], fin=False),
            Frame(Opcode.PING, b"p"),
            Frame(Opcode.CONT, b"", fin=False),
            Frame(Opcode.CONT, message[9:]),
        )
    )
    for index in range(len(wire)):
        client.session.data_received(wire[index : index + 1])
    await asyncio.sleep(0)
    assert [frame.opcode for frame in client.frames()] == [Opcode.PONG, Opcode.TEXT]


async def test_reading_stops_while_too_many_requests_are_in_work() -> None:
    setting = Setting(in_flight=2)
    client = await setting.open()
    setting.predictor.gate = asyncio.Event()
    for number in range(2):
        client.infer(str(number))
    assert client.transport.reading
    for number in range(2, 5):
        client.infer(str(number))
    assert not client.transport.reading
    assert len(setting.predictor.seen) == 2
    setting.predictor.gate.set()
    answers = await client.messages()
    assert sorted(each["id"] for each in answers) == ["0", "1", "2", "3", "4"]
    assert client.transport.reading


def many(count: int, **envelope: Any) -> bytes:
    """So many messages, as one read of a socket may bring them; `id` is added."""
    messages = (json.dumps({**envelope, "id": str(number)}).encode() for number in range(count))
    return b"".join(Frame(Opcode.TEXT, message).serialize(mask=True) for message in messages)


MESSAGES = {
    "answered at once": (many(300, op="infer", model="m", request=REQUEST), "answer", 300),
    "refused": (many(300, op="subscribe", model="none"), "error", 300),
    "said back": (many(300, op="ping"), "pong", 300),
    "unanswered": (many(300, op="cancel") + many(1, op="ping"), "pong", 1),
    "pings": (Frame(Opcode.PING, b"").serialize(mask=True) * 3000 + many(1, op="ping"), "pong", 1),
    "pieces": (
        Frame(Opcode.TEXT, b"", fin=False).serialize(mask=True)
        + Frame(Opcode.CONT, b"", fin=False).serialize(mask=True) * 900
        + Frame(Opcode.CONT, b'{"op":"ping"}').serialize(mask=True),
        "pong",
        1,
    ),
}


@pytest.mark.parametrize("kind", MESSAGES)
async def test_others_have_their_turn_while_one_client_sends_much(kind: str) -> None:
    data, op, count = MESSAGES[kind]
    setting = Setting()
    client, other = await setting.open(), await setting.open()
    taken: list[int] = []
    take = client.session._take

    def counted(is_text: bool | None, message: bytes | None) -> None:
        taken[-1] += 1
        take(is_text, message)

    client.session._take = counted  # type: ignore[method-assign]
    taken.append(0)
    client.session.data_received(data)
    assert not client.transport.reading
    other.text(op="ping", id="in between")
    while not client.transport.reading:
        taken.append(0)
        await asyncio.sleep(0)
    assert max(taken) <= setting.server.limits.turn
    assert [each["id"] for each in await other.messages()] == ["in between"]
    assert [each["op"] for each in await client.messages()] == [op] * count


async def test_requests_that_waited_are_not_all_begun_in_one_turn() -> None:
    setting = Setting()
    client = await setting.open()
    client.session.pause_writing()
    client.session.data_received(many(200, op="infer", model="m", request=REQUEST))
    for _ in range(10):
        await asyncio.sleep(0)
    assert setting.predictor.seen == []
    client.session.resume_writing()
    seen = [0]
    while seen[-1] < 200:
        assert len(setting.predictor.seen) - seen[-1] <= setting.server.limits.turn
        seen.append(len(setting.predictor.seen))
        await asyncio.sleep(0)
    assert len(await client.messages()) == 200


async def test_what_was_not_yet_taken_of_a_client_that_left_is_dropped() -> None:
    setting = Setting()
    for leave in (Session.connection_lost, lambda session, _: session.eof_received()):
        client = await setting.open()
        client.session.data_received(many(200, op="infer", model="m", request=REQUEST))
        began = len(setting.predictor.seen)
        leave(client.session, None)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(setting.predictor.seen) == began


async def test_messages_that_cannot_be_read_end_the_session_when_they_go_on() -> None:
    setting = Setting(invalid_messages=3)
    client = await setting.open()
    for _ in range(3):
        client.text(op="dance")
        client.text(op="dance")
        client.text(op="ping")
    assert len(await client.messages()) == 9
    for _ in range(3):
        client.protocol.send_text(b"")
    client.push()
    client.session.data_received(many(1, op="infer", model="m", request=REQUEST))
    assert await client.close_code() == 1008
    assert setting.predictor.seen == []


async def test_no_version_may_be_said_as_an_empty_one() -> None:
    setting = Setting()
    client = await setting.open()
    client.infer("1", version="")
    await client.messages()
    assert setting.predictor.seen[0].version is None


async def test_access_that_is_busy_does_not_end_a_session() -> None:
    class Busy(Tokens):
        busy = False

        def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
            if self.busy:
                raise Overloaded("too many wrong credentials")
            return super().identify(peer, authorization)

    access = Busy()
    setting = Setting(access=access)
    client = await setting.open()
    access.busy, access.revision = True, 1
    setting.server.sweep()
    client.infer("1")
    assert [each["status"] for each in await client.messages()] == [429]
    access.busy = False
    client.infer("2")
    assert [each["op"] for each in await client.messages()] == ["answer"]


async def test_an_id_in_work_is_not_taken_twice() -> None:
    setting = Setting(in_flight=1)
    client = await setting.open()
    setting.predictor.gate = asyncio.Event()
    for request_id in ("1", "1", "2", "2"):
        client.infer(request_id)
    refused = await client.messages()
    assert [(each["id"], each["status"]) for each in refused] == [("1", 409), ("2", 409)]
    setting.predictor.gate.set()
    assert [each["op"] for each in await client.messages()] == ["answer", "answer"]
    client.infer("1")
    assert [each["op"] for each in await client.messages()] == ["answer"]


async def test_a_request_is_taken_back_in_work_and_while_it_waits() -> None:
    setting = Setting(in_flight=1)
    client = await setting.open()
    setting.predictor.gate = asyncio.Event()
    client.infer("1")
    client.infer("2", "n")
    for request_id in ("2", "1", "unknown"):
        client.text(op="cancel", id=request_id)
    answers = await client.messages()
    assert [(each["id"], each["status"]) for each in answers] == [("2", 499), ("1", 499)]
    assert setting.predictor.cancelled == ["m"]
    assert client.transport.reading


async def test_a_client_that_does_not_read_is_not_read_and_then_cut_off() -> None:
    setting = Setting()
    client = await setting.open()
    client.session.pause_writing()
    assert not client.transport.reading
    client.infer("1")
    assert not setting.predictor.seen
    setting.now += 29
    setting.server.sweep()
    client.session.resume_writing()
    assert [each["op"] for each in await client.messages()] == ["answer"]
    assert client.transport.reading
    client.session.pause_writing()
    setting.now += 31
    setting.server.sweep()
    assert client.transport.aborted


async def test_what_waits_to_be_read_is_bounded() -> None:
    client = await Setting(outgoing_bytes=1000).open()
    client.transport.unread = 1001
    client.infer("1")
    await client.messages()
    assert client.transport.aborted


async def test_a_silent_client_is_pinged_and_cut_off_without_a_pong() -> None:
    setting = Setting()
    client, silent = await setting.open(), await setting.open()
    setting.now += 19
    setting.server.sweep()
    assert client.frames() == []
    setting.now += 1
    setting.server.sweep()
    assert [frame.opcode for frame in client.frames()] == [Opcode.PING]
    client.push()  # its pong
    setting.now += 21
    setting.server.sweep()
    assert silent.transport.aborted
    assert not client.transport.aborted


async def test_a_frame_may_take_its_time_but_not_for_ever() -> None:
    setting = Setting()
    client = await setting.open()
    client.session.data_received(b"\x81")
    for _ in range(5):
        setting.now += 12
        client.session.data_received(b"\xfe" if _ == 0 else b"\x01")
        setting.server.sweep()
    assert not client.transport.aborted
    setting.now += 12
    client.session.data_received(b"\x01")
    setting.server.sweep()
    assert client.transport.aborted


async def test_a_client_that_waits_for_us_is_not_blamed() -> None:
    setting = Setting(in_flight=1)
    client = await setting.open()
    setting.predictor.gate = asyncio.Event()
    client.infer("1")
    client.infer("2")
    for _ in range(100):
        setting.now += 1
        setting.server.sweep()
    assert not client.transport.aborted


@pytest.mark.parametrize("by", ["expiry", "revocation"])
async def test_a_caller_whose_credential_ends_is_shut_out(by: str) -> None:
    class Expiring(Tokens):
        def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
            super().identify(peer, authorization)
            return Caller(expires=0.0 if by == "expiry" else float("inf"))

    setting = Setting(access=Expiring())
    client, other = await setting.open(), await setting.open()
    setting.predictor.gate = asyncio.Event()
    client.infer("1")
    setting.access.refuses = True
    setting.access.revision += by == "revocation"
    other.infer("1")
    assert await other.close_code() == 4401
    setting.server.sweep()
    assert await client.close_code() == 4401
    assert len(setting.predictor.cancelled) == 1


async def test_a_caller_is_asked_for_again_only_when_that_may_matter() -> None:
    setting = Setting()
    client = await setting.open(authorization=b"a")
    for number in range(3):
        client.infer(str(number))
        setting.server.sweep()
    assert len(setting.access.asked) == 1
    setting.access.revision += 1
    setting.server.sweep()
    assert setting.access.asked == [b"a", b"a"]


async def test_other_versions_are_told_when_the_control_says_so() -> None:
    control = Watched()
    setting = Setting(control=control)
    client, other = await setting.open(), await setting.open()
    client.text(op="subscribe", model="m")
    other.text(op="subscribe", model="n")
    assert await client.messages() == [{"op": "model", "model": "m", "versions": ["1"]}]
    await other.messages()
    setting.index.versions["m"] = ("1", "2")
    assert control.changed is not None
    control.changed("m")
    control.changed("m")
    assert await client.messages() == [{"op": "model", "model": "m", "versions": ["1", "2"]}]
    assert await other.messages() == []
    del setting.index.versions["m"]
    client.session.pause_writing()
    control.changed("m")
    assert await client.messages() == []
    client.session.resume_writing()
    assert await client.messages() == [{"op": "model", "model": "m", "versions": []}]
    client.text(op="unsubscribe", model="m")
    setting.index.versions["m"] = ("9",)
    control.changed("m")
    assert await client.messages() == []
    await setting.server.close(0)
    assert control.changed is None


async def test_without_a_control_the_sweep_notices() -> None:
    setting = Setting()
    client = await setting.open()
    client.text(op="subscribe", model="m")
    await client.messages()
    setting.index.versions["m"] = ("2",)
    setting.server.sweep()
    assert await client.messages() == [{"op": "model", "model": "m", "versions": ["2"]}]


async def test_subscriptions_are_bounded() -> None:
    client = await Setting(subscriptions=1).open()
    for model in ("m", "m", "n"):
        client.text(op="subscribe", model=model, id=model)
    assert [each["op"] for each in await client.messages()] == ["model", "model", "error"]
    client.text(op="unsubscribe", model="m")
    client.text(op="subscribe", model="n")
    assert [each["op"] for each in await client.messages()] == ["model"]


async def test_what_becomes_of_a_job_is_told_unless_the_client_leaves() -> None:
    notify: list[Any] = []

    def feed(caller: Caller, job: str, told: Callable[[Mapping[str, Any]], None]) -> Callable[[], None]:
        if job != "j":
            raise NotFound("no such job")
        notify.append((caller.client, told))
        return notify.clear

    setting = Setting(jobs=feed)
    client = await setting.open()
    for job in ("j", "j", "k"):
        client.text(op="subscribe_job", job=job)
    assert [each["status"] for each in await client.messages()] == [404]
    ((name, told),) = notify
    assert name == "c"
    told({"status": "done"})
    assert await client.messages() == [{"op": "job", "job": "j", "event": {"status": "done"}}]
    client.text(op="subscribe_job", job="j")
    client.session.connection_lost(None)
    assert notify == []
    told({"status": "late"})


@pytest.mark.parametrize("event", [{"status": "succeeded"}, {"status": 404, "error": "there is no job"}])
async def test_a_job_that_was_told_of_makes_room_for_another(event: dict[str, Any]) -> None:
    told: list[Callable[[Mapping[str, Any]], None]] = []

    def feed(caller: Caller, job: str, notify: Callable[[Mapping[str, Any]], None]) -> Callable[[], None]:
        told.append(notify)
        return lambda: None

    client = await Setting(jobs=feed, subscriptions=2).open()
    for number in range(10):
        client.text(op="subscribe_job", job=str(number))
        told[-1](event)
    assert [each["op"] for each in await client.messages()] == ["job"] * 10
    for number in range(3):
        client.text(op="subscribe_job", job=str(number))
    assert [each["status"] for each in await client.messages()] == [429]


async def test_a_ping_in_json_is_for_clients_that_have_no_other() -> None:
    client = await Setting().open()
    client.text(op="ping", id="7")
    assert await client.messages() == [{"op": "pong", "id": "7"}]


async def test_work_of_a_client_that_left_is_dropped() -> None:
    setting = Setting()
    client = await setting.open()
    setting.predictor.gate = asyncio.Event()
    client.infer("1")
    await asyncio.sleep(0)
    assert setting.server.connections == 1
    client.session.connection_lost(None)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert setting.predictor.cancelled == ["m"]
    assert setting.server.connections == 0


async def test_closing_by_the_client_is_answered() -> None:
    client = await Setting().open()
    client.protocol.send_close(1000)
    client.push()
    assert await client.close_code() == 1000
    assert client.transport.ended
    assert client.session.eof_received() is False


async def test_a_closing_server_answers_what_it_took_and_says_goodbye() -> None:
    setting = Setting()
    busy, idle = await setting.open(), await setting.open()
    setting.predictor.gate = asyncio.Event()
    busy.infer("1")
    closing = asyncio.ensure_future(setting.server.close(5))
    assert await idle.close_code() == 1001
    busy.infer("2")
    assert [each["status"] for each in await busy.messages()] == [503]
    setting.predictor.gate.set()
    assert [each["id"] for each in await busy.messages()] == ["1"]
    with pytest.raises(NotReady):
        await setting.server(HttpRequest(HttpHead("GET", "/v2/ws", "", HEADERS)))
    for client in (busy, idle):
        client.session.connection_lost(None)
    await asyncio.wait_for(closing, 5)
    assert not busy.transport.aborted


async def test_closing_ends_those_that_do_not_end() -> None:
    setting = Setting()
    client = await setting.open()
    setting.predictor.gate = asyncio.Event()
    client.infer("1")
    await setting.server.close(0)
    assert client.transport.aborted


# --- the handshake -----------------------------------------------------------------------------------------------------


async def shake(server: WebSockets, method: str = "GET", **changes: bytes | None) -> HttpResponse:
    headers = dict(HEADERS)
    for name, value in changes.items():
        key = name.replace("_", "-").encode()
        headers.pop(key, None)
        if value is not None:
            headers[key] = value
    return await server(HttpRequest(HttpHead(method, "/v2/ws", "", headers)))


async def test_the_handshake_is_that_of_the_standard() -> None:
    server = Setting().server
    # RFC 6455 1.3 works this example out.
    answer = await shake(
        server, sec_websocket_key=b"dGhlIHNhbXBsZSBub25jZQ==", sec_websocket_extensions=b"permessage-deflate"
    )
    assert answer.status == 101
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in answer.headers
    assert b"xtensions" not in answer.headers
    assert b"rotocol" not in answer.headers
    chosen = await shake(server, sec_websocket_protocol=b"other, tierline.v2")
    assert b"Sec-WebSocket-Protocol: tierline.v2\r\n" in chosen.headers


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"upgrade": None}, 426),
        ({"connection": None}, 426),
        ({"upgrade": b"h2c"}, 426),
        ({"sec_websocket_key": None}, 400),
        ({"sec_websocket_key": b"short"}, 400),
        ({"sec_websocket_version": b"8"}, 400),
        ({"sec_websocket_protocol": b"other"}, 400),
        ({"connection": b"\xff;;"}, 400),
    ],
)
async def test_a_broken_handshake_is_refused_in_json(changes: dict[str, bytes | None], status: int) -> None:
    answer = await shake(Setting().server, **changes)
    assert answer.status == status
    assert isinstance(answer.body, bytes)
    assert list(json.loads(answer.body)) == ["error"]
    assert (b"upgrade: websocket\r\n" in answer.headers) == (status == 426)


async def test_pages_of_other_origins_cannot_connect() -> None:
    setting = Setting()
    server = WebSockets(setting.server.plane, origins=["https://app.example"])
    assert (await shake(server, origin=b"https://app.example")).status == 101
    for origin in (b"https://evil.example", b"null", b"https://app.example.evil", b"http://app.example", b"\xff"):
        with pytest.raises(Forbidden):
            await shake(server, origin=origin)
    with pytest.raises(Forbidden):
        await shake(setting.server, origin=b"http://h")


async def test_who_may_not_come_in_is_told_before_anything_else() -> None:
    access = Tokens()
    access.refuses = True
    with pytest.raises(Unauthenticated):
        await shake(Setting(access=access).server)
    with pytest.raises(MethodNotAllowed):
        await shake(Setting().server, "POST")


async def test_sessions_are_bounded() -> None:
    setting = Setting(connections=1)
    client = await setting.open()
    with pytest.raises(NotReady):
        await setting.open()
    client.session.connection_lost(None)
    await setting.open()
