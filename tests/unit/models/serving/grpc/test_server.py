"""The server as grpc's own client finds it, over loopback, in front of fakes."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from models.errors import (
    Conflict,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    NotFound,
    Overloaded,
    TierlineError,
    Unauthenticated,
)
from models.serving.access.tls import grpc_credentials
from models.serving.caller import Caller, Peer
from models.serving.grpc import GrpcServer, serve_grpc
from models.serving.grpc import inference_pb2 as pb
from models.serving.grpc.server import MAX_MESSAGE_BYTES
from models.serving.grpc.servicer import MAX_CALL_BYTES, MAX_DETAILS, SERVICE
from models.serving.grpc.stream import MAX_STREAM_INFLIGHT, MAX_STREAMS_PER_CALLER
from models.serving.index import ModelDescription, ModelState, ModelStatistics
from models.serving.plane import DataPlane
from models.serving.predictor import InferRequest, InferResponse, Predictor
from models.tensor import TensorSpec
from models.testing import FailingPredictor, SlowPredictor, StaticPredictor

ANSWER = {"y": np.array([[1.5, 2.5]], np.float32)}
SECONDS = 20.0


class Index:
    def names(self) -> Sequence[str]:
        return ["hidden", "m"]

    def describe(self, model: str, version: str | None) -> ModelDescription:
        self.is_ready(model, version)
        spec = TensorSpec("x", "FP32", (-1, 2))
        return ModelDescription(model, "pack", ("1", "2"), "onnx_fp32", (spec,), (spec,))

    def is_ready(self, model: str, version: str | None) -> bool:
        if model not in self.names() or version not in (None, "1", "2"):
            raise NotFound(f"model '{model}' is not served here")
        return version != "2"


class Control:
    """Knows what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def states(self) -> Sequence[ModelState]:
        return [
            ModelState("hidden", "1", "READY"),
            ModelState("m", "1", "READY"),
            ModelState("m", "2", "LOADING", "why"),
        ]

    async def load(self, model: str) -> None:
        await asyncio.sleep(0)
        self.told.append(("load", model))

    async def unload(self, model: str) -> None:
        self.told.append(("unload", model))

    def config(self, model: str, version: str | None) -> Mapping[str, object]:
        return {
            "name": model,
            "platform": "onnxruntime_onnx",
            "backend": "onnxruntime",
            "max_batch_size": 8,
            "input": ({"name": "x", "data_type": "TYPE_FP32", "dims": (-1, 2)},),
            "version_policy": {"specific": {"versions": [1, 2]}},
            "dynamic_batching": {"preferred_batch_size": [4]},
            "instance_group": [{"name": "a", "kind": "KIND_CPU", "count": 1}],
            "parameters": {"k": {"string_value": "v"}},
            "something_new": {"a": [1]},
        }

    def watch(self, changed: Any) -> Any:
        return lambda: None


class Counted:
    def statistics(self, model: str | None, version: str | None) -> Sequence[ModelStatistics]:
        counted = ModelStatistics("m", "1", last_inference=7, inference_count=3, execution_count=2)
        counted.inference_stats["success"].count = 3
        counted.inference_stats["queue"].ns = 2**40
        every = [counted, ModelStatistics("hidden", "1")]
        return [each for each in every if model in (None, each.name)]


class TokenAccess:
    """`Bearer admin` may do everything, `Bearer user` may not know of the model `hidden`."""

    revision = 0

    def __init__(self) -> None:
        self.peers: list[Peer] = []

    def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
        self.peers.append(peer)
        if authorization not in (b"Bearer admin", b"Bearer user"):
            raise Unauthenticated("no token that is known")
        return Caller("c", "t", admin=authorization == b"Bearer admin")

    def may_use(self, caller: Caller, model: str) -> bool:
        return caller.admin or model != "hidden"


