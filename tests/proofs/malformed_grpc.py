"""Calls whose messages are wrong: written by hand, so that they can be wrong in every way. Pure: nothing is sent here."""

from __future__ import annotations

import random

import numpy as np
from proofs.malformed import MODELS, VICTIM, damage


def _varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def message(rng: random.Random) -> bytes:
    """A ModelInferRequest, wrong somewhere: written by hand, so that it can be wrong in every way."""
    inputs, raws = [], []
    for name in (b"a", b"b"):
        shape: list[int] = [1, 4]
        if rng.random() < 0.15:
            shape = rng.choice(
                ([], [-1], [0, 4], [2**62, 4], [2**32, 2**32], [-(2**63)], [1] * 20, [4], [1, 5], [3, 4])
            )
        datatype = (
            rng.choice((b"BYTES", b"FP16", b"INT8", b"", b"\xff", b"NOPE", b"BOOL")) if rng.random() < 0.15 else b"FP32"
        )
        tensor = _field(1, name) + _field(2, datatype) + _field(3, b"".join(map(_varint, shape)))
        array = np.arange(4, dtype=np.float32).tobytes()
        if rng.random() < 0.15:
            array = rng.choice((b"", array[:3], array * 2, b"\xff" * 16, b"\xff\xff\xff\xff" + array))
        if rng.random() < 0.3:
            number = rng.choice((1, 2, 3, 4, 5, 6, 6, 6, 7, 8, 9))
            tensor += _field(5, _field(number, array))
        else:
            raws.append(_field(7, array))
        if rng.random() < 0.1:
            tensor += _field(
                4,
                _field(1, rng.choice((b"shared_memory_region", b"binary_data_size", b"\xff"))) + _field(2, b"\x10\x05"),
            )
        inputs.append(_field(5, tensor))
    model = rng.choice(MODELS).encode() if rng.random() < 0.3 else b"sum"
    parts = [_field(1, model), *inputs, *raws]
    if rng.random() < 0.3:
        parts.append(rng.choice((
            _field(3, b"\xff\xfe"), _field(2, b"\xff"), _field(2, b"99"), _field(6, _field(1, b"sum")) * 2,
            _field(6, _field(1, b"nope")), _field(4, _field(1, b"priority")),
            b"\x0b" * 200, b"\x0b\x0c", b"\x00", b"\x07", b"\xff" * 11, _field(5, b""), _field(99, b"x" * 50),
            _field(7, b""), b"\x3a\xff\xff\xff\xff\x0f", _field(1, b"sum") * 3000,
        )))  # fmt: skip
    if rng.random() < 0.2:
        rng.shuffle(parts)
    data = b"".join(parts)
    return damage(data, rng) if rng.random() < 0.5 else data


CALLS = (
    "ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings", "SystemSharedMemoryRegister",
    "CudaSharedMemoryStatus", "Nothing", "",
)  # fmt: skip


def call(rng: random.Random) -> tuple[str, bytes, list[tuple[str, str | bytes]]]:
    """Name of a call, the bytes of its message, and its metadata."""
    metadata: list[tuple[str, str | bytes]] = []
    if rng.random() < 0.05:
        metadata.append(rng.choice((
            ("tierline-deadline-ms", "soon"), ("tierline-deadline-ms", "nan"), ("traceparent", "00-zz"),
            ("authorization", "x" * 3000), ("x-bin", b"\xff\0"),
            ("tierline-deadline-ms", "1e999"), ("traceparent", "0" * 400),
        )))  # fmt: skip
    if rng.random() < 0.75:
        return "ModelInfer", message(rng), metadata
    name = rng.choice(CALLS)
    data = rng.choice(
        (
            b"",
            _field(1, b"sum"),
            _field(1, b"sum") + _field(2, b"7"),
            _field(2, VICTIM.encode()),
            _field(1, b"\xff"),
            message(rng),
            rng.randbytes(40),
        )
    )
    if name in ("RepositoryModelUnload", "RepositoryModelLoad"):
        data = rng.choice(
            (
                _field(2, VICTIM.encode()),
                _field(2, VICTIM.encode()) + _field(3, _field(1, b"config")),
                _field(2, b"../x"),
                _field(2, b"\xff"),
                _field(1, b"r"),
            )
        )
        return name, data, metadata
    if name == "LogSettings":
        return name, _field(1, _field(1, b"log_verbose_level") + _field(2, rng.randbytes(4))), metadata
    return name, damage(data, rng) if rng.random() < 0.5 else data, metadata
