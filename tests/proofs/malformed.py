"""Malformed requests, made from good ones by a seeded generator. Pure: bytes out, nothing is sent here."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

GOOD_JSON: dict[str, Any] = {
    "id": "é1",
    "parameters": {"priority": 1},
    "inputs": [
        {"name": "a", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]},
        {"name": "b", "datatype": "FP32", "shape": [1, 4], "data": [[1, 1, 1, 1]]},
    ],
    "outputs": [{"name": "sum"}, {"name": "difference", "parameters": {"binary_data": False}}],
}
VICTIM = "victim"
"""The one model that the generator may load and unload."""
BOMB_BYTES = 96 * 1024 * 1024
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, -0.0, 1e400, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, "", "é", "\ud800",
    "0", "x" * 3000,
    [], [[]], [None], [[1, 2], [3]], [[[1, 2, 3, 4]]], {}, {"a": 1}, [-1], [0], [0, 4], [2**63, 2], [2**32, 2**32],
    [1] * 17, [10**9] * 3,
    ["1", 4], [1.0, 4], [True, 4], "FP32", "BYTES", "BOOL", "INT8", "UINT64", "FP16", "BF16", "NOPE", "a", "b",
    "../../etc/passwd",
    float("nan"), float("inf"), [float("nan")] * 4, [1, 2, 3, "4"], [1, 2, 3, None], [1, 2, 3, 4, 5],
    [300, -300, 1, 2],
)  # fmt: skip
_TEXTS = (
    b"", b"{", b"[]", b"null", b"7", b'"x"', b"{}{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"inputs":',
    b'{"inputs":[NaN]}',
    b'{"inputs":[],"inputs":[]}', b'{"inputs":[{"name":"a","name":"b"}]}', b'{"id":"\xff","inputs":[]}',
    b'{"inputs":[{"data":[1,]}]}',
    b"[" * 5000, b'{"a":' * 5000,
    b'{"inputs":[{"name":"a","datatype":"FP32","shape":[1,4],"data":' + b"[" * 3000 + b"]" * 3000 + b"}]}",
    b'{"inputs":[{"name":"a","datatype":"INT64","shape":[1],"data":[' + b"9" * 4000 + b"]}]}", b"\x00" * 64,
    b'{"id":"\\ud800","inputs":[]}',
)  # fmt: skip
MODELS = (
    "sum",
    "sum",
    "sum",
    "identity_FP32",
    "identity_INT8",
    "identity_BYTES",
    "identity_BOOL",
    "identity_FP16",
    "missing",
)

Make = Callable[[random.Random], bytes]


# --- bytes ---------------------------------------------------------------------------------------------------------------


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bits turned, cut short, a part doubled, dropped, written over or put in."""
    if not data:
        return rng.randbytes(3)
    out = bytearray(data)
    start = rng.randrange(len(out))
    size = rng.choice((1, 1, 2, 4, 16))
    match rng.randrange(6):
        case 0:
            for _ in range(rng.choice((1, 1, 2, 8))):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 1:
            del out[start:]
        case 2:
            out[start:start] = out[start : start + size * 8]
        case 3:
            del out[start : start + size]
        case 4:
            out[start : start + size] = rng.randbytes(size)
        case _:
            out[start:start] = rng.choice(
                (b"\0", b"\r\n", b"\xff" * 4, b'"', b"}", b"]", b"-", b"9" * 20, rng.randbytes(size))
            )
    return bytes(out)