class Client:
    """Calls by name, messages by class."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def call(self, name: str, message: Any, *, token: str | None = None, timeout: float = SECONDS, **said: str) -> Any:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        answer = getattr(pb, type(message).__name__.replace("Request", "Response"), pb.ModelInferResponse)
        made = self._channel.unary_unary(f"/{SERVICE}/{name}", response_deserializer=answer.FromString)
        return made(data, timeout=timeout, metadata=metadata_of(token, said))

    def stream(self, requests: Any = None, *, token: str | None = None, **said: str) -> Any:
        made = self._channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        return made(requests, timeout=SECONDS, metadata=metadata_of(token, said))


def metadata_of(token: str | None, said: Mapping[str, str]) -> list[tuple[str, str]]:
    metadata = [(name.replace("_", "-"), value) for name, value in said.items()]
    return metadata + ([("authorization", f"Bearer {token}")] if token else [])


@asynccontextmanager
async def serving(predictor: Predictor, **options: Any) -> AsyncIterator[tuple[Client, GrpcServer]]:
    plane = DataPlane(predictor, Index(), **({"ready": lambda: True} | options))
    async with (
        serve_grpc(plane, drain_seconds=1.0) as server,
        grpc.aio.insecure_channel(
            f"127.0.0.1:{server.port}", options=[("grpc.max_send_message_length", -1)]
        ) as channel,
    ):
        yield Client(channel), server


def asking(model: str = "m", **fields: Any) -> Any:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 2])
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[bytes(8)], **fields)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


# --- inferring -------------------------------------------------------------------------------------------------------


async def test_an_inference_is_asked_and_answered() -> None:
    predictor = StaticPredictor(ANSWER, confidence=0.75)
    async with serving(predictor) as (client, server):
        answer = await client.call("ModelInfer", asking(id="7"), traceparent="00-1-2-01", timeout=5)
        assert server.url == f"grpc://127.0.0.1:{server.port}"
    (asked,) = predictor.requests
    assert asked.inputs["x"].tolist() == [[0, 0]]
    assert asked.trace == "00-1-2-01"
    assert answer.id == "7"
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [1.5, 2.5]
    assert answer.parameters["confidence"].double_param == 0.75


async def test_the_sooner_of_both_deadlines_counts_and_none_is_none() -> None:
    predictor = StaticPredictor(ANSWER)
    clock = asyncio.get_running_loop().time
    async with serving(predictor) as (client, _):
        start = clock()
        await client.call("ModelInfer", asking(), timeout=5, tierline_deadline_ms="60000")
        await client.call("ModelInfer", asking(), timeout=60, tierline_deadline_ms="5000")
        made = client._channel.unary_unary(f"/{SERVICE}/ModelInfer")
        await made(asking().SerializeToString())
    by_call, by_metadata, none = (request.deadline for request in predictor.requests)
    assert by_call is not None
    assert by_metadata is not None
    assert 0 < by_call - start < 10
    assert 0 < by_metadata - start < 10
    assert none is None


ERRORS = [
    (InvalidRequest("input 'x': wrong"), "INVALID_ARGUMENT"),
    (NotFound("model 'm' is not served here"), "NOT_FOUND"),
    (DeadlineExceeded("late"), "DEADLINE_EXCEEDED"),
    (Overloaded("full", retry_after=2.0), "RESOURCE_EXHAUSTED"),
    (EngineFailure("ö broke\nin two"), "INTERNAL"),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=[code for _, code in ERRORS])
async def test_every_error_has_its_code_and_its_words(error: TierlineError, code: str) -> None:
    async with serving(FailingPredictor(error)) as (client, _):
        caught = await failure(client.call("ModelInfer", asking()))
    assert (caught.code().name, caught.details()) == (code, str(error))
    trailing = dict(caught.trailing_metadata() or ())
    assert trailing.get("retry-after") == ("2" if code == "RESOURCE_EXHAUSTED" else None)


async def test_a_long_error_is_cut_so_that_clients_accept_it() -> None:
    async with serving(FailingPredictor(InvalidRequest("x" * 100_000))) as (client, _):
        caught = await failure(client.call("ModelInfer", asking()))
    assert caught.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(caught.details() or "") == MAX_DETAILS


async def test_what_nobody_expected_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def infer(self, request: InferRequest) -> InferResponse:
            raise RuntimeError("secret")

    async with serving(Broken()) as (client, _):
        with caplog.at_level(logging.ERROR, "tierline.grpc"):
            caught = await failure(client.call("ModelInfer", asking()))
    assert (caught.code(), caught.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    assert "secret" in caplog.text


@pytest.mark.parametrize("name", ["ModelInfer", "ModelReady", "RepositoryIndex"])
async def test_bytes_that_are_no_message_are_the_callers_fault(name: str) -> None:
    async with serving(StaticPredictor(ANSWER)) as (client, _):
        caught = await failure(client.call(name, b"\x0a\xff\xff"))
        assert caught.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await client.call("ServerLive", pb.ServerLiveRequest())).live


async def test_messages_beyond_the_limits_are_refused_and_the_server_lives() -> None:
    async with serving(StaticPredictor(ANSWER)) as (client, _):
        caught = await failure(client.call("ModelReady", pb.ModelReadyRequest(name="m" * MAX_CALL_BYTES)))
        assert caught.code() is grpc.StatusCode.INVALID_ARGUMENT
        caught = await failure(client.call("ModelInfer", bytes(MAX_MESSAGE_BYTES + 1)))
        assert caught.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        bomb = client._channel.unary_unary(f"/{SERVICE}/ModelInfer")
        caught = await failure(bomb(bytes(MAX_MESSAGE_BYTES + 1), compression=grpc.Compression.Gzip, timeout=SECONDS))
        assert caught.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await client.call("ServerLive", pb.ServerLiveRequest())).live


async def test_a_call_that_is_cancelled_frees_its_work() -> None:
    predictor = SlowPredictor(StaticPredictor(ANSWER))
    async with serving(predictor) as (client, _):
        call = client.call("ModelInfer", asking())
        await asyncio.wait_for(predictor.asked.wait(), SECONDS)
        call.cancel()
        await until(lambda: predictor.cancelled == 1)


async def test_a_call_whose_time_is_over_frees_its_work() -> None:
    predictor = SlowPredictor(StaticPredictor(ANSWER))
    async with serving(predictor) as (client, _):
        caught = await failure(client.call("ModelInfer", asking(), timeout=0.05))
        assert caught.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: predictor.cancelled == 1)


async def test_leaving_lets_calls_finish_and_cancels_those_that_do_not() -> None:
    predictor = SlowPredictor(StaticPredictor(ANSWER))
    plane = DataPlane(predictor, Index(), ready=lambda: True)
    async with grpc.aio.insecure_channel("127.0.0.1:1"):
        for finishes in (True, False):
            predictor.asked.clear()
            async with serve_grpc(plane, drain_seconds=5.0 if finishes else 0.05) as server:
                channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
                call = Client(channel).call("ModelInfer", asking())
                waiting = asyncio.ensure_future(call)
                await asyncio.wait_for(predictor.asked.wait(), SECONDS)
                if finishes:
                    asyncio.get_running_loop().call_later(0.05, predictor.release.set)
            if finishes:
                assert (await waiting).model_name == "m"
                predictor.release.clear()
            else:
                assert (await failure(waiting)).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
                assert predictor.cancelled == 1
            await channel.close()


async def test_a_port_that_is_taken_is_told_by_host_and_port_also_when_it_is_ours() -> None:
    plane = DataPlane(StaticPredictor(ANSWER), Index(), ready=lambda: True)
    async with serve_grpc(plane) as server:
        with pytest.raises(OSError, match=f"127.0.0.1 port {server.port}"):
            async with serve_grpc(plane, port=server.port):
                pass


# --- who asks --------------------------------------------------------------------------------------------------------


async def test_only_the_servers_own_health_and_metadata_are_open() -> None:
    access = TokenAccess()
    async with serving(StaticPredictor(ANSWER), access=access, control=Control()) as (client, _):
        for name in ("ServerLive", "ServerReady", "ServerMetadata"):
            await client.call(name, getattr(pb, f"{name}Request")())
        assert access.peers == []
        for name, message in (
            ("ModelInfer", asking()),
            ("ModelReady", pb.ModelReadyRequest(name="m")),
            ("RepositoryIndex", pb.RepositoryIndexRequest()),
            ("LogSettings", pb.LogSettingsRequest()),
        ):
            assert (await failure(client.call(name, message))).code() is grpc.StatusCode.UNAUTHENTICATED
        assert {peer.address for peer in access.peers} == {"127.0.0.1"}


async def test_a_model_that_may_not_be_known_does_not_exist() -> None:
    async with serving(StaticPredictor(ANSWER), access=TokenAccess(), statistics=Counted()) as (client, _):
        caught = await failure(client.call("ModelInfer", asking("hidden"), token="user"))
        assert (caught.code(), caught.details()) == (grpc.StatusCode.NOT_FOUND, "model 'hidden' is not served here")
        message = pb.ModelMetadataRequest(name="hidden")
        assert (await failure(client.call("ModelMetadata", message, token="user"))).code() is grpc.StatusCode.NOT_FOUND
        assert not (await client.call("ModelReady", pb.ModelReadyRequest(name="hidden"), token="user")).ready
        counted = await client.call("ModelStatistics", pb.ModelStatisticsRequest(), token="user")
        assert [each.name for each in counted.model_stats] == ["m"]
        await client.call("ModelInfer", asking("hidden"), token="admin")


async def test_the_tenant_reaches_the_data_plane() -> None:
    predictor = StaticPredictor(ANSWER)
    async with serving(predictor, access=TokenAccess()) as (client, _):
        await client.call("ModelInfer", asking(), token="user")
    assert (predictor.requests[0].client, predictor.requests[0].tenant) == ("c", "t")


async def test_loading_and_log_settings_need_an_administrator() -> None:
    control = Control()
    async with serving(StaticPredictor(ANSWER), access=TokenAccess(), control=control) as (client, _):
        for name in ("RepositoryModelLoad", "RepositoryModelUnload"):
            message = getattr(pb, f"{name}Request")(model_name="m")
            assert (await failure(client.call(name, message, token="user"))).code() is grpc.StatusCode.PERMISSION_DENIED
            await client.call(name, message, token="admin")
        caught = await failure(client.call("LogSettings", pb.LogSettingsRequest(), token="user"))
        assert caught.code() is grpc.StatusCode.PERMISSION_DENIED
    assert control.told == [("load", "m"), ("unload", "m")]


def certificate(name: str, issuer: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """A certificate and its key; without `issuer` an authority's own."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(hours=2))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key if issuer is None else issuer[1], hashes.SHA256())
    )
    return made, key


