"""Which URLs lead somewhere."""

from __future__ import annotations

import ssl

import pytest

from models.client.address import parse_address


@pytest.mark.parametrize(
    ("url", "peer", "prefix", "grpc", "encrypted"),
    [
        ("http://h", "h:8000", "", False, False),
        ("http://h:81/a/b/", "h:81", "/a/b", False, False),
        ("https://h", "h:443", "", False, True),
        ("http://[::1]:9", "[::1]:9", "", False, False),
        ("unix:///run/a%20b.sock", "/run/a b.sock", "", False, False),
        ("grpc://h", "h:8001", "", True, False),
        ("grpcs://h:1/", "h:1", "", True, True),
    ],
)
def test_every_form_is_understood(url: str, peer: str, prefix: str, grpc: bool, encrypted: bool) -> None:
    address = parse_address(url)
    assert (address.endpoint.peer, address.prefix, address.grpc, address.encrypted) == (peer, prefix, grpc, encrypted)
    assert (address.endpoint.tls is not None) == encrypted


@pytest.mark.parametrize(
    "url",
    [
        "h:8000",
        "http://",
        "ftp://h",
        "http://u:p@h",
        "http://h?x=1",
        "http://h#x",
        "http://h:x",
        "http://h:99999",
        "http://h/ä",
        "http://h/a b",
        "http://h/\r\nx: y",
        "unix://run/x.sock",
        "unix:",
        "grpc://h/prefix",
    ],
)
def test_any_other_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError):
        parse_address(url)


def test_tls_verifies_chain_and_name() -> None:
    tls = parse_address("https://h").endpoint.tls
    assert tls is not None
    assert tls.check_hostname
    assert tls.verify_mode == ssl.CERT_REQUIRED
    assert tls.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_certificates_for_a_plain_connection_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="https"):
        parse_address("http://h", ca="ca.pem")
    with pytest.raises(ValueError, match="certificate"):
        parse_address("https://h", key="key.pem")
    with pytest.raises(OSError):
        parse_address("https://h", ca="/nonexistent.pem")
