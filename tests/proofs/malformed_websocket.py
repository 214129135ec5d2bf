"""Sessions that break the rules, of WebSocket or of what is said in it. Pure: bytes out, nothing is sent here."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from proofs.malformed import GOOD_JSON, MODELS, binary_body, body, damage, dumped, twisted
from proofs.sockets import BINARY, TEXT, frame, handshake

_ENVELOPE: dict[str, Any] = {"op": "infer", "id": "7", "model": "sum", "deadline_ms": 1000, "request": GOOD_JSON}


def good_websocket() -> bytes:
    return frame(TEXT, json.dumps(_ENVELOPE).encode())


def websocket(rng: random.Random) -> tuple[bytes, bytes | None]:
    """Frames after the handshake, and the handshake itself where that is what is wrong."""
    kind = rng.random()
    if kind < 0.4:
        if rng.random() < 0.5:
            payload = dumped(twisted(_ENVELOPE, rng), rng)
        else:
            payload = dumped({**_ENVELOPE, "model": rng.choice(MODELS)}, rng)[:-1]
            payload = payload[: payload.index(b'"request":') + 10] + body(rng) + b"}"
        return frame(TEXT, payload), None
    if kind < 0.6:
        content, length = binary_body(rng)
        envelope = {"op": "infer", "id": "8", "model": "sum", "header_length": length}
        packed = dumped(twisted(envelope, rng) if rng.random() < 0.4 else envelope, rng)
        size = rng.choice((len(packed), len(packed), len(packed), 0, 2**32 - 1, len(packed) + 1, 2**14 + 1))
        return frame(BINARY, struct.pack("<I", size) + packed + content), None
    if kind < 0.75:
        return damage(good_websocket() + frame(9, b"hi"), rng), None
    if kind < 0.92:
        return rng.choice((
            frame(TEXT, b"{}", masked=False), frame(TEXT, b"\xff\xfe"), frame(0, b"more"),
            frame(TEXT, b"{}", reserved=4), frame(3, b""), frame(11, b""),
            frame(9, b"p" * 126), frame(9, b"p", fin=False), frame(8, b"\x03"),
            frame(8, struct.pack("!H", rng.choice((0, 999, 1005, 1006, 5000)))),
            frame(8, struct.pack("!H", 1000) + b"\xff"), frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"),
            struct.pack("!BBQ", 0x82, 0xFF, 2**63),
            struct.pack("!BBQ", 0x82, 0xFF, 2**40), struct.pack("!BBQ", 0x82, 0xFF, 5),
            frame(TEXT, b"x", fin=False) * 1500,
            frame(TEXT, b'{"op":"subscribe","model":"sum"}') * 40, frame(TEXT, b'{"op":"ping","id":"1"}') * 20,
            rng.randbytes(300), frame(BINARY, b"\1\2"),
            good_websocket() * 3, frame(TEXT, b'{"op":"cancel","id":"nobody"}'),
            frame(TEXT, b'{"op":"subscribe_job","job":"x"}'), frame(TEXT, b"[" * 20_000),
        )), None  # fmt: skip
    wrong: dict[str, str | None] = rng.choice((
        {"Sec_WebSocket_Version": "12"}, {"Sec_WebSocket_Key": None}, {"Sec_WebSocket_Key": "short"},
        {"Upgrade": None}, {"Upgrade": "h2c"},
        {"Connection": "keep-alive"}, {"Origin": "https://evil.example"}, {"Sec_WebSocket_Protocol": "none"},
        {"Sec_WebSocket_Protocol": ""},
        {"Sec_WebSocket_Extensions": "permessage-deflate; x=" + "y" * 500}, {"Sec_WebSocket_Key": "é" * 12},
        {"Sec_WebSocket_Version": None},
    ))  # fmt: skip
    return good_websocket(), handshake(**wrong)
