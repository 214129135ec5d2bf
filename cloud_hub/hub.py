"""The hub, put together.

API --> Registry, Documents --one transaction--> Storage --> Publisher --MQTT--> nodes
nodes --MQTT--> Fleet --> Storage --> Publisher (sends what a report shows to be missing)
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from cloud_hub.approvals import Approvals
from cloud_hub.auth import Tokens, open_tokens
from cloud_hub.authority import Authority, open_authority
from cloud_hub.blobs import Blobs
from cloud_hub.blocks import BlockServer
from cloud_hub.deltas import Deltas
from cloud_hub.documents import Documents
from cloud_hub.enrolment import Enrolment, Public
from cloud_hub.fleet import Fleet
from cloud_hub.inbox import Inbox
from cloud_hub.keys import open_keys
from cloud_hub.kick import Kick, Kicker
from cloud_hub.publisher import Publisher
from cloud_hub.registry import Registry
from cloud_hub.shares import Shares
from cloud_hub.software import SoftwareShelf
from cloud_hub.storage import Storage
from cloud_hub.tuf_repository import Repository
from sync.channel import LinkLike
from sync.clock import Clock, SystemClock
from sync.rpc import Asker
from sync.schema import check_folder
from sync.topics import hub_filters
from sync.trust import digest_of, encode_keyring

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
    deltas: Deltas
    documents: Documents
    registry: Registry
    approvals: Approvals
    publisher: Publisher
    fleet: Fleet
    inbox: Inbox
    rpc: Asker
    software: SoftwareShelf
    tokens: Tokens
    link: LinkLike
    clock: Clock
    first_run: bool
    enrolment: Enrolment
    kicker: Kicker
    broker_password_hash: str | None = None
    renew_own: Callable[[], None] = lambda: None
    shares: Shares = field(default_factory=Shares)

    @property
    def root(self) -> bytes:
        """The newest root metadata: what nodes pin."""
        return self.approvals.repository.root


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
    authority: Authority | None = None,
    public: Public | None = None,
    kick: Kick | None = None,
    renew_own: Callable[[], None] = lambda: None,
) -> AsyncIterator[Hub]:
    """Open the hub in the folder `data` and keep its loops running until the block ends. `epoch` names this start.

    `authority` None = its own, below `data`. `public`: what nodes are told about where to go. `kick` ends a revoked node's
    connection; `renew_own` issues the hub's own certificates again after a change of authority. The link belongs to the caller.
    Raises OSError, Malformed (a damaged key file) or TryAgain (the database is locked).
    """
    clock = clock or SystemClock()
    storage = _open_storage(data)
    try:
        tokens, first_run = open_tokens(storage, data, clock)
        blobs = Blobs(data / "blobs")
        keys = await asyncio.to_thread(open_keys, data)
        documents = Documents(keys, clock)
        keyring = encode_keyring(keys.keyring())
        await blobs.put_bytes(digest_of(keyring), keyring)
        repository = await asyncio.to_thread(Repository, data, keys, clock)
        approvals = Approvals(storage, repository, (digest_of(keyring), len(keyring)), clock)
        await asyncio.to_thread(approvals.bring)
        with storage.write() as records:
            documents.under_new_key(records)
        inbox = Inbox(storage, clock, link)
        rpc = Asker(link, clock)
        blocks = BlockServer(link, storage, blobs, repository.read, digest_of(keyring), clock)
        fleet = Fleet(storage, clock, events=inbox.hear, answers=rpc.hear, blocks=blocks.hear)
        publisher = Publisher(storage, documents, clock, link, epoch)
        link.subscribe(*hub_filters())
        if authority is None:
            authority = await asyncio.to_thread(open_authority, data / "ca", clock.wall())
        enrolment = Enrolment(
            storage, documents, authority, clock, lambda: ("root.json", approvals.repository.root), public
        )
        kicker = Kicker(kick, clock)
        deltas = Deltas(data / "deltas", blobs.path, lambda digests: _approved(storage, digests))
        hub = Hub(
            data=data,
            storage=storage,
            blobs=blobs,
            deltas=deltas,
            documents=documents,
            registry=Registry(storage, blobs, approvals, clock),
            approvals=approvals,
            publisher=publisher,
            fleet=fleet,
            inbox=inbox,
            rpc=rpc,
            software=SoftwareShelf(storage, blobs, approvals, documents, clock),
            tokens=tokens,
            link=link,
            clock=clock,
            first_run=first_run,
            enrolment=enrolment,
            kicker=kicker,
            broker_password_hash=broker_password_hash,
            renew_own=renew_own,
        )
        async with _background(
            lambda: fleet.listen(link),
            lambda: fleet.remember(publisher.heard),
            lambda: inbox.run(fleet.knows, lambda: fleet.size),
            publisher.run,
            approvals.run,
            deltas.run,
            blocks.run,
            kicker.run,
            clock=clock,
        ):
            yield hub
            publisher.leave()
    finally:
        storage.close()


def _approved(storage: Storage, digests: Collection[str]) -> Mapping[str, int]:
    with storage.read() as records:
        return records.approved_among(digests)


def _open_storage(data: Path) -> Storage:
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_folder(data)
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
