from __future__ import annotations

import tracemalloc

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import InvalidRequest, TooLarge
from models.serving.grpc import inference_pb2 as pb
from models.serving.grpc.split import MAX_FIELDS, MAX_HEAD_BYTES, bytes_prefix, split_request


def message(**fields: object) -> bytes:
    return bytes(pb.ModelInferRequest(**fields).SerializeToString())


@given(
    raws=st.lists(st.binary(max_size=300), max_size=5),
    request_id=st.text(max_size=20),
    model=st.text(max_size=200),
    names=st.lists(st.text(max_size=5), max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_a_split_message_is_the_same_message(raws: list[bytes], request_id: str, model: str, names: list[str]) -> None:
    inputs = [pb.ModelInferRequest.InferInputTensor(name=name, shape=[1, -1]) for name in names]
    data = message(model_name=model, id=request_id, inputs=inputs, raw_input_contents=raws)
    head, found_id, places = split_request(data)
    assert [data[offset : offset + size] for offset, size in places] == raws
    assert (found_id or "") == request_id
    assert pb.ModelInferRequest.FromString(head) == pb.ModelInferRequest(model_name=model, inputs=inputs)


def test_two_requests_that_differ_in_id_and_numbers_have_the_same_head() -> None:
    first = split_request(message(model_name="m", id="1", raw_input_contents=[b"aaaa"]))
    second = split_request(message(model_name="m", id="22", raw_input_contents=[b"bbbb"]))
    assert first.head == second.head


def test_fields_in_any_order_are_found() -> None:
    raw, name, request_id = bytes_prefix(7, 2) + b"xy", bytes_prefix(1, 1) + b"m", bytes_prefix(3, 1) + b"7"
    for data in (raw + name + request_id, request_id + raw + name, name + raw + request_id):
        head, found, places = split_request(data)
        assert (head, found, [data[offset : offset + size] for offset, size in places]) == (name, "7", [b"xy"])


def test_a_raw_field_whose_tag_is_written_in_two_bytes_is_a_raw_field() -> None:
    data = b"\xba\x00\x02xy"
    assert pb.ModelInferRequest.FromString(data).raw_input_contents == [b"xy"]
    assert split_request(data).raws == [(3, 2)]


def test_a_field_of_a_later_protocol_stays_in_the_head() -> None:
    later = b"\xf8\x01\x05" + b"\xf1\x01" + bytes(8) + b"\xf2\x01\x01z" + b"\xf5\x01" + bytes(4)
    assert split_request(later + bytes_prefix(7, 1) + b"r") == (later, None, [(len(later) + 2, 1)])


BROKEN = {
    "cut inside a tag's length": b"\x0a",
    "longer than what is left": b"\x3a\x05abc",
    "cut inside a varint": b"\x08\xff",
    "a varint without end": b"\x3a" + b"\xff" * 12,
    "a group": b"\x0b",
    "wire type 7": b"\x0f",
    "a fixed64 without bytes": b"\x09",
    "bytes after the last field": bytes_prefix(7, 1) + b"rr",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a ModelInferRequest"):
        split_request(data)


def test_an_id_that_is_not_utf8_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="id is not UTF-8"):
        split_request(b"\x1a\x01\xff")


@given(st.binary(max_size=60))
@settings(max_examples=1500, deadline=None)
def test_any_bytes_are_split_or_refused(data: bytes) -> None:
    try:
        head, _, raws = split_request(data)
    except (InvalidRequest, TooLarge):
        return
    try:
        whole = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        return
    assert [data[offset : offset + size] for offset, size in raws] == whole.raw_input_contents
    assert pb.ModelInferRequest.FromString(head).model_name == whole.model_name


def test_more_beside_the_tensors_than_the_limit_is_refused() -> None:
    with pytest.raises(TooLarge, match="beside raw_input_contents"):
        split_request(bytes_prefix(1, MAX_HEAD_BYTES) + bytes(MAX_HEAD_BYTES))
    split_request(bytes_prefix(7, MAX_HEAD_BYTES + 1) + bytes(MAX_HEAD_BYTES + 1))


@pytest.mark.parametrize("number", [5, 6, 7])
def test_millions_of_empty_fields_cost_no_memory(number: int) -> None:
    data = bytes_prefix(number, 0) * 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match=f"more than {MAX_FIELDS} fields"):
            split_request(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
