"""Who gets a place: strangers none, a caller no more than a share, and nobody for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from models.errors import Overloaded, Unauthenticated
from models.serving.caller import Caller, Peer
from models.serving.grpc import inference_pb2 as pb
from models.serving.grpc import serve_grpc, servicer, stream
from models.serving.grpc.places import Places, who_of
from models.serving.grpc.servicer import SERVICE
from models.serving.grpc.stream import MAX_STREAMS, MAX_STREAMS_PER_CALLER
from models.serving.index import ModelDescription
from models.serving.plane import DataPlane
from models.serving.predictor import InferRequest, InferResponse, Predictor
from models.tensor import TensorSpec
from models.testing import StaticPredictor

SECONDS = 20.0
ANSWER = {"y": np.array([[1.5, 2.5]], np.float32)}
OPEN_CALLS = ("ServerLive", "ServerReady", "ServerMetadata")


class Index:
    def names(self) -> Sequence[str]:
        return ["m"]

    def describe(self, model: str, version: str | None) -> ModelDescription:
        spec = TensorSpec("x", "FP32", (-1, 2))
        return ModelDescription(model, "pack", ("1",), "onnx_fp32", (spec,), (spec,))

    def is_ready(self, model: str, version: str | None) -> bool:
        return True


class Tokens:
    """`Bearer NAME` is who asks, until it is revoked."""

    def __init__(self, *names: str, expires: float = float("inf")) -> None:
        self.names = set(names)
        self.expires = expires
        self.revision = 0
        self.asked = 0

    def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
        self.asked += 1
        name = (authorization or b"").removeprefix(b"Bearer ").decode()
        if name not in self.names:
            raise Unauthenticated("no token that is known")
        return Caller(name, "t", expires=self.expires)

    def revoke(self, name: str) -> None:
        self.names.remove(name)
        self.revision += 1

    def may_use(self, caller: Caller, model: str) -> bool:
        return True


class Gate:
    """Answers once `release` is set."""

    def __init__(self) -> None:
        self.waiting = 0
        self.release = asyncio.Event()

    async def infer(self, request: InferRequest) -> InferResponse:
        self.waiting += 1
        await self.release.wait()
        return InferResponse(outputs=ANSWER, model="m", package="p", version="1", tier="edge", id=request.id)


class Client:
    """Calls that send what they are told to send, and no more."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def begin(self, name: str, token: str | None = None) -> Any:
        """A call of which only the headers are sent."""
        return self._channel.stream_unary(f"/{SERVICE}/{name}")(metadata=_metadata(token), timeout=SECONDS)

    def call(self, name: str, data: bytes, token: str | None = None) -> Any:
        return self._channel.unary_unary(f"/{SERVICE}/{name}")(data, metadata=_metadata(token), timeout=SECONDS)

    def stream(self, token: str | None = None) -> Any:
        made = self._channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer", response_deserializer=pb.ModelStreamInferResponse.FromString
        )
        return made(metadata=_metadata(token), timeout=SECONDS)


def _metadata(token: str | None) -> list[tuple[str, str]]:
    return [] if token is None else [("authorization", f"Bearer {token}")]


@asynccontextmanager
async def serving(predictor: Predictor, access: Tokens | None = None) -> AsyncIterator[Client]:
    plane = DataPlane(predictor, Index(), ready=lambda: True, access=access)
    async with (
        serve_grpc(plane, drain_seconds=0.1) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield Client(channel)


def asking(request_id: str = "") -> bytes:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 2])
    message = pb.ModelInferRequest(model_name="m", id=request_id, inputs=[tensor], raw_input_contents=[bytes(8)])
    return bytes(message.SerializeToString())


async def until(holds: Any) -> None:
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.001)


# --- strangers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ModelInfer", "ModelReady", "RepositoryModelLoad"])
async def test_a_stranger_is_refused_before_a_message_is_waited_for(name: str) -> None:
    async with serving(StaticPredictor(ANSWER), Tokens("alice")) as client:
        assert await client.begin(name).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_strangers_take_no_stream_from_anybody() -> None:
    async with serving(StaticPredictor(ANSWER), Tokens("alice")) as client:
        held = [client.stream() for _ in range(MAX_STREAMS + 8)]
        mine = client.stream("alice")
        await mine.write(asking())
        assert (await mine.read()).error_message == ""
        for each in held:
            assert await each.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x01m", asking()], ids=["broken", "wrong", "right"])
async def test_what_a_stranger_sends_is_not_decoded(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def decode(self: servicer.Servicer, data: bytes) -> Any:
        decoded.append(data)
        raise AssertionError

    monkeypatch.setattr(servicer.Servicer, "decode", decode)
    async with serving(StaticPredictor(ANSWER), Tokens("alice")) as client:
        assert await client.call("ModelInfer", data).code() is grpc.StatusCode.UNAUTHENTICATED
        flow = client.stream()
        assert await flow.code() is grpc.StatusCode.UNAUTHENTICATED
    assert decoded == []


async def test_open_calls_are_answered_without_a_message_and_while_every_place_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servicer, "MAX_CALLS", 2)
    gate = Gate()
    async with serving(gate, Tokens("alice")) as client:
        held = [client.call("ModelInfer", asking(), "alice") for _ in range(2)]
        await until(lambda: gate.waiting == 2)
        assert await client.call("ModelInfer", asking(), "alice").code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for name in OPEN_CALLS:
            assert await client.call(name, b"").code() is grpc.StatusCode.OK
            assert await client.begin(name).code() is grpc.StatusCode.OK
        for each in held:
            each.cancel()