def pem(made: tuple[Any, Any]) -> tuple[bytes, bytes]:
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return made[0].public_bytes(serialization.Encoding.PEM), made[1].private_bytes(*form)


async def test_over_tls_the_name_in_the_clients_certificate_is_who_asks(tmp_path: Path) -> None:
    authority = certificate("authority")
    ca = pem(authority)[0]
    cert, key = pem(certificate("localhost", authority))
    theirs, their_key = pem(certificate("gateway-7", authority))
    access = TokenAccess()
    plane = DataPlane(StaticPredictor(ANSWER), Index(), ready=lambda: True, access=access)
    known = grpc.ssl_channel_credentials(ca, their_key, theirs)
    unknown = grpc.ssl_channel_credentials(ca)
    files = [tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem")]
    for file, content in zip(files, (cert, key, ca), strict=True):
        file.write_bytes(content)
    async with serve_grpc(plane, credentials=partial(grpc_credentials, *files)) as server:
        assert server.url.startswith("grpcs://")
        async with grpc.aio.secure_channel(f"localhost:{server.port}", known) as channel:
            await Client(channel).call("ModelInfer", asking(), token="user")
        assert access.peers == [Peer("127.0.0.1", "gateway-7", True)]
        async with grpc.aio.secure_channel(f"localhost:{server.port}", unknown) as channel:
            caught = await failure(Client(channel).call("ServerLive", pb.ServerLiveRequest()))
            assert caught.code() is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(f"localhost:{server.port}") as channel:
            caught = await failure(Client(channel).call("ServerLive", pb.ServerLiveRequest()))
            assert caught.code() is grpc.StatusCode.UNAVAILABLE


# --- everything else -------------------------------------------------------------------------------------------------


async def test_metadata_and_readiness_are_told() -> None:
    async with serving(StaticPredictor(ANSWER), ready=lambda: False) as (client, _):
        assert not (await client.call("ServerReady", pb.ServerReadyRequest())).ready
        assert "binary_tensor_data" in (await client.call("ServerMetadata", pb.ServerMetadataRequest())).extensions
        known = await client.call("ModelMetadata", pb.ModelMetadataRequest(name="m"))
        assert (known.versions, known.platform, known.inputs[0].shape) == (["1", "2"], "onnx_fp32", [-1, 2])
        for version, ready in (("", True), ("1", True), ("2", False), ("9", False)):
            assert (await client.call("ModelReady", pb.ModelReadyRequest(name="m", version=version))).ready == ready
        assert not (await client.call("ModelReady", pb.ModelReadyRequest(name="none"))).ready


async def test_the_configuration_is_told_as_far_as_the_message_has_fields() -> None:
    async with serving(StaticPredictor(ANSWER), control=Control()) as (client, _):
        config = (await client.call("ModelConfig", pb.ModelConfigRequest(name="m"))).config
    assert (config.max_batch_size, config.version_policy.specific.versions) == (8, [1, 2])
    assert config.input[0].data_type == pb.DESCRIPTOR.enum_types_by_name["DataType"].values_by_name["TYPE_FP32"].number
    assert config.input[0].dims == [-1, 2]
    assert config.dynamic_batching.preferred_batch_size == [4]
    assert config.parameters["k"].string_value == "v"


async def test_statistics_are_told() -> None:
    async with serving(StaticPredictor(ANSWER), statistics=Counted()) as (client, _):
        stats = (await client.call("ModelStatistics", pb.ModelStatisticsRequest())).model_stats
        (first,) = [each for each in stats if each.name == "m"]
        caught = await failure(client.call("ModelStatistics", pb.ModelStatisticsRequest(name="none")))
    assert (first.inference_count, first.execution_count, first.last_inference) == (3, 2, 7)
    assert (first.inference_stats.success.count, first.inference_stats.queue.ns) == (3, 2**40)
    assert caught.code() is grpc.StatusCode.NOT_FOUND


async def test_the_repository_is_told() -> None:
    async with serving(StaticPredictor(ANSWER), control=Control()) as (client, _):
        every = (await client.call("RepositoryIndex", pb.RepositoryIndexRequest())).models
        ready = (await client.call("RepositoryIndex", pb.RepositoryIndexRequest(ready=True))).models
    assert [(each.name, each.version, each.state, each.reason) for each in every][2] == ("m", "2", "LOADING", "why")
    assert [(each.name, each.version) for each in ready] == [("hidden", "1"), ("m", "1")]


REFUSED = [
    ("RepositoryIndex", pb.RepositoryIndexRequest(repository_name="r"), "INVALID_ARGUMENT", "repository_name"),
    (
        "RepositoryModelLoad",
        pb.RepositoryModelLoadRequest(
            model_name="m", parameters={"config": pb.ModelRepositoryParameter(string_param="{}")}
        ),
        "INVALID_ARGUMENT",
        "parameters.config is not supported",
    ),
    (
        "RepositoryModelUnload",
        pb.RepositoryModelUnloadRequest(model_name="m", parameters={"x": pb.ModelRepositoryParameter(bool_param=True)}),
        "INVALID_ARGUMENT",
        "parameters.x is not known",
    ),
    (
        "LogSettings",
        pb.LogSettingsRequest(settings={"nothing": pb.LogSettingsRequest.SettingValue(bool_param=True)}),
        "INVALID_ARGUMENT",
        "nothing",
    ),
    ("TraceSetting", pb.TraceSettingRequest(), "UNIMPLEMENTED", "traceparent"),
    ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(), "UNIMPLEMENTED", "shared memory"),
    ("CudaSharedMemoryRegister", pb.CudaSharedMemoryRegisterRequest(), "UNIMPLEMENTED", "shared memory"),
]


