"""A hub for each test, in a folder of its own."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_in_memory import Bench, hub_bench


@pytest.fixture(scope="session")
def started_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's folder as its first start leaves it: the migrations and 260 files of metadata, each flushed to the disk, cost
    more than a test."""
    folder = tmp_path_factory.mktemp("hub") / "hub"

    async def start() -> None:
        async with hub_bench(folder):
            pass

    with ThreadPoolExecutor(1) as thread:  # asyncio.run leaves no event loop behind, and the tests have one
        thread.submit(asyncio.run, start()).result()
    return folder


@pytest.fixture
async def bench(tmp_path: Path, started_once: Path) -> AsyncIterator[Bench]:
    shutil.copytree(started_once, tmp_path / "hub")
    async with hub_bench(tmp_path / "hub") as running:
        yield running