# --- callers ---------------------------------------------------------------------------------------------------------


async def test_a_caller_that_takes_all_its_places_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "MAX_CALLS_PER_CALLER", 2)
    gate = Gate()
    async with serving(gate, Tokens("alice", "bob")) as client:
        held = [client.call("ModelInfer", asking(), "alice") for _ in range(2)]
        await until(lambda: gate.waiting == 2)
        refused = client.call("ModelInfer", asking(), "alice")
        assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "of this caller" in (await refused.details())
        assert dict(await refused.trailing_metadata()) == {"retry-after": "2"}
        assert await client.call("ModelReady", b"\x0a\x01m", "bob").code() is grpc.StatusCode.OK
        gate.release.set()
        for each in held:
            assert await each.code() is grpc.StatusCode.OK
        assert await client.call("ModelInfer", asking(), "alice").code() is grpc.StatusCode.OK


async def test_a_caller_that_takes_all_its_streams_leaves_the_others_theirs() -> None:
    async with serving(StaticPredictor(ANSWER), Tokens("alice", "bob")) as client:
        held = [client.stream("alice") for _ in range(MAX_STREAMS_PER_CALLER)]
        for each in held:
            await each.write(asking())
            await each.read()
        assert await client.stream("alice").code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        other = client.stream("bob")
        await other.write(asking())
        assert (await other.read()).error_message == ""


async def test_a_stream_ends_when_its_credential_is_revoked() -> None:
    access = Tokens("alice")
    async with serving(StaticPredictor(ANSWER), access) as client:
        flow = client.stream("alice")
        for _ in range(3):
            await flow.write(asking())
            await flow.read()
        assert access.asked == 1
        access.revoke("alice")
        await flow.write(asking())
        assert await flow.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_caller_whose_credential_expires_is_identified_again_for_each_message() -> None:
    access = Tokens("alice", expires=0.0)
    async with serving(StaticPredictor(ANSWER), access) as client:
        flow = client.stream("alice")
        for _ in range(3):
            await flow.write(asking())
            await flow.read()
    assert access.asked == 4


# --- time ------------------------------------------------------------------------------------------------------------


async def test_a_message_that_does_not_come_ends_its_call_and_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "MESSAGE_SECONDS", 0.05)
    monkeypatch.setattr(servicer, "MAX_CALLS_PER_CALLER", 1)
    async with serving(StaticPredictor(ANSWER)) as client:
        for _ in range(2):
            late = client.begin("ModelInfer")
            assert await late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await late.details() == "the message did not come within 0.05 s"
        assert await client.call("ModelInfer", asking()).code() is grpc.StatusCode.OK


async def test_a_call_that_is_over_without_a_message_is_refused() -> None:
    async with serving(StaticPredictor(ANSWER)) as client:
        call = client.begin("ModelInfer")
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_without_a_first_message_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "FIRST_SECONDS", 0.05)
    async with serving(StaticPredictor(ANSWER)) as client:
        flow = client.stream()
        assert await flow.details() == "nothing came on this stream for 0.05 s"
        assert await flow.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_an_idle_stream_ends_but_not_while_a_request_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(stream, "IDLE_SECONDS", 0.05)
    looked: list[int] = []
    look = stream._Stream._look

    def counted(self: Any) -> None:
        looked.append(self._unanswered)
        look(self)

    monkeypatch.setattr(stream._Stream, "_look", counted)
    gate = Gate()
    async with serving(gate) as client:
        flow = client.stream()
        await flow.write(asking())
        await until(lambda: looked[-3:] == [1, 1, 1])
        gate.release.set()
        assert (await flow.read()).error_message == ""
        assert await flow.details() == "nothing came on this stream for 0.05 s"
        assert await flow.code() is grpc.StatusCode.DEADLINE_EXCEEDED


# --- places ----------------------------------------------------------------------------------------------------------


class Call:
    def __init__(self) -> None:
        self._told: Any = None

    def add_done_callback(self, told: Any) -> None:
        self._told = told

    def finish(self) -> None:
        self._told(self)


def test_places_are_bounded_by_caller_and_in_all_and_come_back() -> None:
    places = Places("calls", most=3, most_each=2)
    calls = [Call() for _ in range(3)]
    places.take("a", calls[0])
    places.take("a", calls[1])
    with pytest.raises(Overloaded, match="2 calls of this caller are under way"):
        places.take("a", Call())
    places.take("b", calls[2])
    with pytest.raises(Overloaded, match="3 calls are under way"):
        places.take("c", Call())
    for call in calls:
        call.finish()
    assert places._of == {}
    for _ in range(2):
        places.take("a", Call())


def test_a_named_client_is_one_caller_wherever_it_calls_from() -> None:
    here, there = Peer("192.0.2.1"), Peer("192.0.2.2")
    alice = Caller("alice", "t")
    assert who_of(alice, here) == who_of(alice, there) != who_of(Caller("alice", "u"), here)
    assert who_of(Caller(), here) != who_of(Caller(), there)
