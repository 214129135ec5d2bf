"""Bytes to tensors and back: nothing is wrapped, rounded, reshaped or guessed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from msgspec import structs

from models.errors import InvalidRequest, TooLarge, Unreachable
from models.serving.codec import (
    MAX_HEAD_BYTES,
    MAX_HEADS,
    MAX_INPUTS,
    MAX_JSON_BYTES,
    MAX_JSON_CONTAINERS,
    MAX_JSON_VALUES,
    Heads,
    OutputForm,
    decode_request,
    encode_response,
)
from models.serving.codec_client import decode_response, encode_request
from models.serving.codec_tensor import encode_binary
from models.serving.predictor import InferRequest, InferResponse
from models.tensor import DTYPES, MAX_BYTES_ELEMENTS, Array

NUMBERS = [name for name in DTYPES if name != "BYTES"]


def infer_body(
    datatype: str = "FP32", shape: Sequence[object] = (2,), data: object = (1, 2), **more: object
) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": datatype, "shape": list(shape), "data": data}], **more}


def decode(body: object, binary: bytes = b"", header_length: int | None = None) -> InferRequest:
    head = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(head) if binary and header_length is None else header_length
    return decode_request(head + binary, length, model="m")[0]


def answer_of(outputs: dict[str, Array], **more: Any) -> InferResponse:
    return InferResponse(outputs=outputs, model="m", package="p", version="3", tier="edge", **more)


def arrays(datatype: str) -> st.SearchStrategy[Array]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    if datatype == "BYTES":
        return hnp.arrays(np.object_, shapes, elements=st.binary(max_size=9), fill=st.nothing())
    return hnp.arrays(DTYPES[datatype], shapes)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("datatype", DTYPES)
def test_binary_tensors_arrive_bit_for_bit(datatype: str, data: st.DataObject) -> None:
    sent = data.draw(st.dictionaries(st.text(max_size=5), arrays(datatype), min_size=1, max_size=3))
    parts = encode_request(InferRequest(model="m", inputs=sent))
    request, form = decode_request(b"".join(parts), len(parts[0]), model="m")
    assert_same(request.inputs, sent)
    answer_parts, length = encode_response(answer_of(dict(request.inputs)), form, "id")
    assert_same(decode_response(b"".join(answer_parts), length, request, "edge").outputs, sent)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("datatype", [name for name in NUMBERS if name != "FP16"])
def test_json_tensors_arrive_bit_for_bit(datatype: str, data: st.DataObject) -> None:
    sent = data.draw(arrays(datatype))
    if sent.dtype.kind == "f":
        sent = np.nan_to_num(sent, nan=0.5, posinf=1.5, neginf=-1.5)
    parts, length = encode_response(answer_of({"y": sent}), OutputForm(False), None)
    assert length is None
    answer = decode_response(parts[0], None, InferRequest(model="m", inputs={}), "edge")
    assert_same(answer.outputs, {"y": sent})


def assert_same(got: Any, sent: Any) -> None:
    assert list(got) == list(sent)
    for name, array in sent.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        if array.dtype == np.object_:
            assert got[name].tolist() == array.tolist()
        else:
            assert got[name].tobytes() == array.tobytes()


def test_flat_and_nested_data_mean_the_same_tensor() -> None:
    flat = decode(infer_body("INT32", (2, 3), [1, 2, 3, 4, 5, 6])).inputs["x"]
    nested = decode(infer_body("INT32", (2, 3), [[1, 2, 3], [4, 5, 6]])).inputs["x"]
    assert flat.tolist() == nested.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_binary_tensor_is_a_view_of_the_body() -> None:
    tensor = np.arange(4, dtype=np.float32)
    parts = encode_request(InferRequest(model="m", inputs={"x": tensor}))
    body = b"".join(parts)
    request, _ = decode_request(body, len(parts[0]), model="m")
    array = request.inputs["x"]
    assert np.shares_memory(array, np.frombuffer(body, np.uint8))
    assert array.flags.aligned


def test_text_is_utf8_both_ways() -> None:
    request = decode(infer_body("BYTES", (2,), ["ä", "b"]))
    assert request.inputs["x"].tolist() == ["ä".encode(), b"b"]
    parts, _ = encode_response(answer_of({"y": request.inputs["x"]}), OutputForm(False), None)
    assert json.loads(parts[0])["outputs"][0]["data"] == ["ä", "b"]


BAD_DATA: list[tuple[str, dict[str, Any], str]] = [
    ("out of range", infer_body("INT8", (2,), [1, 300]), r"input 'x': element \[1\] is 300, outside INT8"),
    ("out of range, nested", infer_body("UINT8", (1, 2), [[1, -1]]), r"input 'x': element \[0, 1\] is -1"),
    ("above 64 bits", infer_body("UINT64", (1,), [2**64]), r"input 'x': element \[0\]"),
    ("fraction as integer", infer_body("INT32", (1,), [1.5]), r"input 'x'.*\$\[0\]"),
    ("number as BOOL", infer_body("BOOL", (1,), [1]), r"input 'x'.*bool"),
    ("BOOL as number", infer_body("FP32", (1,), [True]), r"input 'x'.*float"),
    ("text as number", infer_body("FP32", (1,), ["1"]), "input 'x'"),
    ("null", infer_body("FP32", (1,), [None]), "input 'x'"),
    ("above binary32", infer_body("FP32", (1,), [3.5e38]), "input 'x'"),
    ("number as text", infer_body("BYTES", (1,), [1]), "input 'x'"),
    ("ragged", infer_body("FP32", (2, 2), [[1, 2], [3]]), "input 'x'.*1 elements where axis 1 has 2"),
    ("nested too deep", infer_body("FP32", (2,), [[1], [2]]), "input 'x'"),
    ("too few", infer_body("FP32", (3,), [1, 2]), "needs 3 elements, data has 2"),
    ("too many", infer_body("FP32", (1,), [1, 2]), "needs 1 elements, data has 2"),
    ("negative dimension", infer_body("FP32", (-1,), [1]), "negative dimension"),
    ("half precision", infer_body("FP16", (1,), [1.0]), "FP16 has no JSON form"),
    ("unknown datatype", infer_body("FP8", (1,), [1.0]), "datatype 'FP8'"),
    ("data is no list", infer_body("FP32", (1,), 1.0), "input 'x'"),
    ("dimension is no integer", infer_body("FP32", (1.5,), [1.0]), r"inputs\[0\].shape\[0\]"),
    ("dimension above 64 bits", infer_body("FP32", (2**70,), [1.0]), "shape"),
    ("no data", {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}]}, "neither data nor"),
    ("no name", {"inputs": [{"datatype": "FP32", "shape": [1], "data": [1]}]}, "name"),
    ("no inputs", {}, "inputs"),
    ("same name twice", {"inputs": infer_body()["inputs"] * 2}, "input 'x' is given twice"),
    ("same output twice", infer_body(outputs=[{"name": "y"}, {"name": "y"}]), "output 'y' is asked for twice"),
    ("confidence", infer_body(parameters={"min_confidence": 1.5}), "min_confidence"),
    ("confidence as text", infer_body(parameters={"min_confidence": "1"}), "min_confidence"),
    ("priority", infer_body(parameters={"priority": "high"}), "priority"),
    ("binary_data_output", infer_body(parameters={"binary_data_output": 1}), "binary_data_output"),
    (
        "shared memory",
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"shared_memory_region": "r"}}]},
        "shared memory",
    ),
    ("classification", infer_body(outputs=[{"name": "y", "parameters": {"classification": 3}}]), "classification"),
]


@pytest.mark.parametrize(("body", "message"), [case[1:] for case in BAD_DATA], ids=[case[0] for case in BAD_DATA])
def test_bad_json_is_refused_naming_the_field(body: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidRequest, TooLarge), match=message):
        decode(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1e400]}]}',
        b'{"inputs":[{"name":"\xff","datatype":"FP32","shape":[1],"data":[1]}]}',
        b'{"inputs":[],"parameters":{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}}",
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":' + b"[" * 30_000 + b"]" * 30_000 + b"}]}",
        b'{"inputs":[]} trailing',
    ],
)
def test_broken_json_is_a_callers_fault(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode(body)


def binary_input(size: object, shape: Sequence[int] = (2,), datatype: str = "FP32") -> dict[str, Any]:
    parameters = {"binary_data_size": size}
    return {"inputs": [{"name": "x", "datatype": datatype, "shape": list(shape), "parameters": parameters}]}


@pytest.mark.parametrize(
    ("body", "binary", "message"),
    [
        (binary_input(4), b"1234", "takes 8 bytes, binary_data_size is 4"),
        (binary_input(8), b"1234", "4 bytes are left"),
        (binary_input(8), b"1234567890", "2 bytes of the body belong to no input"),
        (binary_input(-8), b"12345678", "-8"),
        (binary_input(8, (1 << 40, 1 << 40)), b"12345678", "elements"),
        (binary_input(2, (2,), "BOOL"), b"\1\2", "neither 0 nor 1"),
        (binary_input(4, (1,), "BYTES"), b"\xff\xff\xff\xff", "claims 4294967295 bytes"),
        (binary_input("8"), b"12345678", "binary_data_size"),
        (infer_body(), b"1", "1 bytes of the body belong to no input"),
    ],
)
def test_binary_data_must_add_up_exactly(body: dict[str, Any], binary: bytes, message: str) -> None:
    with pytest.raises((InvalidRequest, TooLarge), match=message):
        decode(body, binary)


@pytest.mark.parametrize("length", [0, 10_000])
def test_a_header_length_outside_the_body_is_refused(length: int) -> None:
    with pytest.raises(InvalidRequest, match="inference-header-content-length"):
        decode(infer_body(), header_length=length)


def test_each_output_takes_its_own_form() -> None:
    wanted = [{"name": "a", "parameters": {"binary_data": False}}, {"name": "b"}]
    body = json.dumps(infer_body(outputs=wanted, parameters={"binary_data_output": True})).encode()
    request, form = decode_request(body, None, model="m")
    assert request.outputs == ("a", "b")
    ones = np.ones(2, np.float32)
    parts, length = encode_response(answer_of({"a": ones, "b": ones}, confidence=0.25), form, "ü")
    assert length == len(parts[0])
    assert b"".join(parts[1:]) == ones.tobytes()
    assert json.loads(parts[0]) == {
        "model_name": "m",
        "model_version": "3",
        "id": "ü",
        "parameters": {"tier": "edge", "package": "p", "reason": "local", "degraded": False, "confidence": 0.25},
        "outputs": [
            {"name": "a", "datatype": "FP32", "shape": [2], "data": [1.0, 1.0]},
            {"name": "b", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
        ],
    }


def test_numbers_json_cannot_say_become_null() -> None:
    array = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    parts, _ = encode_response(answer_of({"y": array}, confidence=float("nan")), OutputForm(False), None)
    answer = json.loads(parts[0])
    assert answer["outputs"][0]["data"] == [None, None, None, 1.0]
    assert answer["parameters"]["confidence"] is None


def test_a_strided_output_is_sent_in_row_major_order() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    for form in (OutputForm(False), OutputForm(True)):
        parts, length = encode_response(answer_of({"y": array}), form, None)
        answer = decode_response(b"".join(parts), length, InferRequest(model="m", inputs={}), "edge")
        assert answer.outputs["y"].tolist() == array.tolist()


@pytest.mark.parametrize("array", [np.ones(1, np.float16), np.array([b"\xff"], np.object_)])
def test_an_output_without_json_form_is_refused_with_the_way_out(array: Array) -> None:
    with pytest.raises(InvalidRequest, match=r"output 'y'.*binary_data"):
        encode_response(answer_of({"y": array}), OutputForm(False), None)


def test_what_the_router_needs_survives_the_way() -> None:
    asked = InferRequest(
        model="m", inputs={"x": np.ones(1)}, outputs=("y",), id="7", min_confidence=0.5, priority=2, parameters={"a": 1}
    )
    parts = encode_request(asked)
    got, form = decode_request(b"".join(parts), len(parts[0]), model="m")
    assert (got.outputs, got.id, got.min_confidence, got.priority) == (("y",), "7", 0.5, 2)
    assert got.parameters["a"] == 1
    answered = answer_of({"y": np.ones(1)}, confidence=0.75, reason="upward", degraded=True)
    answer_parts, length = encode_response(answered, form, got.id)
    answer = decode_response(b"".join(answer_parts), length, asked, "cloud")
    assert (answer.tier, answer.package, answer.version, answer.id) == ("edge", "p", "3", "7")
    assert (answer.confidence, answer.reason, answer.degraded) == (0.75, "upward", True)


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1]}]}'])
def test_an_answer_that_is_none_counts_as_no_answer(body: bytes) -> None:
    with pytest.raises(Unreachable, match="edge"):
        decode_response(body, None, InferRequest(model="m", inputs={}), "edge")


def test_a_plain_protocol_answer_without_our_marks_is_understood() -> None:
    output = {"name": "y", "datatype": "INT64", "shape": [1], "data": [4]}
    body = msgspec.json.encode({"model_name": "m", "outputs": [output], "parameters": {"sequence_id": 0}})
    answer = decode_response(body, None, InferRequest(model="m", inputs={}), "cloud")
    assert answer.outputs["y"].tolist() == [4]
    assert (answer.tier, answer.confidence, answer.degraded) == ("cloud", None, False)


def json_of(datatype: bytes, shape: bytes, data: bytes) -> bytes:
    return b'{"inputs":[{"name":"x","datatype":"%b","shape":%b,"data":%b}]}' % (datatype, shape, data)


DEEP = b"[" * 15 + b"0" + b"]" * 15


@pytest.mark.parametrize(
    "body",
    [
        json_of(b"FP32", b"[1]", b"[1]" + b" " * MAX_JSON_BYTES),
        json_of(b"FP32", b"[%d]" % (MAX_JSON_VALUES + 1), b"[1%b]" % (b",1" * MAX_JSON_VALUES)),
        json_of(b"FP32", b"[5000%b]" % (b",1" * 15), b"[%b]" % b",".join([DEEP] * 5000)),
        b'{"inputs":[],"parameters":{"a":[[]%b]}}' % (b",[]" * MAX_JSON_CONTAINERS),
        json_of(b"BYTES", b"[%d]" % (MAX_BYTES_ELEMENTS + 1), b'[""%b]' % (b',""' * MAX_BYTES_ELEMENTS)),
        msgspec.json.encode({"inputs": infer_body()["inputs"] * (MAX_INPUTS + 1)}),
    ],
    ids=["bytes", "values", "nested lists", "lists in parameters", "texts", "inputs"],
)
def test_json_that_would_hold_up_the_loop_is_too_large(body: bytes) -> None:
    with pytest.raises(TooLarge):
        decode(body)


def test_texts_are_counted_over_all_inputs() -> None:
    count = MAX_BYTES_ELEMENTS // 2 + 1
    texts = {"datatype": "BYTES", "shape": [count], "parameters": {"binary_data_size": 4 * count}}
    with pytest.raises(TooLarge, match="in one request"):
        decode({"inputs": [{"name": "a", **texts}, {"name": "b", **texts}]}, bytes(8 * count))


def test_an_image_in_nested_json_is_accepted() -> None:
    image = np.linspace(0, 1, 224 * 224 * 3, dtype=np.float32).reshape(1, 224, 224, 3)
    assert np.array_equal(decode(infer_body("FP32", image.shape, image.tolist())).inputs["x"], image)


@pytest.mark.parametrize("shape", [(0, 2**63), (0, 2**28, 2**28, 2**28), (10**4200, 10**4200)])
@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BYTES"])
def test_a_shape_that_no_array_can_have_is_the_callers_fault_in_json_and_in_binary(
    datatype: str, shape: tuple[int, ...]
) -> None:
    head = json.dumps(binary_input(0, shape, datatype)).encode()
    for body, length in ((json.dumps(infer_body(datatype, shape, [])).encode(), None), (head, len(head))):
        with pytest.raises(TooLarge, match="input 'x'"):
            decode(body, header_length=length)


def test_an_answer_with_an_absurd_tensor_counts_as_no_answer() -> None:
    output = {"name": "y", "datatype": "FP32", "shape": [1 << 40], "data": []}
    with pytest.raises(Unreachable, match="edge"):
        decode_response(msgspec.json.encode({"outputs": [output]}), None, InferRequest(model="m", inputs={}), "edge")


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [nested(20_000), object()], ids=["deep", "object"])
def test_parameters_that_cannot_be_sent_on_are_refused(value: object) -> None:
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        encode_request(InferRequest(model="m", inputs={}, parameters={"a": value}))


def test_text_arrays_are_sent_as_their_text() -> None:
    assert encode_binary(np.array(["ab", "c"]), "y") == b"\2\0\0\0ab\1\0\0\0c"
    parts, _ = encode_response(answer_of({"y": np.array(["ab", "c"])}), OutputForm(False), None)
    assert json.loads(parts[0])["outputs"][0]["data"] == ["ab", "c"]


@pytest.mark.parametrize("binary", [True, False])
def test_an_output_element_that_is_no_text_is_refused_naming_it(binary: bool) -> None:
    with pytest.raises(InvalidRequest, match="output 'y': element 0 "):
        encode_response(answer_of({"y": np.array([5], object)}), OutputForm(binary), None)


def ask_with(heads: Heads, array: Array, **more: Any) -> InferRequest:
    parts = encode_request(InferRequest(model="m", inputs={"x": array, "z": array}, **more))
    return decode_request(b"".join(parts), len(parts[0]), model="m", heads=heads)[0]


def test_a_remembered_head_changes_nothing_but_the_numbers() -> None:
    heads: Heads = {}
    for start in range(3):
        array = np.arange(start, start + 6, dtype=np.int32).reshape(2, 3)
        got = ask_with(heads, array, min_confidence=0.5, outputs=("y",))
        assert_same(got.inputs, {"x": array, "z": array})
        assert (got.min_confidence, got.outputs) == (0.5, ("y",))
        assert not any(value.flags.writeable for value in got.inputs.values())
    assert len(heads) == 1


def test_a_remembered_head_before_another_body_is_checked_anew() -> None:
    heads: Heads = {}
    head = json.dumps(binary_input(8)).encode()
    decode_request(head + bytes(8), len(head), model="m", heads=heads)
    for size in (0, 7, 9):
        with pytest.raises(InvalidRequest):
            decode_request(head + bytes(size), len(head), model="m", heads=heads)


def test_what_must_be_looked_at_each_time_is_never_remembered() -> None:
    heads: Heads = {}
    ask_with(heads, np.ones(2, np.float32), id="7")
    ask_with(heads, np.ones(2, np.float32), parameters={"a": "x" * MAX_HEAD_BYTES})
    for array in (np.array([True]), np.array([b"a"], object), np.empty(0, np.float32)):
        ask_with(heads, array)
    decode_request(json.dumps(infer_body()).encode(), None, model="m", heads=heads)
    assert heads == {}


def test_invented_heads_do_not_grow_memory() -> None:
    heads: Heads = {}
    for index in range(MAX_HEADS + 1):
        ask_with(heads, np.ones(1, np.float32), priority=index)
    assert len(heads) <= MAX_HEADS


def test_a_head_that_is_written_again_says_what_this_answer_is() -> None:
    ones = np.ones((1, 2), np.float32)
    answers = [
        {"outputs": {"y": ones}},
        {"outputs": {"y": ones.astype(np.int32)}},
        {"outputs": {"z": ones}},
        {"outputs": {"y": np.ones((2, 2), np.float32)}},
        {"outputs": {"y": ones, "z": ones}},
        {"outputs": {"y": ones}, "degraded": True},
        {"outputs": {"y": ones}, "version": "2"},
        {"outputs": {"y": ones}, "confidence": 0.5},
        {"outputs": {"y": np.array([b"ab"], object)}},
        {"outputs": {"y": np.array([b"abc"], object)}},
    ]
    for _ in range(2):
        heads = []
        for each in answers:
            outputs, more = each["outputs"], {key: value for key, value in each.items() if key != "outputs"}
            answer = structs.replace(answer_of(outputs), **more)
            parts, length = encode_response(answer, OutputForm(True), None)
            head = json.loads(parts[0])
            assert length == len(parts[0])
            assert [tensor["name"] for tensor in head["outputs"]] == list(outputs)
            assert [tensor["shape"] for tensor in head["outputs"]] == [list(array.shape) for array in outputs.values()]
            assert head["model_version"] == answer.version
            assert head["parameters"].get("confidence") == answer.confidence
            heads.append(parts[0])
        assert len(set(heads)) == len(answers)
