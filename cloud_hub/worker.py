"""A cloud worker: a node like any other, of tier cloud, with a desired document and no tier above.

request --HTTP, gRPC, WebSocket--> Meter -> Guard -> Router(here=Cache(Local), up=None)
document --MQTT--> Member's updaters -> Repository | PolicyBook
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from msgspec.structs import replace

from models.engines import available_engines
from models.errors import TierlineError
from models.serving.assembly import Listening, caching, serving
from models.serving.http.server import HttpServer
from models.serving.local import Local
from models.serving.meter.delivery import watch_member
from models.serving.policy_book import PolicyBook
from models.serving.process import MAX_PORT, announce, configure_logging, port_number, run_until_stopped
from models.serving.quality_watch import QualityWatch
from models.serving.repository import Repository
from models.serving.router import Router
from models.serving.watched import Watched
from sync.activation import Activator
from sync.doctor.remote import offer_doctor
from sync.errors import InvalidConfig, SyncError
from sync.identity import LOOPBACK, Membership, load_config
from sync.member import join
from sync.messages import Capabilities
from sync.version import running_version

TIER = "cloud"


class WorkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[node]` who it is and whom it trusts; `host`, `port`: its data plane, loopback only; `threads`: engine threads, None =
    one per usable core; `[listen]`: what else it opens (its host and port are those above)."""

    node: Membership
    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None
    listen: Listening = Listening()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= MAX_PORT or (self.threads is not None and self.threads < 1):
            raise ValueError(f"port is 0 to {MAX_PORT}, threads 1 or more")


@asynccontextmanager
async def cloud_worker(config: WorkerConfig) -> AsyncIterator[HttpServer]:
    """Start a worker; leaving the block drains and stops it. Raises as `edge_node.node.edge_node` does."""
    engines = available_engines()
    quality = QualityWatch(config.node.data / "quality.json")
    repository = Repository(engines=engines, verdicts=config.node.data / "verdicts", quality=quality)
    book = PolicyBook(TIER)
    listening = replace(config.listen, host=config.host, port=config.port)
    local = Local(repository, TIER, threads=config.threads)
    watched = Watched(local, quality, repository.replaced, busy=lambda: len(local.pool) > 0)
    capabilities = Capabilities(tier=TIER, engines=engines, labels=config.node.labels, software=running_version())
    activators: dict[str, Activator] = {"desired": repository, "policy": book}
    try:
        async with (
            join(
                config.node,
                activators=activators,
                capabilities=capabilities,
                running=repository.running,
                on_settings=lambda settings: quality.configure(settings.quality),
            ) as member,
            caching(listening, watched, repository) as cache,
            serving(
                listening,
                Router(cache, None, models=repository, book=book),
                repository,
                tier=TIER,
                node=config.node.id,
                local=local,
                cache=cache,
                ready=repository.is_settled,
                watch=lambda registry: watch_member(registry, member),
            ) as served,
        ):
            offer_doctor(member, "cloud_hub.worker_doctor", config, repository.running)
            yield served.server
    finally:
        await watched.close()
        await local.close()
        await repository.close()


def worker(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("join", "leave"):
        from sync.enrol_cli import identity

        return identity("worker", argv)
    parser = argparse.ArgumentParser(prog="tierline worker", description="Run a cloud worker.")
    parser.add_argument("config", type=Path, help="TOML file: host, port, threads, [node]")
    parser.add_argument("--http-port", type=port_number, help="overrides port; 0 = chosen by the system")
    options = parser.parse_args(argv)
    try:
        config = load_config(options.config, WorkerConfig)
        if config.node.tier != TIER or {config.host, config.listen.metrics_host} - set(LOOPBACK):
            raise InvalidConfig(
                f"{options.config}: node.tier must be 'cloud' and host loopback until nodes can be enrolled"
            )
        if options.http_port is not None:
            config = replace(config, port=options.http_port)
        configure_logging(config.node.id)
        return run_until_stopped(lambda: _announced(config))
    except (SyncError, TierlineError, OSError, ImportError, ValueError) as error:
        print(f"tierline worker: {error}", file=sys.stderr)
        return 2


@asynccontextmanager
async def _announced(config: WorkerConfig) -> AsyncIterator[HttpServer]:
    async with cloud_worker(config) as server:
        announce(config.node.data / "worker.json", url=server.url, id=config.node.id)
        print(f"cloud worker {config.node.id} answers on {server.url}", flush=True)
        yield server
