"""A slice of `make fuzz`: malformed requests over every transport harm nothing."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from onnx_writer import identity_model
from proofs.attack import SERVICE
from proofs.fuzz import run, verdict
from proofs.server import serving

REQUESTS = 400


@pytest.mark.timeout(60)
def test_malformed_requests_are_refused_and_good_ones_in_between_are_answered(tmp_path: Path) -> None:
    result = run(tmp_path, seed=20, count=REQUESTS, bombs=2, measure=False, without=("http2",))
    assert result["requests"] == REQUESTS
    assert verdict(result) == [], result


def call(path: bytes) -> bytes:
    """A whole call of gRPC on the wire (RFC 9113), its header fields as literals (RFC 7541 6.2.2)."""
    fields = (
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"localhost"), (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )  # fmt: skip
    block = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in fields)
    settings, headers = b"\0\0\0\4\0\0\0\0\0", len(block).to_bytes(3, "big") + b"\1\4\0\0\0\1" + block
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + headers + b"\0\0\5\0\1\0\0\0\1" + bytes(5)


def test_a_call_whose_path_is_not_text_does_not_end_the_grpc_server(tmp_path: Path) -> None:
    identity_model(tmp_path / "models" / "identity" / "1" / "model.onnx")
    with serving(tmp_path / "models", "--no-probe") as server:
        host, _, port = server.addresses["grpc"].rpartition(":")
        for path in (b"/%b/\xff" % SERVICE.encode(), b"/\xc8", b"", b"\0"):
            with suppress(OSError), socket.create_connection((host, int(port)), 5) as link:
                link.sendall(call(path))
                link.settimeout(0.3)
                while link.recv(1 << 16):
                    pass
        with grpc.insecure_channel(server.addresses["grpc"]) as channel:
            live = channel.unary_unary(f"/{SERVICE}/ServerLive")
            assert live(b"", timeout=10, wait_for_ready=True) == b"\x08\x01"