@pytest.mark.parametrize(("name", "message", "code", "text"), REFUSED, ids=[case[0] for case in REFUSED])
async def test_what_is_not_supported_is_refused_in_words(name: str, message: Any, code: str, text: str) -> None:
    async with serving(StaticPredictor(ANSWER), control=Control()) as (client, _):
        caught = await failure(client.call(name, message))
    assert caught.code().name == code
    assert text in (caught.details() or "")


async def test_where_a_hub_decides_nobody_else_loads() -> None:
    async with serving(StaticPredictor(ANSWER)) as (client, _):
        caught = await failure(client.call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="m")))
    assert caught.code().name == Conflict.grpc


async def test_log_settings_are_told_in_their_types() -> None:
    async with serving(StaticPredictor(ANSWER)) as (client, _):
        settings = (await client.call("LogSettings", pb.LogSettingsRequest())).settings
    assert settings["log_info"].bool_param is True
    assert settings["log_verbose_level"].WhichOneof("parameter_choice") == "uint32_param"
    assert settings["log_format"].string_param == "default"


# --- streams ---------------------------------------------------------------------------------------------------------


class Gated:
    """Answers a request once its id was let through; 'bad' fails."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        self.cancelled = 0
        self._gates: dict[str | None, asyncio.Event] = {}

    def let(self, request_id: str) -> None:
        self._gates.setdefault(request_id, asyncio.Event()).set()

    async def infer(self, request: InferRequest) -> InferResponse:
        self.asked.append(request.id)
        if request.id == "bad":
            raise InvalidRequest("input 'x': bad")
        try:
            await self._gates.setdefault(request.id, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return InferResponse(outputs=ANSWER, model="m", package="p", version="1", tier="edge", id=request.id)


async def test_answers_of_a_stream_come_in_order_of_completion() -> None:
    gated = Gated()
    async with serving(gated) as (client, _):
        stream = client.stream()
        for name in ("a", "b", "bad"):
            await stream.write(asking(id=name))
        first = await stream.read()
        assert (first.error_message, first.infer_response.id) == ("input 'x': bad", "bad")
        for name in ("b", "a"):
            gated.let(name)
            answer = await stream.read()
            assert (answer.error_message, answer.infer_response.id) == ("", name)
            assert answer.infer_response.raw_output_contents[0] == ANSWER["y"].tobytes()
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK


async def test_a_broken_message_fails_alone_and_keeps_its_id() -> None:
    async with serving(StaticPredictor(ANSWER)) as (client, _):
        stream = client.stream()
        await stream.write(asking(id="1").SerializeToString() + b"\x2a\x02\x0a\x05")
        await stream.write(b"\xff")
        await stream.write(asking(id="3"))
        await stream.done_writing()
        answers = [answer async for answer in stream]
    assert [(bool(answer.error_message), answer.infer_response.id) for answer in answers] == [
        (True, "1"),
        (True, ""),
        (False, "3"),
    ]


async def test_what_was_read_is_answered_although_no_more_will_come() -> None:
    gated = Gated()
    async with serving(gated) as (client, _):
        stream = client.stream()
        await stream.write(asking(id="late"))
        await stream.done_writing()
        await until(lambda: gated.asked == ["late"])
        gated.let("late")
        assert [answer.infer_response.id async for answer in stream] == ["late"]


async def test_a_stream_is_read_no_further_than_its_bound() -> None:
    gated = Gated()
    names = [str(index) for index in range(MAX_STREAM_INFLIGHT + 8)]
    async with serving(gated) as (client, _):
        stream = client.stream()
        for name in names:
            await stream.write(asking(id=name))
        await until(lambda: len(gated.asked) == MAX_STREAM_INFLIGHT)
        await client.call("ServerLive", pb.ServerLiveRequest())  # time enough to read on
        assert len(gated.asked) == MAX_STREAM_INFLIGHT
        for name in names:
            gated.let(name)
        await stream.done_writing()
        assert {answer.infer_response.id async for answer in stream} == set(names)


async def test_a_stream_that_is_cancelled_frees_its_work() -> None:
    gated = Gated()
    async with serving(gated) as (client, _):
        stream = client.stream()
        for name in ("a", "b"):
            await stream.write(asking(id=name))
        await until(lambda: len(gated.asked) == 2)
        stream.cancel()
        await until(lambda: gated.cancelled == 2)


async def test_more_streams_than_the_limit_are_refused_and_places_come_back() -> None:
    async with serving(StaticPredictor(ANSWER)) as (client, _):
        streams = [client.stream() for _ in range(MAX_STREAMS_PER_CALLER)]
        for stream in streams:
            await stream.write(asking())
            await stream.read()
        refused = client.stream()
        assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for stream in streams:
            await stream.done_writing()
            assert await stream.code() is grpc.StatusCode.OK
        stream = client.stream()
        await stream.write(asking())
        assert (await stream.read()).error_message == ""
        await stream.done_writing()


async def test_an_answer_is_marked_as_the_last_where_a_client_waits_for_that() -> None:
    message = asking()
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    async with serving(StaticPredictor(ANSWER)) as (client, _):
        stream = client.stream()
        await stream.write(message)
        assert (await stream.read()).infer_response.parameters["triton_final_response"].bool_param is True
        await stream.done_writing()


async def until(holds: Any) -> None:
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.001)
