"""NVIDIA's `tritonclient` finds in us, over gRPC too, the server that it expects.

TIERLINE_CONFORMANCE_GRPC_URL (host:port) points the tests at another one, which must serve what `write_models` writes.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

SECONDS = 30

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
    "FP32": np.array([[-1.1, np.nan, np.inf]], np.float32),
    "FP64": np.array([[-1.1, 0, 1e308]], np.float64),
    "BYTES": np.array([["ä".encode(), b"", b"te\x00xt"]], np.object_),
}
ONES = np.ones((1, 4), np.float32)


@pytest.fixture
def client(grpc_server: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(grpc_server) as client:
        yield client


def given(name: str, array: Any, datatype: str = "FP32") -> triton.InferInput:
    tensor = triton.InferInput(name, array.shape, datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def refused(call: Callable[[], object]) -> tuple[str, str]:
    """Status and text of the error that `call` ends with."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    return str(caught.value.status()).removeprefix("StatusCode."), caught.value.message()


# --- health, metadata, management ------------------------------------------------------------------------------------


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert client.is_model_ready("scale", "1")
    assert not client.is_model_ready("scale", "9")
    assert not client.is_model_ready("none")
    assert "binary_tensor_data" in client.get_server_metadata().extensions
    metadata = client.get_model_metadata("scale", as_json=True)
    assert metadata["versions"] == ["1", "2"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "4"]}]
    assert refused(lambda: client.get_model_metadata("none"))[0] == "NOT_FOUND"
    assert refused(lambda: client.get_model_metadata("scale", "9"))[0] == "NOT_FOUND"


