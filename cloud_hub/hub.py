"""The hub, put together.

API --> Registry, Documents --one transaction--> Storage --> Publisher --MQTT--> nodes
nodes --MQTT--> Fleet --> Storage --> Publisher (sends what a report shows to be missing)
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from cloud_hub.auth import Tokens, open_tokens
from cloud_hub.blobs import Blobs
from cloud_hub.documents import Documents
from cloud_hub.fleet import Fleet
from cloud_hub.keys import open_keys
from cloud_hub.publisher import Publisher
from cloud_hub.registry import Registry
from cloud_hub.storage import Storage
from sync.channel import LinkLike
from sync.clock import Clock, SystemClock
from sync.topics import hub_filters

RESTART_SECONDS = 1.0
"""Pause before a background loop that failed is started again, half to one and a half times that."""
STOP_SECONDS = 5.0
"""How long a stop waits for the background loops."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hub:
    """An open hub. `first_run`: the admin token was made just now. `broker_password_hash`: of the hub's own broker user."""

    data: Path
    storage: Storage
    blobs: Blobs
    documents: Documents
    registry: Registry
    publisher: Publisher
    fleet: Fleet
    tokens: Tokens
    link: LinkLike
    clock: Clock
    first_run: bool
    broker_password_hash: str | None = None


def new_epoch() -> str:
    return uuid4().hex


@asynccontextmanager
async def open_hub(
    data: Path,
    link: LinkLike,
    *,
    epoch: str,
    clock: Clock | None = None,
    broker_password_hash: str | None = None,
) -> AsyncIterator[Hub]:
    """Open the hub in the folder `data` and keep its loops running until the block ends. `epoch` names this start.

    The link belongs to the caller. Raises OSError, Malformed (a damaged key file) or TryAgain (the database is locked).
    """
    clock = clock or SystemClock()
    storage = _open_storage(data)
    try:
        tokens, first_run = open_tokens(storage, data)
        blobs = Blobs(data / "blobs")
        documents = Documents(open_keys(data), clock)
        with storage.write() as records:
            documents.catalog(records)
        fleet = Fleet(storage, clock)
        publisher = Publisher(storage, documents, clock, link, epoch)
        link.subscribe(*hub_filters())
        hub = Hub(
            data=data,
            storage=storage,
            blobs=blobs,
            documents=documents,
            registry=Registry(storage, blobs, documents, clock),
            publisher=publisher,
            fleet=fleet,
            tokens=tokens,
            link=link,
            clock=clock,
            first_run=first_run,
            broker_password_hash=broker_password_hash,
        )
        async with _background(
            lambda: fleet.listen(link), lambda: fleet.remember(publisher.heard), publisher.run, clock=clock
        ):
            yield hub
            publisher.leave()
    finally:
        storage.close()


def _open_storage(data: Path) -> Storage:
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Storage(data / "hub.sqlite")


@asynccontextmanager
async def _background(*loops: Callable[[], Awaitable[None]], clock: Clock) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(_keep_running(loop, clock)) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=STOP_SECONDS)


async def _keep_running(loop: Callable[[], Awaitable[None]], clock: Clock) -> None:
    """A full disk or a locked database may break one turn of a loop, never the loop."""
    while True:
        try:
            await loop()
        except Exception:
            log.exception("a background loop failed and is started again")
            await clock.sleep(random.uniform(0.5, 1.5) * RESTART_SECONDS)  # noqa: S311 - jitter, not a secret
        else:
            return
