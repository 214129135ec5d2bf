"""A node's bearer over real sockets: to the hub under each of its names, to no mirror, and along no redirect."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from http_fake import HttpFake
from msgspec.structs import replace

from cloud_hub.client import HubClient
from cloud_hub.server import HubOptions, running_hub
from sync.clock import SystemClock
from sync.credentials import HUB, Identity
from sync.enrol import join_hub
from sync.enrol_cli import _Whole
from sync.errors import SyncError, Unavailable
from sync.fetch import Fetcher
from sync.identity import load_config
from sync.member import sources_of
from sync.renewal import Renewal
from sync.store import BlobStore

PATH = "/tuf/timestamp.json"


class Listener(HttpFake):
    """`heard`: the Authorization of each request. It answers 404, or sends everybody on to `elsewhere`."""

    def __init__(self) -> None:
        self.heard: list[str | None] = []
        self.elsewhere = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.heard.append(self.headers.get("Authorization"))
                self.send_response(302 if outer.elsewhere else 404)
                if outer.elsewhere:
                    self.send_header("Location", outer.elsewhere + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Silent."""

        super().__init__(Handler)


@pytest.fixture
def mirrors() -> Iterator[list[Listener]]:
    made = [Listener(), Listener()]
    yield made
    for mirror in made:
        mirror.close()


async def answered(fetcher: Fetcher) -> dict[str, bool]:
    """By source: whether it gave the file."""
    found = {}
    for source in fetcher.sources:
        try:
            found[source.url] = bool(await fetcher.get(source, PATH, 100_000))
        except SyncError:
            found[source.url] = False
    return found


@pytest.mark.parametrize("tier", ["device", "edge"])
async def test_whichever_name_of_the_hub_a_node_joined_by_every_one_of_them_serves_it_and_no_mirror_sees_its_bearer(
    tmp_path: Path, mirrors: list[Listener], tier: str
) -> None:
    data, mirror = tmp_path / "hub", mirrors[0]
    options = HubOptions(data=data, port=0, broker="mqtts://127.0.0.1:1", names=("127.0.0.1", "localhost"))
    async with running_hub(options) as url:
        by_name = f"https://localhost:{urlsplit(url).port}"

        def enrol() -> Path:
            admin = HubClient(url, (data / "admin.token").read_text().strip(), data / "tls" / "ca.pem")
            token = str(admin.send("POST", "/api/v1/invitations", {"id": "acme.n-1", "tier": tier})["token"])
            admin.close()
            return join_hub(by_name, token, tmp_path / "node", tier=tier).config

        node = load_config(await asyncio.to_thread(enrol), _Whole).node
        assert (node.hub, set(node.sources)) == (by_name, {url, by_name})
        node = replace(node, sources=(mirror.url, *node.sources))
        fetcher = Fetcher(sources_of(node, node.credentials()), BlobStore(tmp_path / "store"))
        assert await answered(fetcher) == {mirror.url: False, url: True, by_name: True}
        assert mirror.heard == [None]

        # A node of an earlier release knows the URL it joined by, until its next renewal.
        assert node.identity is not None
        (node.identity / "live" / HUB).unlink()
        identity = Identity(node.identity)
        fetcher = Fetcher(sources_of(node, identity), BlobStore(tmp_path / "store"))
        assert await answered(fetcher) == {mirror.url: False, url: False, by_name: True}
        await asyncio.to_thread(Renewal(identity, by_name, SystemClock()).renew)
        assert await answered(fetcher) == {mirror.url: False, url: True, by_name: True}
        assert mirror.heard == [None] * 3


async def test_a_hub_that_sends_a_node_elsewhere_is_not_followed(tmp_path: Path, mirrors: list[Listener]) -> None:
    hub, other = mirrors
    hub.elsewhere = other.url
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "node.toml").write_text(
        '[node]\nid = "acme.n-1"\ntier = "edge"\nbroker = "mqtt://127.0.0.1:1"\nroot = "root.json"\ndata = "data"\n'
        f'credential = "token"\nsources = ["{hub.url}"]\n'
    )
    node = load_config(tmp_path / "node.toml", _Whole).node
    fetcher = Fetcher(sources_of(node, node.credentials()), BlobStore(tmp_path / "store"))
    with pytest.raises(Unavailable, match="302"):
        await fetcher.get(fetcher.sources[0], PATH, 100_000)
    assert (hub.heard, other.heard) == (["Bearer secret"], [])
