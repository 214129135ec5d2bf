"""The edge node, put together: read this first.

    request --HTTP, gRPC, WebSocket--> Meter -> Guard -> Router --+-- here: Cache -> Watched -> Local -> Repository's sessions
                                                                  +-- up:   Remote -> the cloud's data plane
    document --MQTT--> Member's updaters -> Repository (models) | PolicyBook (routing)
    device  --HTTP--> BlobMirror -> store, else fetched from the hub and kept

The data plane needs neither the broker nor the hub: what was active is loaded from disk before the network is tried.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from edge_node.blobs import BlobMirror
from edge_node.config import EdgeConfig
from edge_node.control import LocalControl
from edge_node.metadata import MetadataMirror
from models.engines import available_engines
from models.serving.assembly import caching, serving
from models.serving.http.server import HttpServer
from models.serving.local import Local
from models.serving.meter.delivery import watch_member, watch_mirror
from models.serving.meter.registry import Registry
from models.serving.policy_book import PolicyBook
from models.serving.predictor import Predictor
from models.serving.quality_watch import QualityWatch
from models.serving.remote import Remote
from models.serving.repository import Repository
from models.serving.router import Router
from models.serving.watched import Watched
from sync.activation import Activator
from sync.clock import SystemClock
from sync.doctor.remote import offer_doctor
from sync.member import Member, join
from sync.messages import Capabilities
from sync.upgrade import Upgrade, end_process, proving
from sync.version import running_version

TIER = "edge"


@dataclass(frozen=True)
class EdgeNode:
    """A running edge node. `server.url` is its data plane; `addresses`: all it answers on, what -> URL."""

    server: HttpServer
    addresses: Mapping[str, str]
    member: Member
    repository: Repository
    router: Router


@asynccontextmanager
async def edge_node(config: EdgeConfig, upgrade: Upgrade | None = None) -> AsyncIterator[EdgeNode]:
    """Start an edge node; leaving the block drains and stops it.

    Raises InvalidConfig, StoreFailed, or OSError when the port is taken. A broker or hub that is down is no error.
    `upgrade`: how its own software is replaced, None = it refuses to be.
    """
    engines = available_engines()
    quality = QualityWatch(config.node.data / "quality.json")
    repository = Repository(engines=engines, verdicts=config.node.data / "verdicts", quality=quality)
    book = PolicyBook(TIER)
    local = Local(repository, TIER, threads=config.serving.threads)
    watched = Watched(local, quality, repository.replaced, busy=lambda: len(local.pool) > 0)
    capabilities = Capabilities(tier=TIER, engines=engines, labels=config.node.labels, software=running_version())
    upgrade = upgrade or Upgrade(None, SystemClock(), restart=end_process)
    activators: dict[str, Activator] = {"desired": repository, "policy": book, "software": upgrade}
    try:
        async with join(
            config.node,
            activators=activators,
            capabilities=capabilities,
            running=repository.running,
            settings=config.updates,
            on_settings=lambda settings: quality.configure(settings.quality),
            quota=config.store,
            blocks=config.blocks,
        ) as member:
            mirror = BlobMirror(
                member.store,
                member.fetcher,
                MetadataMirror(member.fetcher, config.node.data / "mirror"),
                config.mirror,
            )
            async with (
                mirror,
                proving(upgrade),
                caching(config.listen, watched, repository) as cache,
                routed(config, cache, repository, book) as router,
                serving(
                    config.listen,
                    router,
                    repository,
                    tier=TIER,
                    node=config.node.id,
                    local=local,
                    cache=cache,
                    ready=repository.is_settled,
                    extra={**mirror.routes, **LocalControl(member).routes},
                    watch=lambda registry: _watch(registry, member, mirror),
                ) as served,
            ):
                upgrade.joined(lambda: member.connected, lambda: bool(repository.running()))
                offer_doctor(member, "edge_node.doctor", config, repository.running)
                yield EdgeNode(served.server, served.addresses, member, repository, router)
    finally:
        await watched.close()
        await local.close()
        await repository.close()


def _watch(registry: Registry, member: Member, mirror: BlobMirror) -> None:
    watch_member(registry, member)
    watch_mirror(registry, mirror)


@asynccontextmanager
async def routed(config: EdgeConfig, here: Predictor, models: Repository, book: PolicyBook) -> AsyncIterator[Router]:
    """`here`, with the tier above where there is one."""
    up = Remote(config.up.url, tier="cloud") if config.up else None
    router = Router(here, up, models=models, book=book)
    try:
        async with router.probing():
            yield router
    finally:
        if up is not None:
            await up.close()
