"""Compressed bodies: the same answers as without, and no bomb goes off."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from models.errors import InvalidRequest, NotFound, Overloaded, TooLarge
from models.serving import rest_body
from models.serving.codec import MAX_JSON_BYTES
from models.serving.exchange import HttpHead, HttpRequest, HttpResponse
from models.serving.plane import DataPlane
from models.serving.predictor import InferRequest, InferResponse
from models.serving.rest import RestHandler
from models.serving.rest_body import INLINE_BYTES, MIN_PACKED_BYTES, Expander, accepted_coding, pack
from models.testing import FailingPredictor, StaticPredictor


def raw_deflate(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


CODINGS: list[tuple[bytes, Callable[[bytes], bytes]]] = [
    (b"gzip", gzip.compress),
    (b"x-gzip", gzip.compress),
    (b"GZIP", gzip.compress),
    (b"deflate", zlib.compress),
    (b"deflate", raw_deflate),
]
HEAD = b'{"inputs":[{"name":"x","datatype":"UINT8","shape":[%d],"parameters":{"binary_data_size":%d}}]}'
PLAIN = b'{"inputs":[{"name":"x","datatype":"UINT8","shape":[3],"data":[1,2,3]}]}'


class Echo:
    """Answers with its own input."""

    async def infer(self, request: InferRequest) -> InferResponse:
        return InferResponse(outputs={"y": request.inputs["x"]}, model="m", package="p", version="1", tier="edge")


def handler_of(predictor: Any = None) -> RestHandler:
    return RestHandler(DataPlane(predictor or Echo(), None, ready=lambda: True))  # type: ignore[arg-type]


async def ask(handler: RestHandler, body: bytes, headers: dict[bytes, bytes]) -> tuple[HttpResponse, bytes]:
    response = await handler(HttpRequest(HttpHead("POST", "/v2/models/m/infer", "", headers), body))
    raw = b"".join(response.body) if isinstance(response.body, list) else response.body
    assert isinstance(raw, bytes)
    return response, raw


def expand(body: bytes, coding: str, **options: Any) -> bytes:
    return asyncio.run(Expander().expand(body, coding, **options))


@pytest.mark.parametrize(("coding", "compress"), CODINGS)
async def test_a_compressed_request_is_answered_as_the_plain_one(
    coding: bytes, compress: Callable[[bytes], bytes]
) -> None:
    handler = handler_of()
    plain = await ask(handler, PLAIN, {})
    assert (plain[0].status, json.loads(plain[1])["outputs"][0]["data"]) == (200, [1, 2, 3])
    assert await ask(handler, compress(PLAIN), {b"content-encoding": coding}) == plain


@pytest.mark.parametrize("size", [0, 1, INLINE_BYTES - 200, INLINE_BYTES, INLINE_BYTES + 1, 3_000_000])
async def test_the_header_length_counts_expanded_bytes(size: int) -> None:
    data = np.random.default_rng(1).integers(0, 4, size, np.uint8).tobytes()
    head = HEAD % (size, size)
    handler = handler_of()
    headers = {b"inference-header-content-length": b"%d" % len(head)}
    body = head.replace(b"]}", b'],"parameters":{"binary_data_output":true}}')
    headers = {b"inference-header-content-length": b"%d" % len(body)}
    plain = await ask(handler, body + data, headers)
    assert plain[1].endswith(data)
    assert await ask(handler, gzip.compress(body + data, 1), headers | {b"content-encoding": b"gzip"}) == plain
    assert handler._expander.held == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "ends before"),
        (b"\x1f\x8b", "ends before"),
        (gzip.compress(PLAIN)[:-1], "ends before"),
        (gzip.compress(PLAIN) + b"x", "goes on"),
        (gzip.compress(PLAIN) * 2, "goes on"),
        (b"not gzip at all", "not valid gzip"),
        (gzip.compress(PLAIN)[:-8] + bytes(8), "not valid gzip"),  # the checksum
    ],
)
async def test_broken_data_is_the_callers_fault(body: bytes, message: str) -> None:
    response, answer = await ask(handler_of(), body, {b"content-encoding": b"gzip"})
    assert response.status == 400
    assert message in json.loads(answer)["error"]


@pytest.mark.parametrize("length", range(1, 40))
async def test_data_cut_short_anywhere_is_the_callers_fault(length: int) -> None:
    for compress in (zlib.compress, raw_deflate):
        body = compress(PLAIN)
        response, _ = await ask(handler_of(), body[:-length], {b"content-encoding": b"deflate"})
        assert response.status == 400


def test_a_bomb_stops_at_the_limit() -> None:
    limit = 2 * INLINE_BYTES
    bomb = zlib.compress(bytes(200 * limit), 9)
    tracemalloc.start()
    with pytest.raises(TooLarge, match=str(limit)):
        expand(bomb, "deflate", limit=limit)
    assert tracemalloc.get_traced_memory()[1] < 4 * limit
    tracemalloc.stop()
    assert len(expand(zlib.compress(bytes(limit)), "deflate", limit=limit)) == limit
    with pytest.raises(TooLarge):
        expand(zlib.compress(bytes(limit + 1)), "deflate", limit=limit)


async def test_json_is_held_to_its_own_limit_before_any_model_is_asked() -> None:
    asked = FailingPredictor(NotFound("no such model"))
    body = gzip.compress(PLAIN + b" " * MAX_JSON_BYTES)
    assert (await ask(handler_of(asked), body, {b"content-encoding": b"gzip"}))[0].status == 413
    assert not asked.requests


async def test_what_is_held_is_bounded_over_all_requests_and_given_back() -> None:
    expander = Expander(max_held=INLINE_BYTES)
    body = zlib.compress(bytes(INLINE_BYTES))
    held = await expander.expand(body, "deflate")
    with pytest.raises(Overloaded):
        await expander.expand(body, "deflate")
    assert expander.held == INLINE_BYTES
    expander.release(len(held))
    await expander.expand(body, "deflate")


@pytest.mark.parametrize("body", [zlib.compress(bytes(3 * INLINE_BYTES))[:-4], zlib.compress(bytes(3 * INLINE_BYTES))])
async def test_a_refused_or_abandoned_body_holds_nothing(body: bytes) -> None:
    expander = Expander(max_held=2 * INLINE_BYTES)
    with pytest.raises((InvalidRequest, Overloaded)):
        await expander.expand(body, "deflate")
    assert expander.held == 0
    task = asyncio.ensure_future(expander.expand(zlib.compress(bytes(3 * INLINE_BYTES)), "deflate"))
    await asyncio.sleep(0)
    assert expander.held == INLINE_BYTES
    task.cancel()
    await asyncio.wait((task,))
    assert expander.held == 0


def test_empty_blocks_do_not_hold_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # A stored block of no bytes is five bytes long: much in, nothing out.
    stepped: list[str] = []
    step = rest_body._Inflater.step

    def watched(self: Any, most: int) -> bytes:
        try:
            asyncio.get_running_loop()
            stepped.append("loop")
        except RuntimeError:
            stepped.append("thread")
        return step(self, most)

    monkeypatch.setattr(rest_body._Inflater, "step", watched)
    with pytest.raises(InvalidRequest, match="ends before"):
        expand(b"\x00\x00\x00\xff\xff" * INLINE_BYTES, "deflate")
    assert stepped == ["thread"]


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        (None, None),
        (b"", None),
        (b"identity", None),
        (b"br", None),
        (b"gzip", "gzip"),
        (b"deflate", "deflate"),
        (b"gzip, deflate", "gzip"),
        (b"deflate, gzip", "gzip"),
        (b"Deflate;q=1.0, GZIP;q=0.5", "deflate"),
        (b"gzip;q=0", None),
        (b"gzip; q=0.0, deflate", "deflate"),
        (b"*", "gzip"),
        (b"*;q=0", None),
        (b"gzip;q=0, *", "deflate"),
        (b"identity, gzip;q=0.5", None),
        (b"identity;q=0.5, gzip", "gzip"),
        (b"gzip;q=nonsense", None),
        (b"gzip;q=inf", None),
        (b"gzip;x=1", None),
        (b"x-gzip", "gzip"),
        (b"\xff;;==,,", None),
        (b"a," * 5000 + b"gzip", None),
    ],
)
def test_the_callers_preference_is_honoured(header: bytes | None, coding: str | None) -> None:
    assert accepted_coding({} if header is None else {b"accept-encoding": header}) == coding


@pytest.mark.parametrize(("coding", "undo"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
@pytest.mark.parametrize("size", [MIN_PACKED_BYTES, 1_000_000])
async def test_an_answer_is_compressed_when_asked_for(coding: str, undo: Callable[[bytes], bytes], size: int) -> None:
    handler = handler_of(StaticPredictor({"y": np.zeros(size, np.uint8)}))
    plain, expected = await ask(handler, PLAIN, {})
    response, body = await ask(handler, PLAIN, {b"accept-encoding": coding.encode()})
    assert len(body) < len(expected)
    assert undo(body) == expected
    assert response.headers == plain.headers + b"content-encoding: %b\r\nvary: accept-encoding\r\n" % coding.encode()


async def test_a_short_answer_and_an_error_stay_as_they_are() -> None:
    short = HttpResponse(200, body=b"x" * (MIN_PACKED_BYTES - 1))
    assert await pack(short, "gzip") is short
    error = FailingPredictor(NotFound("n" * 5000))
    response, body = await ask(handler_of(error), PLAIN, {b"accept-encoding": b"gzip"})
    assert b"content-encoding" not in response.headers
    assert json.loads(body)["error"] == "n" * 5000


async def test_the_same_head_with_another_compressed_body_gets_its_own_answer() -> None:
    handler = handler_of()
    head = HttpHead("POST", "/v2/models/m/infer", "", {b"content-encoding": b"gzip"})
    seen = []
    for values in ([1, 2, 3], [4, 5, 6]):
        body = PLAIN.replace(b"[1,2,3]", json.dumps(values).encode())
        response = await handler(HttpRequest(head, gzip.compress(body)))
        assert isinstance(response.body, list)
        seen.append(json.loads(response.body[0])["outputs"][0]["data"])
        assert head.memo is not None
    assert seen == [[1, 2, 3], [4, 5, 6]]