def twisted(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one place changed, dropped, doubled or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        made = dict(value)
        match rng.randrange(8):
            case 0:
                del made[key]
            case 1:
                made[str(rng.choice(NASTY))[:40]] = value[key]
            case 2:
                made[key] = rng.choice(NASTY)
            case _:
                made[key] = twisted(value[key], rng)
        return made
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        items = list(value)
        match rng.randrange(6):
            case 0:
                del items[index]
            case 1:
                items.insert(index, items[index])
            case 2:
                items *= rng.choice((2, 300))
            case _:
                items[index] = twisted(items[index], rng)
        return items
    return rng.choice(NASTY)


def dumped(value: Any, rng: random.Random) -> bytes:
    """As JSON, now and then with a key twice; numbers too long for Python's own rules included."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05:
        text = text.replace('"name":', '"name":"a","name":', 1)
    return text.encode("utf-8", "surrogatepass")


def body(rng: random.Random) -> bytes:
    """The JSON of an infer request, wrong somewhere."""
    kind = rng.random()
    if kind < 0.1:
        return rng.choice(_TEXTS)
    if kind < 0.3:
        return damage(json.dumps(GOOD_JSON, ensure_ascii=False).encode(), rng)
    made = GOOD_JSON
    for _ in range(rng.choice((1, 1, 2, 4))):
        made = twisted(made, rng)
    return dumped(made, rng)


def binary_body(rng: random.Random) -> tuple[bytes, int | str]:
    """An infer request with binary data, and what its header is said to be long."""
    head: Any = {"inputs": [], "parameters": {"binary_data_output": True}}
    data = b""
    for name in "ab":
        array = np.arange(4, dtype=np.float32).tobytes()
        head["inputs"].append(
            {"name": name, "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}
        )
        data += array
    place = rng.choice(head["inputs"])
    match rng.randrange(7):
        case 0:
            place["parameters"]["binary_data_size"] = rng.choice(NASTY)
        case 1:
            place["shape"] = rng.choice(NASTY)
        case 2:
            place["datatype"] = rng.choice(("BYTES", "BOOL", "INT8", "FP64", "FP16", "x", None))
        case 3:
            data = damage(data, rng)
        case 4:
            place["data"] = [1, 2, 3, 4]
        case 5:
            head = twisted(head, rng)
        case _:
            pass
    text = dumped(head, rng)
    length: int | str = len(text)
    if rng.random() < 0.4:
        length = rng.choice(
            (
                0,
                -1,
                1,
                len(text) - 1,
                len(text) + 1,
                len(text) + len(data),
                2**31,
                2**63,
                10**30,
                "x",
                "",
                "+5",
                "1_0",
                "0x10",
                " 7 ",
            )
        )
    return text + data, length


# --- HTTP ----------------------------------------------------------------------------------------------------------------


def request(path: str, content: bytes, *headers: str, method: str = "POST") -> bytes:
    lines = "".join(f"{each}\r\n" for each in ("Host: localhost", f"Content-Length: {len(content)}", *headers))
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("utf-8", "replace") + content


def good_http(model: str = "sum") -> bytes:
    return request(f"/v2/models/{model}/infer", json.dumps(GOOD_JSON).encode())


def _infer(rng: random.Random) -> bytes:
    return request(f"/v2/models/{rng.choice(MODELS)}/infer", body(rng))


def _binary(rng: random.Random) -> bytes:
    content, length = binary_body(rng)
    return request("/v2/models/sum/infer", content, f"Inference-Header-Content-Length: {length}")


def _framing(rng: random.Random) -> bytes:
    content = json.dumps(GOOD_JSON).encode()
    line = "POST /v2/models/sum/infer HTTP/1.1\r\nHost: localhost\r\n"
    size = len(content)
    length = rng.choice(
        (
            size + 1,
            size - 1,
            size * 100,
            -1,
            0,
            "x",
            "",
            "1e3",
            "0x10",
            2**63,
            2**64,
            10**30,
            f"{size}, {size}",
            f"+{size}",
        )
    )
    chunk = f"{size:x}\r\n".encode() + content + b"\r\n"
    cases = (
        f"Content-Length: {length}\r\n\r\n".encode() + content,
        f"Content-Length: {size}\r\nContent-Length: {length}\r\n\r\n".encode() + content,
        f"Content-Length: {size}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunk + b"0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n" + damage(chunk + b"0\r\n\r\n", rng),
        b"Transfer-Encoding: chunked\r\n\r\n"
        + rng.choice((b"zz\r\n", b"-1\r\n", b"F" * 17 + b"\r\n", b"5\r\nab", b"1;" + b"e" * 40_000 + b"\r\n", b"\r\n")),
        b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n" + b"t: v\r\n" * rng.choice((1, 200)) + b"\r\n",
        b"Transfer-Encoding: "
        + rng.choice((b"gzip", b"chunked, gzip", b"xchunked", b"identity", b""))
        + b"\r\n\r\n"
        + chunk,
        b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"1\r\n%c\r\n" % each for each in content) + b"0\r\n\r\n",
        b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n",
        b"Expect: 200-ok\r\nContent-Length: %d\r\n\r\n" % size + content,
    )
    return line.encode() + rng.choice(cases)


def _heads(rng: random.Random) -> bytes:
    content = json.dumps(GOOD_JSON).encode()
    header = rng.choice((
        "X: " + "y" * 40_000, "\r\n".join(f"h{index}: v" for index in range(150)), "no colon here", ": empty",
        "Bad Name: x", "N\0ul: x",
        "X: a\0b", "Content-Type: text/html", "Content-Type: é", "Content-Type: application/json; charset=utf-7",
        "Content-Encoding: br",
        "Content-Encoding: gzip, gzip", "Accept-Encoding: gzip;q=x, *;q=2", "Accept-Encoding: " + "gzip," * 500,
        "Tierline-Deadline-Ms: -1",
        "Tierline-Deadline-Ms: nan", "Tierline-Deadline-Ms: 1e999", "Tierline-Deadline-Ms: soon",
        "Traceparent: 00-zz", "Traceparent: " + "0" * 500,
        "Traceparent: 00-" + "0" * 32 + "-" + "0" * 16 + "-00", "Authorization: Bearer x.y.z",
        "Authorization: " + "B" * 5000, "Upgrade: h2c\r\nConnection: Upgrade",
        "Connection: close, keep-alive", "Inference-Header-Content-Length: 1\r\nInference-Header-Content-Length: 2",
        " folded: x", "X: y\r\n continued",
    ))  # fmt: skip
    return request("/v2/models/sum/infer", content, header)


def _paths(rng: random.Random) -> bytes:
    path = rng.choice((
        "/", "//", "/v2//models", "/v2/models//infer", "/v2/models/%ff/infer", "/v2/models/%00/infer",
        "/v2/models/" + "m" * 9000 + "/infer",
        "/v2/models/../../x/infer", "/v2/models/sum/versions/-1/infer", "/v2/models/sum/versions//infer",
        "/v2/models/sum/versions/99999999999999999999/infer",
        "/v2/models/sum/versions/%2e%2e/infer", "/v2/models/sum/submit", "/v2/models/sum/nothing",
        "/v2/repository/models/..%2f..%2fetc/load",
        "/v2/repository/models/.../load", "/v2/repository/models/%00/unload", "/v2/repository/models/missing/unload",
        "/v2/health/live", "*", "sum",
        "http://other/v2/models/sum/infer", "http://", "/v2/trace/setting",
        "/v2/systemsharedmemory/region/x/register", "/v2/ws", "/v2/models/stats",
        "/v2/jobs", "/v2/jobs/x", "/v2/models/sum/infer?x=" + "y" * 3000, "/v2/models/é/infer", "/v2/logging",
        "/metrics", "/v2/models/sum/config", "/v2" * 500,
    ))  # fmt: skip
    method = rng.choice(
        ("POST", "POST", "GET", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "post", "X", "G ET", "PRI", "")
    )
    return request(path, body(rng) if rng.random() < 0.5 else b"{}", method=method)


def _control(rng: random.Random) -> bytes:
    path = rng.choice(
        (
            f"/v2/repository/models/{VICTIM}/load",
            f"/v2/repository/models/{VICTIM}/unload",
            "/v2/repository/index",
            "/v2/logging",
        )
    )
    good: Any = {"parameters": {"unload_dependents": True}, "ready": True, "log_verbose_level": "x"}
    content = rng.choice(_TEXTS) if rng.random() < 0.3 else dumped(twisted(good, rng), rng)
    return request(path, content)


@cache
def bomb(coding: str) -> bytes:
    data = bytes(BOMB_BYTES)
    return gzip.compress(data, 9, mtime=0) if coding == "gzip" else zlib.compress(data, 9)


def _coded(rng: random.Random) -> bytes:
    coding = rng.choice(("gzip", "deflate"))
    content = json.dumps(GOOD_JSON).encode()
    packed = gzip.compress(content, mtime=0) if coding == "gzip" else zlib.compress(content)
    lie = rng.choice(("gzip", "deflate", "x-gzip", coding, coding, coding))
    bad = rng.choice((damage(packed, rng), packed + b"more", packed + packed, b"", content, packed[:-1]))
    return request("/v2/models/sum/infer", bad, f"Content-Encoding: {lie}")


def bombs(rng: random.Random) -> bytes:
    coding = rng.choice(("gzip", "deflate"))
    extra = ("Inference-Header-Content-Length: 10",) if rng.random() < 0.5 else ()
    return request("/v2/models/sum/infer", bomb(coding), f"Content-Encoding: {coding}", *extra)


def _damaged(rng: random.Random) -> bytes:
    return damage(good_http(), rng)


def _pipelined(rng: random.Random) -> bytes:
    each = [rng.choice((good_http(), _infer(rng))) for _ in range(rng.randrange(2, 40))]
    return b"".join(each) + rng.choice((b"", b"GARBAGE\r\n\r\n", good_http()[:-5]))


def _noise(rng: random.Random) -> bytes:
    return rng.choice((
        rng.randbytes(rng.randrange(1, 2000)), b"", b"\r\n" * 50,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(64),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(40), b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\n\n", b"\0" * 5000,
        b"GET /v2/health/live HTTP/1.0\r\n\r\n", b"A" * 70_000,
    ))  # fmt: skip


HTTP: tuple[tuple[Make, int], ...] = (
    (_infer, 40), (_binary, 20), (_damaged, 15), (_framing, 8), (_heads, 6), (_paths, 6), (_control, 3), (_coded, 4),
    (_noise, 2), (_pipelined, 1),
)  # fmt: skip
"""Makers and how often each is used."""


def http(rng: random.Random) -> bytes:
    return rng.choices([make for make, _ in HTTP], [weight for _, weight in HTTP])[0](rng)
