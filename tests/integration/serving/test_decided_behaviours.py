"""What the server does with unusual requests is decided, documented (docs/conformance.md) and the same on every transport."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from onnx_writer import identity_model, nan_model, sum_model
from proofs.attack import SERVICE
from proofs.malformed import request
from proofs.server import Server, serving
from proofs.sockets import BINARY, TEXT, Answer, answers, check_error, exchange, frame, message_of, session

from models.serving.grpc import inference_pb2 as pb


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("decided")
    for datatype in ("FP32", "FP16", "INT8", "BYTES", "BOOL", "INT64", "UINT64"):
        identity_model(folder / "models" / datatype / "1" / "model.onnx", datatype, ("n", "m"))
    identity_model(folder / "models" / "scalar" / "1" / "model.onnx", "FP32", ())
    sum_model(folder / "models" / "sum" / "1" / "model.onnx")
    nan_model(folder / "models" / "nan" / "1" / "model.onnx")
    with serving(folder / "models", "--no-probe", "--unix", str(folder / "s")) as started:
        yield started


def tensor(datatype: str, shape: Any, data: Any = None, name: str = "x", **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data} | more


def one(*args: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": [tensor(*args, **more)]}).encode()


def both(**more: Any) -> bytes:
    """A good request for `sum`, with more beside its inputs."""
    return json.dumps(
        {"inputs": [tensor("FP32", [1, 4], [1] * 4, "a"), tensor("FP32", [1, 4], [2] * 4, "b")]} | more
    ).encode()


NAN = one("FP32", [1, 2], "?").replace(b'"?"', b"[1, NaN]")
BROKEN_UTF8 = one("FP32", [1, 1], [1]).replace(b'"x"', b'"\xff"')
DEEP = one("FP32", [1, 1], "?").replace(b'"?"', b"[" * 4000 + b"1" + b"]" * 4000)

# name, model, JSON, status, words of the error
REFUSED_JSON: list[tuple[str, str, bytes, int, str]] = [
    ("a bare NaN", "FP32", NAN, 400, "malformed"),
    ("a bare Infinity", "FP32", NAN.replace(b"NaN", b"Infinity"), 400, "malformed"),
    ("broken UTF-8", "FP32", BROKEN_UTF8, 400, ""),
    ("deep JSON in data", "FP32", DEEP, 400, "x"),
    ("deep JSON elsewhere", "FP32", b'{"parameters":{"a":' + b"[" * 4000 + b"]" * 4000 + b'},"inputs":[]}', 400, ""),
    ("an integer out of range", "INT8", one("INT8", [1, 3], [1, 2, 300]), 400, "element [0, 2] is 300, outside INT8"),
    ("a negative number in an unsigned tensor", "UINT64", one("UINT64", [1, 1], [-1]), 400, "element [0, 0] is -1"),
    ("an integer of 400 digits", "INT64", one("INT64", [1, 1], [10**400]), 400, "x"),
    ("a fraction in an integer tensor", "INT8", one("INT8", [1, 1], [1.5]), 400, "x"),
    ("text in a number tensor", "FP32", one("FP32", [1, 1], ["1"]), 400, "x"),
    ("null in data", "FP32", one("FP32", [1, 1], [None]), 400, "x"),
    ("a negative dimension", "FP32", one("FP32", [-1, 4], [1]), 400, "negative"),
    ("an absurd dimension", "FP32", one("FP32", [2**62, 4], []), 413, "axis 0"),
    ("a dimension beyond 64 bits", "FP32", one("FP32", [2**70, 4], []), 413, "axis 0"),
    ("an absurd product", "FP32", one("FP32", [2**20, 2**20], []), 413, "elements"),
    ("an absurd empty shape", "FP32", one("FP32", [0, 2**28, 2**28], []), 413, "elements"),
    ("too many dimensions", "FP32", one("FP32", [1] * 17, [1]), 400, "dimensions"),
    ("the wrong rank", "FP32", one("FP32", [4], [1] * 4), 400, "expected shape"),
    ("too few elements", "FP32", one("FP32", [2, 2], [1, 2, 3]), 400, "needs 4 elements"),
    ("ragged data", "FP32", one("FP32", [2, 2], [[1, 2], [3]]), 400, "axis 1"),
    ("data nested too deep", "FP32", one("FP32", [1, 2], [[[1, 2]]]), 400, "x"),
    ("the wrong datatype", "FP32", one("FP64", [1, 1], [1]), 400, "expected datatype FP32"),
    ("an unknown datatype", "FP32", one("BF16", [1, 1], [1]), 400, "BF16"),
    ("no data", "FP32", b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1]}]}', 400, "neither data nor"),
    ("an input twice", "sum", both(inputs=[tensor("FP32", [1, 4], [1] * 4, "a")] * 2), 400, "'a' is given twice"),
    ("an output twice", "sum", both(outputs=[{"name": "sum"}] * 2), 400, "'sum' is asked for twice"),
    ("an unknown input", "sum", both(inputs=[tensor("FP32", [1, 4], [1] * 4, n) for n in "ac"]), 400, "'c' is unknown"),
    ("a missing input", "sum", both(inputs=[tensor("FP32", [1, 4], [1] * 4, "a")]), 400, "'b' is missing"),
    ("no inputs", "sum", b'{"inputs":[]}', 400, "is missing"),
    ("an unknown output", "sum", both(outputs=[{"name": "product"}]), 400, "'product' is unknown"),
    (
        "classification",
        "sum",
        both(outputs=[{"name": "sum", "parameters": {"classification": 2}}]),
        400,
        "classification",
    ),
    ("shared memory", "FP32", one("FP32", [1, 1], parameters={"shared_memory_region": "r"}), 400, "shared memory"),
    ("a priority that is no integer", "sum", both(parameters={"priority": "high"}), 400, "priority"),
    ("FP16 without binary data", "FP16", one("FP16", [1, 1], [1]), 400, "FP16"),
    ("half of a character", "BYTES", one("BYTES", [1, 1], ["?"]).replace(b"?", rb"\ud800"), 400, ""),
    ("an unknown model", "nobody", one("FP32", [1, 1], [1]), 404, "nobody"),
    ("an empty body", "FP32", b"", 400, ""),
    ("no JSON", "FP32", b"hello", 400, ""),
    ("a list", "FP32", b"[]", 400, ""),
]


@pytest.mark.parametrize(
    ("name", "model", "body", "status", "words"), REFUSED_JSON, ids=[row[0] for row in REFUSED_JSON]
)
def test_bad_json_gets_the_same_refusal_over_tcp_unix_and_websocket(
    server: Server, name: str, model: str, body: bytes, status: int, words: str
) -> None:
    for address in (server.http, server.addresses["unix"]):
        (answer,) = answers(exchange(address, request(f"/v2/models/{model}/infer", body)))
        assert answer.status == status, answer.body
        check_error(answer.status, answer.body)
        assert words in json.loads(answer.body)["error"]
    # As a binary message, which carries a body as REST takes it.
    envelope = json.dumps({"op": "infer", "id": "1", "model": model}).encode()
    _, came = session(server.http, frame(BINARY, struct.pack("<I", len(envelope)) + envelope + body))
    (told,) = [message_of(opcode, payload) for opcode, payload in came if opcode == TEXT]
    assert (told["op"], told["status"], told["error"]) == ("error", status, json.loads(answer.body)["error"])


def post(server: Server, model: str, body: bytes, *headers: str) -> Answer:
    (answer,) = answers(exchange(server.http, request(f"/v2/models/{model}/infer", body, *headers)))
    return answer


def binary(array: np.ndarray[Any, Any], datatype: str, **changed: Any) -> tuple[bytes, int]:
    """Body and header length of a request for `x`, answered in binary."""
    parameters = {"binary_data_size": array.nbytes} | changed
    inputs = [{"name": "x", "datatype": datatype, "shape": array.shape, "parameters": parameters}]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return head + array.tobytes(), len(head)


GOOD = one("FP32", [1, 2], [1, 2])
ONES = np.ones((1, 2), np.float32)

# name, body, headers, status
HEADERS: list[tuple[str, bytes, tuple[str, ...], int]] = [
    ("no content type", GOOD, (), 200),
    ("a content type with parameters", GOOD, ("Content-Type: application/json; charset=utf-8",), 200),
    ("what curl says", GOOD, ("Content-Type: application/x-www-form-urlencoded",), 200),
    ("HTML", GOOD, ("Content-Type: text/html",), 415),
    ("an unknown encoding", GOOD, ("Content-Encoding: br",), 415),
    ("no gzip", GOOD, ("Content-Encoding: gzip",), 400),
    ("a good gzip", gzip.compress(GOOD), ("Content-Encoding: gzip",), 200),
    ("a gzip cut short", gzip.compress(GOOD)[:-9], ("Content-Encoding: gzip",), 400),
    ("a bomb", gzip.compress(bytes(96 << 20), 6), ("Content-Encoding: gzip",), 413),
    ("a deadline that is over", GOOD, ("Tierline-Deadline-Ms: 0",), 504),
    ("a deadline that is no number", GOOD, ("Tierline-Deadline-Ms: nan",), 400),
    ("a trace that is none", GOOD, ("Traceparent: 00-zz",), 200),
    ("a header length beyond the body", GOOD, ("Inference-Header-Content-Length: 9999",), 400),
    ("a header length with a sign", GOOD, ("Inference-Header-Content-Length: +5",), 400),
    ("too many headers", GOOD, tuple(f"h{n}: v" for n in range(150)), 413),
    ("JSON above its limit", b" " * (5 << 20) + GOOD, (), 413),
]  # fmt: skip


@pytest.mark.parametrize(("name", "body", "headers", "status"), HEADERS, ids=[row[0] for row in HEADERS])
def test_headers(server: Server, name: str, body: bytes, headers: tuple[str, ...], status: int) -> None:
    answer = post(server, "FP32", body, *headers)
    assert answer.status == status, answer.body
    if status != 200:
        check_error(status, answer.body)


@pytest.mark.parametrize(
    ("model", "array", "datatype", "changed", "words"),
    [
        ("FP32", ONES, "FP32", {"binary_data_size": 4}, "takes 8 bytes"),
        ("FP32", ONES, "FP32", {"binary_data_size": 2**63}, "bytes are left"),
        ("FP32", ONES, "FP32", {"binary_data_size": -8}, "bytes are left"),
        ("BOOL", np.array([[0, 2]], np.uint8), "BOOL", {}, "neither 0 nor 1"),
        (
            "BYTES",
            np.frombuffer(b"\xff\xff\xff\xffabcd", np.uint8)[None, :1],
            "BYTES",
            {"binary_data_size": 1},
            "bytes",
        ),
    ],
)
def test_binary_data_that_lies_is_refused(
    server: Server, model: str, array: Any, datatype: str, changed: dict[str, int], words: str
) -> None:
    body, length = binary(array, datatype, **changed)
    answer = post(server, model, body, f"Inference-Header-Content-Length: {length}")
    assert answer.status == 400
    check_error(400, answer.body)
    assert words in answer.body.decode()


@pytest.mark.parametrize("request_id", ["é", "日本語 \u0000 \U0001f600", "x" * 5000])
def test_any_id_is_echoed_on_every_transport(server: Server, request_id: str) -> None:
    body = json.dumps({"id": request_id, "inputs": [tensor("FP32", [1, 1], [1])]}).encode()
    assert json.loads(post(server, "FP32", body).body)["id"] == request_id
    assert infer(server, "FP32", "FP32", [1, 1], struct.pack("<f", 1), id=request_id).id == request_id


def test_the_last_of_two_equal_json_keys_counts(server: Server) -> None:
    answer = post(server, "FP32", GOOD.replace(b'{"inputs"', b'{"id": "1", "id": "2", "inputs"', 1))
    assert json.loads(answer.body)["id"] == "2"


def test_what_is_no_number_is_null_in_json_and_exact_in_binary(server: Server) -> None:
    body = one("FP32", [1, 4], [0, 0, 0, 0])
    answer = post(server, "nan", body)
    assert answer.status == 200
    told = json.loads(answer.body)["outputs"][0]["data"]
    assert None in told
    raw = infer(server, "nan", "FP32", [1, 4], bytes(16)).raw_output_contents[0]
    exact = np.frombuffer(raw, np.float32)
    assert [None if not np.isfinite(each) else each for each in exact.tolist()] == told
    assert not np.isfinite(exact).all()


@pytest.mark.parametrize(("model", "shape"), [("FP32", [0, 4]), ("FP32", [3, 0]), ("FP32", [0, 0]), ("INT64", [0, 7])])
def test_a_tensor_of_no_elements_is_answered_with_its_shape(server: Server, model: str, shape: list[int]) -> None:
    told = json.loads(post(server, model, one(model, shape, [])).body)["outputs"][0]
    assert (told["shape"], told["data"], told["datatype"]) == (shape, [], model)
    answer = infer(server, model, model, shape, b"")
    assert list(answer.outputs[0].shape) == shape
    assert list(answer.raw_output_contents) == [b""]


def test_a_tensor_without_dimensions_is_answered_as_one(server: Server) -> None:
    told = json.loads(post(server, "scalar", one("FP32", [], [2.5])).body)["outputs"][0]
    assert (told["shape"], told["data"]) == ([], [2.5])
    answer = infer(server, "scalar", "FP32", [], struct.pack("<f", 2.5))
    assert (list(answer.outputs[0].shape), answer.raw_output_contents[0]) == ([], struct.pack("<f", 2.5))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/FP32/infer", 405),
        ("POST", "/v2", 405),
        ("GET", "/nothing", 404),
        ("POST", "/v2/models/%ff/infer", 400),
        ("GET", "/v2/models/FP32/versions/9", 404),
        ("POST", "/v2/models/FP32/versions/9/infer", 404),
        ("POST", "/v2/repository/models/../load", 404),
        ("POST", "/v2/repository/models/%2e%2e%2fx/load", 404),
        ("POST", "/v2/systemsharedmemory/region/r/register", 400),
        ("GET", "/v2/trace/setting", 400),
    ],
)
def test_paths_that_lead_nowhere(server: Server, method: str, path: str, status: int) -> None:
    (answer,) = answers(exchange(server.http, request(path, GOOD, method=method)))
    assert answer.status == status
    check_error(answer.status, answer.body)


@pytest.mark.parametrize("host", ["t", "evil.example", "127.0.0.1.evil.example"])
def test_an_open_server_is_not_asked_by_another_name(server: Server, host: str) -> None:
    content = request("/v2/models/FP32/infer", GOOD).replace(b"Host: localhost", b"Host: " + host.encode())
    (answer,) = answers(exchange(server.http, content))
    assert answer.status == 403
    check_error(answer.status, answer.body)


def test_a_body_with_two_lengths_is_refused(server: Server) -> None:
    head = b"POST /v2/models/FP32/infer HTTP/1.1\r\nHost: localhost\r\n"
    for lines in (
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"Content-Length: 99999999999\r\n\r\n",
    ):
        found = answers(exchange(server.http, head + lines))
        assert [answer.status for answer in found][-1:] in ([400], [413])
        check_error(found[-1].status, found[-1].body)


# --- gRPC ----------------------------------------------------------------------------------------------------------------


def infer(server: Server, model: str, datatype: str, shape: list[int], raw: bytes, **more: Any) -> Any:
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[raw], **more)
    message.inputs.add(name="x", datatype=datatype, shape=shape)
    return pb.ModelInferResponse.FromString(say(server, "ModelInfer", message.SerializeToString()))


def say(server: Server, name: str, message: bytes, **options: Any) -> bytes:
    with grpc.insecure_channel(server.addresses["grpc"]) as channel:
        data: bytes = channel.unary_unary(f"/{SERVICE}/{name}")(message, timeout=10, **options)
        return data


def asked(model: str, shape: list[int], datatype: str = "FP32", raw: bytes | None = None, **typed: Any) -> bytes:
    message = pb.ModelInferRequest(model_name=model)
    given = message.inputs.add(name="x", datatype=datatype, shape=shape)
    for name, values in typed.items():
        getattr(given.contents, name).extend(values)
    if raw is not None:
        message.raw_input_contents.append(raw)
    data: bytes = message.SerializeToString()
    return data


def twice(*, outputs: bool = False) -> bytes:
    message = pb.ModelInferRequest.FromString(asked("FP32", [1, 1], raw=bytes(4)))
    if outputs:
        message.outputs.extend([pb.ModelInferRequest.InferRequestedOutputTensor(name="y")] * 2)
    else:
        message.inputs.append(message.inputs[0])
        message.raw_input_contents.append(bytes(4))
    data: bytes = message.SerializeToString()
    return data


REFUSED_GRPC: list[tuple[str, bytes, str, str]] = [
    ("no message", b"\xff\xff\xff", "INVALID_ARGUMENT", "ModelInferRequest"),
    ("broken UTF-8 in the id", asked("FP32", [1, 1], raw=bytes(4)) + b"\x1a\x01\xff", "INVALID_ARGUMENT", "id"),
    ("an integer out of range", asked("INT8", [1, 1], "INT8", int_contents=[300]), "INVALID_ARGUMENT", "is 300, outside INT8"),
    ("values in the wrong field", asked("FP32", [1, 1], fp64_contents=[1.0]), "INVALID_ARGUMENT", "fp32_contents"),
    ("a negative dimension", asked("FP32", [-1, 1], raw=bytes(4)), "INVALID_ARGUMENT", "negative"),
    ("an absurd dimension", asked("FP32", [2**62, 4], raw=b""), "INVALID_ARGUMENT", "axis 0"),
    ("an absurd product", asked("FP32", [2**20, 2**20], raw=b""), "INVALID_ARGUMENT", "elements"),
    ("too many dimensions", asked("FP32", [1] * 17, raw=bytes(4)), "INVALID_ARGUMENT", "dimensions"),
    ("too few bytes", asked("FP32", [1, 2], raw=bytes(4)), "INVALID_ARGUMENT", "takes 8 bytes"),
    ("too few values", asked("FP32", [1, 2], fp32_contents=[1.0]), "INVALID_ARGUMENT", "needs 2 elements"),
    ("typed and raw", asked("FP32", [1, 1], raw=bytes(4), fp32_contents=[1.0]), "INVALID_ARGUMENT", "send one of them"),
    ("FP16 typed", asked("FP16", [1, 1], "FP16", fp32_contents=[1.0]), "INVALID_ARGUMENT", "FP16"),
    ("the wrong datatype", asked("FP32", [1, 1], "FP64", raw=bytes(8)), "INVALID_ARGUMENT", "expected datatype FP32"),
    ("an unknown datatype", asked("FP32", [1, 1], "BF16", raw=bytes(2)), "INVALID_ARGUMENT", "BF16"),
    ("a BOOL of 2", asked("BOOL", [1, 1], "BOOL", raw=b"\2"), "INVALID_ARGUMENT", "neither 0 nor 1"),
    ("BYTES that lie", asked("BYTES", [1, 1], "BYTES", raw=b"\xff\0\0\0ab"), "INVALID_ARGUMENT", "claims 255 bytes"),
    ("a text that is none", asked("BYTES", [1, 1], "BYTES", raw=b"\1\0\0\0\xff"), "INVALID_ARGUMENT", "not UTF-8"),
    ("an input twice", twice(), "INVALID_ARGUMENT", "'x' is given twice"),
    ("an output twice", twice(outputs=True), "INVALID_ARGUMENT", "'y' is asked for twice"),
    ("a missing input", pb.ModelInferRequest(model_name="FP32").SerializeToString(), "INVALID_ARGUMENT", "is missing"),
    ("an unknown model", asked("nobody", [1, 1], raw=bytes(4)), "NOT_FOUND", "nobody"),
    ("an unknown version", asked("FP32", [1, 1], raw=bytes(4)) + b"\x12\x019", "NOT_FOUND", "9"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message", "code", "words"), REFUSED_GRPC, ids=[row[0] for row in REFUSED_GRPC])
def test_a_bad_message_gets_a_code_and_words_alone_and_in_a_stream(
    server: Server, name: str, message: bytes, code: str, words: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        say(server, "ModelInfer", message)
    assert caught.value.code().name == code, caught.value.details()
    assert words in caught.value.details()
    good = asked("FP32", [1, 1], raw=bytes(4))
    with grpc.insecure_channel(server.addresses["grpc"]) as channel:
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        came = [pb.ModelStreamInferResponse.FromString(each) for each in stream(iter([message, good]), timeout=10)]
    # Answers come in the order in which they are ready; the refused one ends nothing.
    assert sorted(each.error_message for each in came) == ["", caught.value.details()]


@pytest.mark.parametrize(
    ("metadata", "code"),
    [(("tierline-deadline-ms", "0"), "DEADLINE_EXCEEDED"), (("tierline-deadline-ms", "soon"), "INVALID_ARGUMENT")],
)
def test_metadata(server: Server, metadata: tuple[str, str], code: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        say(server, "ModelInfer", asked("FP32", [1, 1], raw=bytes(4)), metadata=[metadata])
    assert caught.value.code().name == code


@pytest.mark.parametrize("name", ["Nothing", "SystemSharedMemoryRegister", "CudaSharedMemoryStatus", "TraceSetting"])
def test_calls_that_are_not_supported_say_so(server: Server, name: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        say(server, name, b"")
    assert caught.value.code().name == "UNIMPLEMENTED"
