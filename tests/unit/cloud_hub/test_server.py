"""The hub as a process: what it refuses before it touches anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_hub.server import HubOptions, running_hub
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
