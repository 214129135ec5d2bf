from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.errors import InvalidRequest, TooLarge
from models.serving.caller import Caller
from models.serving.codec import MAX_INPUTS
from models.serving.grpc import inference_pb2 as pb
from models.serving.grpc.codec import Asked, Heads, decode_request, encode_response
from models.serving.grpc.contents import MAX_TYPED_VALUES
from models.serving.predictor import InferResponse
from models.tensor import DTYPES, MAX_BYTES_ELEMENTS, MAX_RANK, encode_bytes

# datatype -> (its field of InferTensorContents, values that try its limits)
TYPED: dict[str, tuple[str, list[Any]]] = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-(2**15), 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 2**16 - 1]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "FP32": ("fp32_contents", [float("inf"), -0.5]),
    "FP64": ("fp64_contents", [1e308, -0.1]),
    "BYTES": ("bytes_contents", ["ä".encode(), b"\x00"]),
}


def tensor(name: str = "x", datatype: str = "FP32", shape: Any = (1, 2), **contents: Any) -> Any:
    made = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    if contents:
        made.contents.CopyFrom(pb.InferTensorContents(**contents))
    return made


def request(*inputs: Any, raws: Any = (), parameters: Any = None, **fields: Any) -> bytes:
    message = pb.ModelInferRequest(**{"model_name": "m", **fields}, inputs=inputs, raw_input_contents=raws)
    for name, (kind, value) in (parameters or {}).items():
        setattr(message.parameters[name], kind, value)
    return bytes(message.SerializeToString())


def decode(data: bytes, heads: Heads | None = None) -> Asked:
    return decode_request(data, {} if heads is None else heads)


# --- what is right ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents_of_every_datatype_arrive(datatype: str) -> None:
    field, values = TYPED[datatype]
    array = decode(request(tensor(datatype=datatype, **{field: values}))).inputs["x"]
    assert array.dtype == DTYPES[datatype]
    assert array.shape == (1, 2)
    assert array.reshape(-1).tolist() == values


@pytest.mark.parametrize("datatype", DTYPES)
def test_raw_contents_of_every_datatype_arrive(datatype: str) -> None:
    dtype = DTYPES[datatype]
    sent = np.array([b"\x00a", b""], object) if datatype == "BYTES" else np.array([1, 0], dtype)
    raw = encode_bytes(sent, "x") if datatype == "BYTES" else sent.tobytes()
    array = decode(request(tensor(datatype=datatype), raws=[raw])).inputs["x"]
    assert array.dtype == dtype
    assert array.tolist() == [sent.tolist()]


def test_a_raw_tensor_is_a_read_only_view_of_the_message() -> None:
    data = request(tensor(shape=(1, 1024)), raws=[bytes(4096)])
    for asked in (decode(data), decode(data, {})):
        array = asked.inputs["x"]
        assert not array.flags.writeable
        assert np.shares_memory(array, np.frombuffer(data, np.uint8))


def test_everything_beside_the_tensors_is_told() -> None:
    data = request(
        tensor(fp32_contents=[1, 2]),
        id="né-7",
        model_version="3",
        outputs=[{"name": "b"}, {"name": "a"}],
        parameters={
            "priority": ("uint64_param", 1),
            "min_confidence": ("double_param", 0.25),
            "binary_data_output": ("bool_param", True),
            "note": ("string_param", "ü"),
        },
    )
    asked = decode(data).request(Caller(client="c", tenant="t"), 12.5, "00-1-2-01")
    assert (asked.model, asked.version, asked.outputs, asked.id) == ("m", "3", ("b", "a"), "né-7")
    assert (asked.priority, asked.min_confidence, asked.deadline) == (1, 0.25, 12.5)
    assert (asked.client, asked.tenant, asked.trace) == ("c", "t", "00-1-2-01")
    assert asked.parameters == {"priority": 1, "min_confidence": 0.25, "binary_data_output": True, "note": "ü"}


def test_what_is_not_said_is_none() -> None:
    asked = decode(request(tensor(fp32_contents=[1, 2]))).request(Caller(), None, None)
    assert (asked.version, asked.id, asked.outputs, asked.min_confidence, asked.priority) == (None, None, (), None, 0)


def test_contents_without_a_value_beside_raw_ones_are_none() -> None:
    empty = tensor()
    empty.contents.SetInParent()
    assert decode(request(empty, raws=[bytes(8)])).inputs["x"].tolist() == [[0, 0]]


# --- a head that comes again -----------------------------------------------------------------------------------------


def test_a_head_that_comes_again_brings_its_own_numbers_and_id() -> None:
    heads: Heads = {}
    for index in range(3):
        raw = np.array([index, -index], np.float32)
        asked = decode(request(tensor(), raws=[raw.tobytes()], id=str(index)), heads)
        assert asked.inputs["x"].tolist() == [[index, -index]]
        assert asked.id == str(index)
    assert len(heads) == 1