def test_the_configuration_is_one_that_triton_knows(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("scale", "2").config
    assert config.name == "scale"
    assert refused(lambda: client.get_model_config("none"))[0] == "NOT_FOUND"


def test_statistics_of_all_of_one_and_of_none(client: triton.InferenceServerClient) -> None:
    client.infer("sum", [given("a", ONES), given("b", ONES)])
    every = client.get_inference_statistics().model_stats
    one = client.get_inference_statistics("sum").model_stats
    assert {each.name for each in one} <= {"sum"} <= {each.name for each in every} | {"sum"}
    assert all(each.inference_stats.success.count > 0 for each in one)
    assert refused(lambda: client.get_inference_statistics("none"))[0] == "NOT_FOUND"


def test_the_repository_is_listed_and_models_come_and_go(client: triton.InferenceServerClient) -> None:
    listed = {(each.name, each.version): each.state for each in client.get_model_repository_index().models}
    assert listed["sum", "1"] == "READY"
    client.unload_model("sum")
    assert not client.is_model_ready("sum")
    tensors = [given("a", ONES), given("b", ONES)]
    assert refused(lambda: client.infer("sum", tensors))[0] in ("NOT_FOUND", "UNAVAILABLE")
    client.load_model("sum")
    assert client.is_model_ready("sum")
    assert refused(lambda: client.load_model("none"))[0] == "NOT_FOUND"
    assert refused(lambda: client.load_model("sum", config="{}"))[0] == "INVALID_ARGUMENT"


def test_log_settings_are_told_and_changed(client: triton.InferenceServerClient) -> None:
    assert client.get_log_settings().settings["log_info"].bool_param is True
    try:
        changed = client.update_log_settings({"log_info": False, "log_verbose_level": 1, "log_format": "ISO8601"})
        assert changed.settings["log_info"].bool_param is False
        assert changed.settings["log_verbose_level"].uint32_param == 1
        assert changed.settings["log_format"].string_param == "ISO8601"
    finally:
        client.update_log_settings({"log_info": True, "log_verbose_level": 0, "log_format": "default"})
    assert refused(lambda: client.update_log_settings({"log_level": 1}))[0] == "INVALID_ARGUMENT"


UNIMPLEMENTED: dict[str, Callable[[triton.InferenceServerClient], object]] = {
    "get_trace_settings": lambda client: client.get_trace_settings(),
    "update_trace_settings": lambda client: client.update_trace_settings(settings={"trace_rate": "1"}),
    "get_system_shared_memory_status": lambda client: client.get_system_shared_memory_status(),
    "register_system_shared_memory": lambda client: client.register_system_shared_memory("r", "/k", 4),
    "unregister_system_shared_memory": lambda client: client.unregister_system_shared_memory("r"),
    "get_cuda_shared_memory_status": lambda client: client.get_cuda_shared_memory_status(),
    "register_cuda_shared_memory": lambda client: client.register_cuda_shared_memory("r", b"aaaa", 0, 4),
    "unregister_cuda_shared_memory": lambda client: client.unregister_cuda_shared_memory("r"),
}


@pytest.mark.parametrize("name", UNIMPLEMENTED)
def test_what_is_not_there_says_so(client: triton.InferenceServerClient, name: str) -> None:
    status, text = refused(lambda: UNIMPLEMENTED[name](client))
    assert status == "UNIMPLEMENTED"
    assert "not supported" in text


# --- inferring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", VALUES)
def test_every_datatype_survives_the_round_trip(client: triton.InferenceServerClient, datatype: str) -> None:
    sent = VALUES[datatype]
    got = client.infer(f"identity_{datatype}", [given("x", sent, datatype)]).as_numpy("y")
    assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
    assert np.array_equal(got, sent, equal_nan=datatype.startswith("FP"))


def test_each_version_is_itself_and_the_highest_is_the_default(client: triton.InferenceServerClient) -> None:
    tensor = given("x", ONES)
    factors = [client.infer("scale", [tensor], model_version=version).as_numpy("y")[0, 0] for version in ("1", "2", "")]
    assert factors == [2, 3, 3]


def test_named_outputs_alone_are_returned(client: triton.InferenceServerClient) -> None:
    a, b = np.full((2, 4), 5, np.float32), np.ones((2, 4), np.float32)
    tensors = [given("a", a), given("b", b)]
    only = client.infer("sum", tensors, outputs=[triton.InferRequestedOutput("difference")])
    assert np.array_equal(only.as_numpy("difference"), a - b)
    assert only.as_numpy("sum") is None
    assert np.array_equal(client.infer("sum", tensors).as_numpy("sum"), a + b)


def test_the_request_id_and_the_marks_of_the_answer_come_back(client: triton.InferenceServerClient) -> None:
    options = {"priority": 1, "timeout": 1000, "parameters": {"note": "ü", "min_confidence": 0.0}}
    answer = client.infer("scale", [given("x", ONES)], request_id="né-7", **options).get_response()
    assert (answer.id, answer.model_name, answer.model_version) == ("né-7", "scale", "2")
    assert answer.parameters["tier"].string_param == "edge"
    assert answer.parameters["degraded"].bool_param is False


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_messages_are_read(client: triton.InferenceServerClient, algorithm: str) -> None:
    many = np.arange(40_000, dtype=np.float32).reshape(-1, 4)
    got = client.infer("scale", [given("x", many)], model_version="1", compression_algorithm=algorithm).as_numpy("y")
    assert np.array_equal(got, many * 2)


def test_many_requests_at_once_get_each_its_own_answer(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for index in range(50):
        tensor = given("x", np.full((1 + index % 3, 4), index, np.float32))
        client.async_infer(
            "scale", [tensor], lambda result, error: answers.put((result, error)), "1", request_id=str(index)
        )
    for _ in range(50):
        result, error = answers.get(timeout=SECONDS)
        assert error is None
        index = int(result.get_response().id)
        assert np.array_equal(result.as_numpy("y"), np.full((1 + index % 3, 4), 2 * index, np.float32))


@pytest.mark.parametrize(
    ("model", "version", "name", "array", "datatype", "code", "text"),
    [
        ("none", "", "x", ONES, "FP32", "NOT_FOUND", "none"),
        ("scale", "9", "x", ONES, "FP32", "NOT_FOUND", "9"),
        ("scale", "", "x", np.ones((1, 5), np.float32), "FP32", "INVALID_ARGUMENT", "'x'"),
        ("scale", "", "x", np.ones(4, np.float32), "FP32", "INVALID_ARGUMENT", "'x'"),
        ("scale", "", "x", np.ones((1, 4)), "FP64", "INVALID_ARGUMENT", "'x'"),
        ("scale", "", "z", ONES, "FP32", "INVALID_ARGUMENT", "'z'"),
    ],
)
def test_a_callers_fault_is_told_by_name(
    client: triton.InferenceServerClient,
    model: str,
    version: str,
    name: str,
    array: Any,
    datatype: str,
    code: str,
    text: str,
) -> None:
    status, message = refused(lambda: client.infer(model, [given(name, array, datatype)], model_version=version))
    assert status == code
    assert text in message


def test_what_this_server_does_not_do_with_outputs_is_refused(client: triton.InferenceServerClient) -> None:
    tensor = given("x", ONES)
    for output, text in (
        (triton.InferRequestedOutput("nothing"), "nothing"),
        (triton.InferRequestedOutput("y", class_count=3), "classification"),
    ):
        status, message = refused(lambda output=output: client.infer("scale", [tensor], outputs=[output]))
        assert status == "INVALID_ARGUMENT"
        assert text in message
    shared = triton.InferInput("x", [1, 4], "FP32")
    shared.set_shared_memory("region", 16)
    assert refused(lambda: client.infer("scale", [shared]))[0] == "INVALID_ARGUMENT"


def test_a_client_that_waits_no_longer_is_told_so(client: triton.InferenceServerClient) -> None:
    large = np.ones((250_000, 4), np.float32)  # 4 MB take longer to travel than the client waits
    assert refused(lambda: client.infer("scale", [given("x", large)], client_timeout=1e-4))[0] == "DEADLINE_EXCEEDED"


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_answers_every_request_also_those_that_fail(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for index in range(40):
        tensor = given("x", np.full((1, 5 if index == 7 else 4), index, np.float32))
        client.async_stream_infer(
            "scale", [tensor], "1", request_id=str(index), enable_empty_final_response=index % 2 == 0
        )
    seen = {}
    for _ in range(40):
        result, error = answers.get(timeout=SECONDS)
        if error is not None:
            assert "'x'" in error.message()
            continue
        response = result.get_response()
        seen[int(response.id)] = float(result.as_numpy("y")[0, 0])
        asked = int(response.id) % 2 == 0
        assert response.parameters["triton_final_response"].bool_param is asked
    client.stop_stream()
    assert seen == {index: 2.0 * index for index in range(40) if index != 7}


def test_a_stream_can_be_left_with_requests_under_way(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(result))
    for _ in range(10):
        client.async_stream_infer("scale", [given("x", ONES)])
    client.stop_stream(cancel_requests=True)
    assert client.infer("scale", [given("x", ONES)]).as_numpy("y")[0, 0] == 3


async def test_the_asynchronous_client_works_too(grpc_server: str) -> None:
    async with triton_aio.InferenceServerClient(grpc_server) as client:
        assert await client.is_server_ready()
        answer = await client.infer("scale", [triton_input("x", ONES)], model_version="1", request_id="a")
        assert answer.as_numpy("y")[0, 0] == 2

        async def requests() -> Any:
            for index in range(5):
                tensor = triton_input("x", np.full((1, 4), index, np.float32))
                yield {"model_name": "scale", "inputs": [tensor], "request_id": str(index), "model_version": "1"}

        seen = {}
        async for result, error in client.stream_infer(requests()):
            assert error is None
            seen[result.get_response().id] = float(result.as_numpy("y")[0, 0])
        assert seen == {str(index): 2.0 * index for index in range(5)}


def triton_input(name: str, array: Any) -> Any:
    tensor = triton_aio.InferInput(name, array.shape, "FP32")
    tensor.set_data_from_numpy(array)
    return tensor
