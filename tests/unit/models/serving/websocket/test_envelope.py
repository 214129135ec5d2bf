"""Messages of a session: what is read from them, and what is refused by name."""

from __future__ import annotations

import json
import struct

import pytest

from models.errors import InvalidRequest, NotFound, Overloaded, TooLarge
from models.serving.websocket.envelope import (
    MAX_ENVELOPE_BYTES,
    MAX_ID_CHARACTERS,
    answer_binary,
    answer_text,
    error_text,
    id_of,
    read_binary,
    read_text,
)


def binary(envelope: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<I", len(envelope)) + envelope + body


def test_both_forms_carry_the_same_request() -> None:
    text, body = read_text(b'{"op":"infer","id":"\xc3\xa4","model":"m","deadline_ms":1500,"request":{"inputs":[]}}')
    assert (text.op, text.id, text.model, text.version, text.budget, body) == (
        "infer",
        "ä",
        "m",
        None,
        1.5,
        b'{"inputs":[]}',
    )
    other, raw = read_binary(binary(b'{"op":"infer","id":"1","model":"m","version":"2","header_length":3}', b"{} \0"))
    assert (other.version, other.header_length, other.budget, raw) == ("2", 3, None, b"{} \0")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "not valid"),
        (b"[]", "not valid"),
        (b"{}", "op"),
        (b'{"op":1}', "op"),
        (b'{"op":"infer","id":7}', "id"),
        (b'{"op":"infer","id":"' + b"x" * (MAX_ID_CHARACTERS + 1) + b'"}', "id has"),
        (b'{"op":"infer","deadline_ms":"1"}', "deadline_ms"),
        (b'{"op":"infer","deadline_ms":1e999}', "deadline_ms|not valid"),
        (b'{"op":"infer","deadline_ms":NaN}', "not valid"),
        (b'{"op":"infer","header_length":3}', "header_length"),
        (b'{"op":"infer","request":' + b"[" * 100_000, "not valid"),
        (b'{"op":"\xff"}', "not valid"),
    ],
)
def test_a_text_message_that_cannot_be_used_is_refused(message: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_text(message)


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        (b"", InvalidRequest, "4 bytes"),
        (b"\1\0\0", InvalidRequest, "4 bytes"),
        (b"\3\0\0\0{}", InvalidRequest, "in a message of 6"),
        (b"\xff\xff\xff\xff", TooLarge, "envelope"),
        (struct.pack("<I", MAX_ENVELOPE_BYTES + 1), TooLarge, "envelope"),
        (binary(b'{"op":"infer","request":{}}'), InvalidRequest, "follows"),
        (binary(b"not json"), InvalidRequest, "not valid"),
    ],
)
def test_a_binary_message_that_cannot_be_used_is_refused(message: bytes, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_binary(message)


def test_answers_mirror_requests() -> None:
    assert answer_text("7", [b'{"a":', b"1}"]) == b'{"op":"answer","id":"7","response":{"a":1}}'
    message = answer_binary("7", [b"{}", b"\0\1"], 2)
    (length,) = struct.unpack_from("<I", message)
    assert json.loads(message[4 : 4 + length]) == {"op": "answer", "id": "7", "header_length": 2}
    assert message[4 + length :] == b"{}\0\1"
    assert b"header_length" not in answer_binary("7", [b"{}"], None)


def test_errors_tell_status_and_words() -> None:
    told = json.loads(error_text("7", NotFound("no \udcff")))
    assert told == {"op": "error", "id": "7", "status": 404, "error": "no ?"}
    busy = json.loads(error_text("", Overloaded("busy", retry_after=2.5)))
    assert (busy["id"], busy["status"], busy["retry_after"]) == (None, 429, 2.5)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (b'{"id":"7","op":1}', "7"),
        (b'{"id":7}', ""),
        (b"{}", ""),
        (b"[", ""),
        (b"[" * 10_000, ""),
        (b'{"id":"' + b"x" * MAX_ENVELOPE_BYTES + b'"}', ""),
    ],
)
def test_a_refusal_names_the_message_where_it_can(message: bytes, found: str) -> None:
    assert id_of(message) == found