def test_a_known_head_with_other_sizes_is_checked_again() -> None:
    heads: Heads = {}
    two = (tensor("a"), tensor("b"))
    decode(request(*two, raws=[bytes(8), bytes(8)]), heads)
    for raws in ([bytes(12), bytes(4)], [bytes(16)], [bytes(8)] * 3, []):
        with pytest.raises(InvalidRequest, match=r"'a'|'b'|3 raw_input_contents"):
            decode(request(*two, raws=raws), heads)


@pytest.mark.parametrize(("datatype", "bad"), [("BOOL", b"\x01\x02"), ("BYTES", bytes(7) + b"\x09")])
def test_bytes_that_must_be_looked_at_are_looked_at_every_time(datatype: str, bad: bytes) -> None:
    heads: Heads = {}
    good = bytes(len(bad))
    decode(request(tensor(datatype=datatype), raws=[good]), heads)
    with pytest.raises(InvalidRequest, match="'x'"):
        decode(request(tensor(datatype=datatype), raws=[bad]), heads)


def test_heads_that_vary_without_end_are_not_all_kept() -> None:
    heads: Heads = {}
    for index in range(600):
        decode(request(tensor(), raws=[bytes(8)], model_name=f"m{index}"), heads)
    assert len(heads) <= 256


# --- what is wrong ---------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[bytes, str]] = {
    "not protobuf inside": (b"\x2a\x02\x0a\x05", "not a ModelInferRequest"),
    "a name that is not UTF-8": (b"\x0a\x01\xff", "not a ModelInferRequest"),
    "an unknown datatype": (request(tensor(datatype="FP8")), "input 'x': datatype 'FP8' is none of"),
    "an input twice": (request(tensor(), tensor(), raws=[bytes(8)] * 2), "input 'x' is given twice"),
    "fewer raw contents than inputs": (
        request(tensor("a"), tensor("b"), raws=[bytes(8)]),
        "input 'b' has no raw_input",
    ),
    "more raw contents than inputs": (request(tensor(), raws=[bytes(8)] * 2), "2 raw_input_contents for 1 inputs"),
    "raw and typed": (request(tensor(fp32_contents=[1, 2]), raws=[bytes(8)]), "input 'x' has contents, and"),
    "too few raw bytes": (
        request(tensor(), raws=[bytes(4)]),
        r"input 'x': .*takes 8 bytes, raw_input_contents\[0\] has 4",
    ),
    "neither raw nor typed": (request(tensor()), r"input 'x': shape \[1, 2\] needs 2 elements, fp32_contents has 0"),
    "too many values": (request(tensor(fp32_contents=[1] * 3)), "needs 2 elements, fp32_contents has 3"),
    "values in another field": (
        request(tensor(fp64_contents=[1, 2])),
        "FP32 belongs into fp32_contents, not into fp64",
    ),
    "typed FP16": (request(tensor(datatype="FP16", fp32_contents=[1, 2])), "input 'x': FP16 has no typed contents"),
    "INT8 above": (
        request(tensor(datatype="INT8", int_contents=[1, 128])),
        r"input 'x': element \[0, 1\] is 128, outside INT8 \(-128 to 127\)",
    ),
    "INT16 below": (request(tensor(datatype="INT16", int_contents=[-32769, 0])), r"element \[0, 0\] is -32769"),
    "UINT8 above": (
        request(tensor(datatype="UINT8", uint_contents=[256, 0])),
        r"element \[0, 0\] is 256, outside UINT8",
    ),
    "a BOOL byte of 2": (request(tensor(datatype="BOOL"), raws=[b"\x01\x02"]), "a BOOL byte is neither 0 nor 1"),
    "broken BYTES": (request(tensor(datatype="BYTES"), raws=[bytes(4) + b"\x05\x00\x00\x00ab"]), "element 1 claims 5"),
    "a negative dim": (request(tensor(shape=(-1, 2)), raws=[bytes(8)]), "axis 0 of the shape is a negative"),
    "too many dims": (request(tensor(shape=[1] * (MAX_RANK + 1)), raws=[bytes(4)]), "dimensions, at most"),
    "shared memory": (
        request(
            pb.ModelInferRequest.InferInputTensor(
                name="x", parameters={"shared_memory_region": pb.InferParameter(string_param="r")}
            )
        ),
        "input 'x': shared memory regions are not supported",
    ),
    "an output twice": (
        request(tensor(fp32_contents=[1, 2]), outputs=[{"name": "y"}] * 2),
        "output 'y' is asked for twice",
    ),
    "an output in shared memory": (
        request(outputs=[{"name": "y", "parameters": {"shared_memory_region": pb.InferParameter(string_param="r")}}]),
        "output 'y': shared memory",
    ),
    "classification": (
        request(outputs=[{"name": "y", "parameters": {"classification": pb.InferParameter(int64_param=3)}}]),
        "output 'y': the classification extension",
    ),
    "a priority of text": (request(parameters={"priority": ("string_param", "1")}), "parameters.priority is not"),
    "a priority of nothing": (
        bytes(pb.ModelInferRequest(parameters={"priority": pb.InferParameter()}).SerializeToString()),
        "parameters.priority",
    ),
    "a confidence of 2": (request(parameters={"min_confidence": ("int64_param", 2)}), "parameters.min_confidence"),
    "a confidence of NaN": (request(parameters={"min_confidence": ("double_param", float("nan"))}), "min_confidence"),
    "binary_data_output of 1": (request(parameters={"binary_data_output": ("int64_param", 1)}), "binary_data_output"),
}


