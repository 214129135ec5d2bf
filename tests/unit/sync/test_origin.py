"""Who is shown a node's bearer token: the hub's origins, to the letter, and nobody else."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from sync.identity import Membership
from sync.member import sources_of
from sync.origin import MAX_ORIGINS, origin_of, origins_of


class Shown:
    """Credentials that count who asks for the bearer. `hub_origins`: what the hub said about itself."""

    password = None

    def __init__(self, *hub_origins: str) -> None:
        self.hub_origins = hub_origins

    def bearer(self) -> str:
        return "bearer"

    def link_context(self) -> ssl.SSLContext:
        raise AssertionError

    def http_context(self) -> ssl.SSLContext | None:
        return None

    def connected(self) -> None:
        raise AssertionError


def member(**more: Any) -> Membership:
    fields: dict[str, Any] = {
        "id": "acme.n-1",
        "tier": "edge",
        "broker": "mqtts://hub",
        "root": Path("root.json"),
        "data": Path("data"),
        "identity": Path("identity"),
        "hub": "https://10.0.0.5:8443",
    }
    return Membership(**{**fields, **more})


def shown_to(node: Membership, credentials: Shown) -> list[str]:
    """The sources that see the bearer."""
    found = []
    for source in sources_of(node, credentials):
        assert callable(source.token)
        if source.token() is not None:
            found.append(source.url)
    return found


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://hub.example.org", "https://hub.example.org:443"),
        ("HTTPS://Hub.Example.org:443/files", "https://hub.example.org:443"),
        ("http://127.0.0.1", "http://127.0.0.1:80"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("https://hub.example.org.", "https://hub.example.org.:443"),
        ("https://hub@evil", None),
        ("https://evil\\@hub", None),
        ("https://hub#@evil", None),
        ("https://hub\t.evil", None),
        (" https://hub", None),
        ("https://hub\n", None),
        ("https://hub:0", None),
        ("https://hub:65536", None),
        ("https://hub:x", None),
        ("https://h%75b", None),
        ("ftp://hub", None),
        ("file:///hub", None),
        ("mqtt:", None),
        ("", None),
    ],
)
def test_an_origin_is_scheme_host_and_port_or_nothing_certain(url: str, origin: str | None) -> None:
    assert origin_of(url) == origin


def test_what_a_hub_says_of_itself_is_bounded_and_senseless_parts_of_it_are_left_out() -> None:
    urls = ["https://hub", "https://hub:443", "nonsense", *(f"https://h{number}" for number in range(100))]
    assert origins_of(urls)[:2] == ("https://hub:443", "https://h0:443")
    assert len(origins_of(urls)) == MAX_ORIGINS


@pytest.mark.parametrize("tier", ["device", "edge", "cloud"])
def test_only_the_hub_sees_the_bearer_by_every_name_it_has_and_no_mirror_does(tier: str) -> None:
    at_hub = (
        "https://10.0.0.5:8443",
        "https://10.0.0.5:8443/files",
        "https://hub.example.org",
        "https://HUB.example.org:443",
    )
    others = (
        "https://mirror.example.org",
        "https://10.0.0.5",
        "https://10.0.0.5:8444",
        "https://hub.example.org.evil",
        "https://hub.example.org@evil",
        "http://127.0.0.1:8443",
    )
    node = member(tier=tier, sources=(*others, *at_hub))
    assert shown_to(node, Shown("https://hub.example.org:443")) == list(at_hub)
    assert shown_to(node, Shown()) == list(at_hub[:2])


def test_the_same_name_without_tls_is_another_origin() -> None:
    node = member(sources=("http://hub.example.org", "http://10.0.0.5:8443"), insecure=True)
    assert shown_to(node, Shown("https://hub.example.org:443")) == []


def test_a_node_that_knows_of_no_hub_shows_its_bearer_to_nobody() -> None:
    assert shown_to(member(hub=None, sources=("https://hub",)), Shown()) == []


def test_a_token_goes_to_the_hub_or_where_none_is_named_to_the_first_source() -> None:
    token = {"identity": None, "credential": Path("token")}
    sources = ("http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:1/again")
    assert shown_to(member(**token, hub=None, sources=sources), Shown()) == [sources[0], sources[2]]
    assert shown_to(member(**token, hub="http://127.0.0.1:2", sources=sources), Shown()) == [sources[1]]
