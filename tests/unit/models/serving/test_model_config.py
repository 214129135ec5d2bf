from __future__ import annotations

import pytest
from session_fake import FakeSession, loaded

from models.serving.batching import Batching
from models.serving.model_config import model_config
from models.serving.model_settings import ModelSettings
from models.serving.registered import Registered
from models.serving.version_policy import Latest
from models.tensor import DTYPES, TensorSpec


def registered(*inputs: TensorSpec, rows: int = 1) -> Registered:
    session = FakeSession(inputs=inputs) if inputs else FakeSession()
    made = loaded(session)
    made.batching = Batching(rows, "because")
    return Registered("m", made, cost=1234)


def test_a_model_that_is_batched_states_its_rows_and_leaves_them_out_of_the_shape() -> None:
    config = model_config("m", registered(rows=16), ModelSettings(cache=True, version_policy=Latest(2)))
    assert (config["name"], config["platform"], config["backend"]) == ("m", "fake", "fake")
    assert config["version_policy"] == {"latest": {"num_versions": 2}}
    assert config["max_batch_size"] == 16
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}]
    assert config["output"] == [{"name": "y", "data_type": "TYPE_FP32", "dims": [2]}]
    assert config["instance_group"] == [{"name": "m", "kind": "KIND_CPU", "count": 1}]
    assert config["dynamic_batching"] == {"preferred_batch_size": [16], "max_queue_delay_microseconds": 0}
    assert config["response_cache"] == {"enable": True}
    assert config["parameters"]["memory_bytes"] == {"string_value": "1234"}  # type: ignore[index]


@pytest.mark.parametrize(
    ("known", "dims"),
    [(registered(), [-1, 2]), (registered(TensorSpec("x", "FP32", (3, 2)), rows=16), [3, 2])],
)
def test_a_model_that_is_not_batched_states_its_whole_shape(known: Registered, dims: list[int]) -> None:
    config = model_config("m", known, ModelSettings())
    assert config["max_batch_size"] == 0
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": dims}]
    assert "dynamic_batching" not in config


def test_every_datatype_has_its_name() -> None:
    names = [
        model_config("m", registered(TensorSpec("x", datatype, (1,))), ModelSettings())["input"][0]["data_type"]  # type: ignore[index]
        for datatype in DTYPES
    ]
    assert names == [
        f"TYPE_{name}"
        for name in ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
    ] + ["TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING"]  # fmt: skip


def test_a_grpc_client_can_read_it() -> None:
    service = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    json_format = pytest.importorskip("google.protobuf.json_format")
    config = model_config("m", registered(rows=16), ModelSettings())
    message = json_format.ParseDict(config, service.ModelConfig())
    assert (message.max_batch_size, message.input[0].data_type) == (16, service.TYPE_FP32)