@pytest.mark.parametrize(("data", "text"), WRONG.values(), ids=WRONG.keys())
def test_a_callers_fault_is_told_by_name(data: bytes, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        decode(data)


LARGE: dict[str, tuple[bytes, str]] = {
    "a dim of 2^62": (request(tensor(shape=(2**62, 2)), raws=[bytes(8)]), "axis 0 of the shape"),
    "dims that multiply to 2^60": (request(tensor(shape=(2**20,) * 3), raws=[bytes(8)]), "spans more than"),
    "empty, but absurd": (request(tensor(shape=(0, 2**28, 2**28)), raws=[b""]), "spans more than"),
    "inputs": (request(*[tensor(str(index)) for index in range(MAX_INPUTS + 1)]), "at most 256 are accepted"),
    "typed values": (
        request(tensor(datatype="BOOL", shape=[MAX_TYPED_VALUES + 1], bool_contents=[True] * (MAX_TYPED_VALUES + 1))),
        "typed values are not accepted",
    ),
    "typed values of all inputs": (
        request(
            *[
                tensor(name, "BOOL", [MAX_TYPED_VALUES // 2 + 1], bool_contents=[True] * (MAX_TYPED_VALUES // 2 + 1))
                for name in "ab"
            ]
        ),
        "input 'b': more than .* typed values",
    ),
    "typed texts": (
        request(
            tensor(datatype="BYTES", shape=[MAX_BYTES_ELEMENTS + 1], bytes_contents=[b""] * (MAX_BYTES_ELEMENTS + 1))
        ),
        "BYTES elements are not accepted at once",
    ),
    "texts of all inputs": (
        request(
            *[tensor(name, "BYTES", [MAX_BYTES_ELEMENTS // 2 + 1]) for name in "ab"],
            raws=[bytes(4 * (MAX_BYTES_ELEMENTS // 2 + 1))] * 2,
        ),
        "BYTES elements are not accepted in one request",
    ),
}


@pytest.mark.parametrize(("data", "text"), LARGE.values(), ids=LARGE.keys())
def test_what_is_absurdly_large_is_refused_before_it_costs_memory(data: bytes, text: str) -> None:
    with pytest.raises(TooLarge, match=text):
        decode(data)


# --- answers ---------------------------------------------------------------------------------------------------------


def answered(outputs: Any, **fields: Any) -> InferResponse:
    return InferResponse(outputs=outputs, model="m", package="p", version="2", tier="edge", **fields)


@pytest.mark.parametrize("datatype", DTYPES)
def test_outputs_are_raw_with_their_exact_bits_and_shape(datatype: str) -> None:
    array = np.array([[b"", b"\x00"]], object) if datatype == "BYTES" else np.array([[1, 0]], DTYPES[datatype])
    message = pb.ModelInferResponse.FromString(encode_response(answered({"y": array}), None))
    assert (message.outputs[0].name, message.outputs[0].datatype, message.outputs[0].shape) == ("y", datatype, [1, 2])
    assert not message.outputs[0].HasField("contents")
    raw = encode_bytes(array, "y") if datatype == "BYTES" else array.tobytes()
    assert message.raw_output_contents == [raw]


def test_an_answer_says_where_it_came_from_and_why() -> None:
    answer = answered({"y": np.zeros(300)}, confidence=0.5, reason="low_confidence", degraded=True)
    message = pb.ModelInferResponse.FromString(encode_response(answer, "né", final=True))
    assert (message.model_name, message.model_version, message.id) == ("m", "2", "né")
    said = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in message.parameters.items()}
    assert said == {
        "tier": "edge",
        "package": "p",
        "reason": "low_confidence",
        "degraded": True,
        "confidence": 0.5,
        "triton_final_response": True,
    }


def test_outputs_of_odd_memory_leave_in_row_major_order() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    message = pb.ModelInferResponse.FromString(encode_response(answered({"y": array, "e": np.zeros((0, 2))}), None))
    assert np.frombuffer(message.raw_output_contents[0], "<i4").tolist() == [0, 3, 1, 4, 2, 5]
    assert (message.outputs[1].shape, message.raw_output_contents[1]) == ([0, 2], b"")
