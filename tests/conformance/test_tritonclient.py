"""NVIDIA's `tritonclient` finds in us the Open Inference Protocol server that it expects."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

VALUES: dict[str, Any] = {
    "BOOL": np.array([[True, False, True]]),
    "UINT8": np.array([[0, 1, 255]], np.uint8),
    "UINT16": np.array([[0, 1, 65535]], np.uint16),
    "UINT32": np.array([[0, 1, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 1, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 0, 127]], np.int8),
    "INT16": np.array([[-(2**15), 0, 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 0, 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 0, 2**63 - 1]], np.int64),
    "FP16": np.array([[-1.5, 0, 65504]], np.float16),
    "FP32": np.array([[-1.1, 0, 3e38]], np.float32),
    "FP64": np.array([[-1.1, 0, 1e308]], np.float64),
    "BYTES": np.array([["ä".encode(), b"", b"text"]], np.object_),
}


@pytest.fixture
def client(server: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server) as client:
        yield client


def given(name: str, array: Any, datatype: str, *, binary: bool) -> triton.InferInput:
    tensor = triton.InferInput(name, array.shape, datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert client.is_model_ready("scale", "1")
    assert not client.is_model_ready("scale", "9")
    assert not client.is_model_ready("none")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("scale")
    assert metadata["versions"] == ["1", "2"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}]


ROUND_TRIPS = [
    (datatype, binary_in, binary_out)
    for datatype in VALUES
    for binary_in in (True, False)
    for binary_out in (True, False)
    if datatype != "FP16" or (binary_in and binary_out)  # FP16 has no JSON form in the protocol
]


@pytest.mark.parametrize(("datatype", "binary_in", "binary_out"), ROUND_TRIPS)
def test_every_datatype_survives_the_round_trip(
    client: triton.InferenceServerClient, datatype: str, binary_in: bool, binary_out: bool
) -> None:
    sent = VALUES[datatype]
    inputs = [given("x", sent, datatype, binary=binary_in)]
    outputs = [triton.InferRequestedOutput("y", binary_data=binary_out)]
    got = client.infer(f"identity_{datatype}", inputs, outputs=outputs).as_numpy("y")
    assert got.shape == sent.shape
    if datatype == "BYTES":
        assert [item if isinstance(item, bytes) else item.encode() for item in got[0]] == list(sent[0])
    else:
        assert got.dtype == sent.dtype
        assert np.array_equal(got, sent)


def test_each_version_is_itself_and_the_highest_is_the_default(client: triton.InferenceServerClient) -> None:
    ones = given("x", np.ones((1, 4), np.float32), "FP32", binary=True)
    factors = [client.infer("scale", [ones], model_version=version).as_numpy("y")[0, 0] for version in ("1", "2", "")]
    assert factors == [2, 3, 3]


def test_named_outputs_alone_are_returned_each_in_its_form(client: triton.InferenceServerClient) -> None:
    a, b = np.full((2, 4), 5, np.float32), np.ones((2, 4), np.float32)
    inputs = [given("a", a, "FP32", binary=True), given("b", b, "FP32", binary=False)]
    only = client.infer("sum", inputs, outputs=[triton.InferRequestedOutput("difference")])
    assert np.array_equal(only.as_numpy("difference"), a - b)
    assert only.as_numpy("sum") is None
    both = client.infer("sum", inputs)
    assert np.array_equal(both.as_numpy("sum"), a + b)


def test_the_request_id_comes_back(client: triton.InferenceServerClient) -> None:
    ones = given("x", np.ones((1, 4), np.float32), "FP32", binary=True)
    assert client.infer("scale", [ones], request_id="né-7").get_response()["id"] == "né-7"


@pytest.mark.parametrize(
    ("model", "version", "shape", "datatype", "name", "message"),
    [
        ("none", "", (1, 4), "FP32", "x", "none"),
        ("scale", "9", (1, 4), "FP32", "x", "9"),
        ("scale", "", (1, 5), "FP32", "x", "'x'"),
        ("scale", "", (4,), "FP32", "x", "'x'"),
        ("scale", "", (1, 4), "FP64", "x", "'x'"),
        ("scale", "", (1, 4), "FP32", "z", "'z'"),
    ],
)
def test_a_callers_fault_is_told_by_name(
    client: triton.InferenceServerClient,
    model: str,
    version: str,
    shape: tuple[int, ...],
    datatype: str,
    name: str,
    message: str,
) -> None:
    array = np.ones(shape, np.float64 if datatype == "FP64" else np.float32)
    with pytest.raises(InferenceServerException, match=message) as caught:
        client.infer(model, [given(name, array, datatype, binary=True)], model_version=version)
    assert str(caught.value.status()) in ("400", "404")


def test_an_unknown_output_is_a_callers_fault(client: triton.InferenceServerClient) -> None:
    ones = given("x", np.ones((1, 4), np.float32), "FP32", binary=True)
    with pytest.raises(InferenceServerException, match="nothing") as caught:
        client.infer("scale", [ones], outputs=[triton.InferRequestedOutput("nothing")])
    assert str(caught.value.status()) == "400"


COMPRESSED = [(sent, wanted) for sent in (None, "gzip", "deflate") for wanted in (None, "gzip", "deflate")][1:]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("sent", "wanted"), COMPRESSED)
def test_bodies_are_compressed_both_ways(
    client: triton.InferenceServerClient, sent: str | None, wanted: str | None, binary: bool
) -> None:
    values = np.arange(4000, dtype=np.float32).reshape(1000, 4)
    answer = client.infer(
        "scale",
        [given("x", values, "FP32", binary=binary)],
        outputs=[triton.InferRequestedOutput("y", binary_data=binary)],
        model_version="1",
        request_compression_algorithm=sent,
        response_compression_algorithm=wanted,
    )
    assert np.array_equal(answer.as_numpy("y"), values * 2)


def test_calls_in_parallel_get_their_own_answers(server: str) -> None:
    with triton.InferenceServerClient(server, concurrency=8) as client:
        calls = [
            client.async_infer("scale", [given("x", np.full((1, 4), n, np.float32), "FP32", binary=True)], "1")
            for n in range(64)
        ]
        assert [call.get_result().as_numpy("y")[0, 0] for call in calls] == [2 * n for n in range(64)]


@pytest.fixture
def control(client: triton.InferenceServerClient) -> Iterator[triton.InferenceServerClient]:
    """A client of a server whose models are loaded and unloaded by its callers; `scale` is loaded again at the end."""
    yield client
    client.load_model("scale")


def states(client: triton.InferenceServerClient) -> dict[tuple[str, str], str]:
    return {(each["name"], each["version"]): each["state"] for each in client.get_model_repository_index()}


def test_the_index_tells_every_version(client: triton.InferenceServerClient) -> None:
    found = states(client)
    assert found["sum", "1"] == found["scale", "1"] == found["scale", "2"] == "READY"


def test_a_model_is_unloaded_and_loaded(control: triton.InferenceServerClient) -> None:
    ones = given("x", np.ones((1, 4), np.float32), "FP32", binary=True)
    control.unload_model("scale", unload_dependents=True)
    assert not control.is_model_ready("scale")
    assert states(control).get(("scale", "2")) != "READY"
    with pytest.raises(InferenceServerException):
        control.infer("scale", [ones])
    control.load_model("scale")
    control.load_model("scale")  # what is loaded is loaded again
    assert control.is_model_ready("scale")
    assert control.infer("scale", [ones]).as_numpy("y")[0, 0] == 3


REFUSED: list[tuple[str, Callable[[triton.InferenceServerClient], object], str, str]] = [
    ("load of none", lambda client: client.load_model("none"), "404", "none"),
    ("unload of none", lambda client: client.unload_model("none"), "404", "none"),
    ("config override", lambda client: client.load_model("scale", config="{}"), "400", "parameters.config"),
    ("config of none", lambda client: client.get_model_config("none"), "404", "none"),
    ("config of no version", lambda client: client.get_model_config("scale", "9"), "404", "9"),
    ("statistics of none", lambda client: client.get_inference_statistics("none"), "404", "none"),
    ("metadata of no version", lambda client: client.get_model_metadata("scale", "9"), "404", "9"),
    ("log file", lambda client: client.update_log_settings({"log_file": "log.txt"}), "400", "log_file"),
    ("log level", lambda client: client.update_log_settings({"log_verbose_level": "much"}), "400", "log_verbose_level"),
    ("trace settings", lambda client: client.get_trace_settings(), "400", "trace"),
    ("new trace settings", lambda client: client.update_trace_settings("scale", {"trace_rate": "1"}), "400", "trace"),
    ("shared memory", lambda client: client.get_system_shared_memory_status(), "400", "shared memory"),
    (
        "shared memory region",
        lambda client: client.register_system_shared_memory("r", "/r", 4),
        "400",
        "shared memory",
    ),
    ("end of shared memory", lambda client: client.unregister_system_shared_memory(), "400", "shared memory"),
    ("CUDA memory", lambda client: client.get_cuda_shared_memory_status(), "400", "shared memory"),
    ("CUDA region", lambda client: client.register_cuda_shared_memory("r", b"h", 0, 4), "400", "shared memory"),
    ("end of CUDA memory", lambda client: client.unregister_cuda_shared_memory("r"), "400", "shared memory"),
]


@pytest.mark.parametrize(("call", "status", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_refused_is_refused_in_clear_words(
    client: triton.InferenceServerClient,
    call: Callable[[triton.InferenceServerClient], object],
    status: str,
    message: str,
) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        call(client)
    assert str(caught.value.status()) == status


def test_the_configuration_has_tritons_fields(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("scale", "1")
    assert config["name"] == "scale"
    assert config["platform"]
    assert "backend" in config


def test_statistics_count_what_was_asked(client: triton.InferenceServerClient) -> None:
    ones = given("x", np.ones((1, 4), np.float32), "FP32", binary=True)

    def counted() -> dict[str, Any]:
        (stats,) = client.get_inference_statistics("scale", "1")["model_stats"]
        return dict(stats)

    client.infer("scale", [ones], model_version="1")
    before = counted()
    for _ in range(3):
        client.infer("scale", [ones], model_version="1")
    after = counted()
    assert (after["name"], after["version"]) == ("scale", "1")
    assert after["inference_count"] - before["inference_count"] == 3
    success = [stats["inference_stats"]["success"] for stats in (before, after)]
    assert success[1]["count"] - success[0]["count"] == 3
    assert success[1]["ns"] > success[0]["ns"]
    names = {stats["name"] for stats in client.get_inference_statistics()["model_stats"]}
    assert "scale" in names


def test_log_settings_are_set_and_told(client: triton.InferenceServerClient) -> None:
    before = client.get_log_settings()
    try:
        assert client.update_log_settings({"log_verbose_level": 1})["log_verbose_level"] == 1
        assert client.get_log_settings() == {**before, "log_verbose_level": 1}
    finally:
        client.update_log_settings({"log_verbose_level": before["log_verbose_level"]})


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nothing", b"", 404),
        ("DELETE", "/v2/models/scale", b"", 405),
        ("POST", "/v2/models/scale/infer", b"{", 400),
        ("POST", "/v2/models/scale/infer", b"", 400),
        ("POST", "/v2/models/scale/infer", b"\xff\xfe", 400),
    ],
)
def test_every_error_body_is_json_with_an_error(server: str, method: str, path: str, body: bytes, status: int) -> None:
    connection = http.client.HTTPConnection(server, timeout=10)
    connection.request(method, path, body)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert response.status == status
    assert list(answer) == ["error"]


def test_a_body_in_json_needs_no_content_type(server: str) -> None:
    data = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [[1, 2, 3, 4]]}]}
    connection = http.client.HTTPConnection(server, timeout=10)
    connection.request("POST", "/v2/models/scale/versions/1/infer", json.dumps(data).encode())
    answer = json.loads(connection.getresponse().read())
    connection.close()
    assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2.0, 4.0, 6.0, 8.0]}]
    assert answer["parameters"]["tier"] == "edge"
