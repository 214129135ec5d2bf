"""The edge node, put together: read this first.

    request --HTTP, gRPC, WebSocket--> Meter -> Guard -> Router --+-- here: Cache -> Local -> Repository's sessions
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
from models.engines import available_engines
from models.serving.assembly import caching, serving
from models.serving.http.server import HttpServer
from models.serving.local import Local
from models.serving.policy_book import PolicyBook
from models.serving.predictor import Predictor
from models.serving.remote import Remote
from models.serving.repository import Repository
from models.serving.router import Router
from sync.activation import Activator
from sync.member import Member, join
from sync.messages import Capabilities

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
async def edge_node(config: EdgeConfig) -> AsyncIterator[EdgeNode]:
    """Start an edge node; leaving the block drains and stops it.

    Raises InvalidConfig, StoreFailed, or OSError when the port is taken. A broker or hub that is down is no error.
    """
    engines = available_engines()
    repository = Repository(engines=engines, verdicts=config.node.data / "verdicts")
    book = PolicyBook(TIER)
    local = Local(repository, TIER, threads=config.serving.threads)
    capabilities = Capabilities(tier=TIER, engines=engines, labels=config.node.labels)
    activators: dict[str, Activator] = {"desired": repository, "policy": book}
    try:
        async with join(
            config.node, activators=activators, capabilities=capabilities, running=repository.running
        ) as member:
            mirror = BlobMirror(member.packages, member.fetcher)
            async with (
                caching(config.listen, local, repository) as cache,
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
                    extra=mirror.routes,
                ) as served,
            ):
                yield EdgeNode(served.server, served.addresses, member, repository, router)
    finally:
        await local.close()
        await repository.close()


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
