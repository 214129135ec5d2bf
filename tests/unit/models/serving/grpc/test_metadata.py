from __future__ import annotations

import pytest

from models.errors import InvalidRequest
from models.serving.caller import Peer
from models.serving.grpc.metadata import Said, read_metadata, read_peer


def test_what_the_data_plane_wants_to_know_is_read() -> None:
    metadata = (
        ("user-agent", "x"),
        ("authorization", "Bearer t"),
        ("tierline-deadline-ms", "250"),
        ("traceparent", "00-a-b-01"),
    )
    assert read_metadata(metadata) == Said(b"Bearer t", 0.25, "00-a-b-01")
    assert read_metadata(()) == Said()


@pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "1e999", b"\xff"])
def test_a_deadline_that_is_no_number_is_refused_by_name(value: str | bytes) -> None:
    with pytest.raises(InvalidRequest, match="tierline-deadline-ms"):
        read_metadata((("tierline-deadline-ms", value),))


@pytest.mark.parametrize(
    ("text", "address", "is_local"),
    [
        ("ipv4:127.0.0.1:1234", "127.0.0.1", True),
        ("ipv4:10.1.2.3:1234", "10.1.2.3", False),
        ("ipv6:%5B::1%5D:1234", "::1", True),
        ("ipv6:[2001:db8::1]:1234", "2001:db8::1", False),
        ("unix:", "unix", True),
        ("unix:/run/x.sock", "unix", True),
    ],
)
def test_the_peer_is_who_grpc_says(text: str, address: str, is_local: bool) -> None:
    peer = read_peer(text, None)
    assert peer == Peer(address)
    assert peer.is_local == is_local


def test_a_certificate_counts_only_where_tls_has_verified_one() -> None:
    assert read_peer("ipv4:10.0.0.1:1", {"x509_common_name": [b"edge-7"]}) == Peer("10.0.0.1", "edge-7", True)
    assert read_peer("ipv4:10.0.0.1:1", {"transport_security_type": [b"ssl"]}) == Peer("10.0.0.1", None, True)
