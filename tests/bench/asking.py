"""Requests in each protocol, and how their answers are read and checked."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import Load
from networks import Network

Array = np.ndarray[Any, Any]
ANSWER_SECONDS = 10.0
GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"
MAX_GRPC_BYTES = 64 << 20


class WrongAnswer(Exception):
    """A server answered, but not what the model says."""


class Question(NamedTuple):
    """One request. `read`: the answer's array from its headers (names in lower case) and body. `http2`: over gRPC."""

    path: str
    headers: tuple[str, ...]
    body: bytes
    read: Callable[[Mapping[str, str], bytes], Array]
    http2: bool = False

    def with_headers(self, *more: str) -> Question:
        return self._replace(headers=(*self.headers, *more))


# --- the Open Inference Protocol -----------------------------------------------------------------------------------------


def infer_path(network: Network) -> str:
    return f"/v2/models/{network.name}/infer"


def binary(network: Network) -> Question:
    """REST with the binary tensor extension, both ways."""
    tensor = {**_tensor(network), "parameters": {"binary_data_size": network.x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = ("content-type: application/octet-stream", f"inference-header-content-length: {len(head)}")
    return Question(infer_path(network), headers, head + network.x.tobytes(), read_binary)


def text(network: Network) -> Question:
    """REST, JSON both ways."""
    body = json.dumps({"inputs": [{**_tensor(network), "data": network.x.ravel().tolist()}]}).encode()
    return Question(infer_path(network), ("content-type: application/json",), body, read_text)


def grpc(network: Network) -> Question:
    """gRPC with raw contents: the frame that a client would send."""
    from models.serving.grpc import inference_pb2

    tensor = inference_pb2.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=network.x.shape)
    request = inference_pb2.ModelInferRequest(
        model_name=network.name, inputs=[tensor], raw_input_contents=[network.x.tobytes()]
    )
    message = request.SerializeToString()
    frame = b"\0" + len(message).to_bytes(4, "big") + message
    return Question(GRPC_METHOD, ("content-type: application/grpc", "te: trailers"), frame, read_grpc, http2=True)


def _tensor(network: Network) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": list(network.x.shape)}


def read_binary(headers: Mapping[str, str], body: bytes) -> Array:
    return np.frombuffer(body, np.float32, offset=int(headers["inference-header-content-length"]))


def read_text(headers: Mapping[str, str], body: bytes) -> Array:
    return np.array(json.loads(body)["outputs"][0]["data"], np.float32).ravel()


def read_grpc(headers: Mapping[str, str], body: bytes) -> Array:
    from models.serving.grpc import inference_pb2

    response = inference_pb2.ModelInferResponse.FromString(body)
    if response.raw_output_contents:
        return np.frombuffer(response.raw_output_contents[0], np.float32)
    return np.array(response.outputs[0].contents.fp32_contents, np.float32)


# --- asking once ---------------------------------------------------------------------------------------------------------


def check(question: Question, network: Network, port: int, unix: Path | None = None) -> int:
    """Ask once; the length of the answer's body. Raises OSError, HTTPException, RpcError or WrongAnswer."""
    if question.http2:
        headers, body, length = _ask_grpc(question, port)
    else:
        headers, body = _ask_http(question, port, unix)
        length = len(body)
    try:
        got = question.read(headers, body).ravel()
    except (KeyError, ValueError, TypeError) as error:
        raise WrongAnswer(f"{question.path} answered {body[:200]!r}") from error
    expected = network.y.ravel()
    if got.shape != expected.shape or not np.allclose(got, expected, rtol=1e-3, atol=1e-5):
        raise WrongAnswer(f"{question.path} answered {got[:4]}..., the model says {expected[:4]}...")
    return length


def load_of(question: Question, network: Network, port: int, unix: Path | None = None) -> Load:
    """The same question as a load, once its answer was checked."""
    length = check(question, network, port, unix)
    url = f"http://127.0.0.1:{port}{question.path}"
    return Load(url, question.headers, question.body, unix, question.http2, length)


def _ask_http(question: Question, port: int, unix: Path | None) -> tuple[dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    if unix is not None:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(ANSWER_SECONDS)
        connection.sock.connect(str(unix))
    try:
        headers = dict(header.split(": ", 1) for header in question.headers)
        connection.request("POST", question.path, question.body, headers)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise http.client.HTTPException(f"{response.status}: {body[:300].decode(errors='replace')}")
    return {name.lower(): value for name, value in response.getheaders()}, body


def _ask_grpc(question: Question, port: int) -> tuple[dict[str, str], bytes, int]:
    import grpc as grpcio

    metadata = [tuple(header.split(": ", 1)) for header in question.headers]
    own = [pair for pair in metadata if pair[0] not in ("content-type", "te", "grpc-timeout")]
    with grpcio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", MAX_GRPC_BYTES)]
    ) as channel:
        body = channel.unary_unary(GRPC_METHOD)(
            question.body[5:], timeout=ANSWER_SECONDS, metadata=own, wait_for_ready=True
        )
    return {}, body, len(body) + 5
