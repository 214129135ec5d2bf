"""The hub as a process: what it refuses before it touches anything."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cloud_hub.server import HubOptions, _public, running_hub
from sync.channel import broker_address
from sync.errors import InvalidConfig


async def test_a_second_hub_on_one_data_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    options = HubOptions(data=tmp_path / "hub", port=0, broker="mqtt://127.0.0.1:1")
    async with running_hub(options):
        staged = options.data / "blobs" / "staging" / "upload"
        staged.write_bytes(b"half of it")
        with pytest.raises(InvalidConfig, match="in use by another hub"):
            async with running_hub(options):
                pytest.fail("two hubs run on one folder")
        assert staged.exists()
        assert (options.data / "hub.json").exists()
    async with running_hub(options):
        assert (options.data / "hub.json").exists()


def test_addresses_of_ipv6_are_told_so_that_nodes_can_read_them() -> None:
    options = HubOptions(data=Path(), names=("[fd00::1]", "fd00::2", "hub.test"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        public = _public(options, listener)
    assert [broker_address(url).host for url in public.brokers] == ["fd00::1", "fd00::2", "hub.test"]
    assert [urlsplit(url).hostname for url in public.sources] == ["fd00::1", "fd00::2", "hub.test"]
