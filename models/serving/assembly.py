"""The data plane of one process, put together: what every node wraps around its predictor, and the ports it opens.

    REST | WebSocket | gRPC -> DataPlane -> Meter -> Guard -> predictor        metrics and traces on a port of their own
                                     \\-> Jobs (asynchronous inference)

`tierline serve`, the edge node and the cloud worker differ in the predictor and in who decides which models are served.
What is not configured is not imported.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from models.serving.access.pages import Pages
from models.serving.cache.cache import DEFAULT_BYTES, Cache, SecondLevel
from models.serving.cache.identity import RepositoryIdentities
from models.serving.exchange import Handler
from models.serving.guard import Guard
from models.serving.http.server import HttpServer, serve_http
from models.serving.index import ModelControl
from models.serving.local import Local
from models.serving.meter.endpoint import metrics_handler
from models.serving.meter.meter import Meter
from models.serving.meter.registry import Registry
from models.serving.meter.resources import watch_process, watching_loop
from models.serving.meter.sources import (
    watch_cache,
    watch_exporter,
    watch_guard,
    watch_memory,
    watch_queue,
    watch_router,
)
from models.serving.meter.trace import Tracer
from models.serving.plane import DataPlane
from models.serving.predictor import Predictor
from models.serving.repository import Repository
from models.serving.rest import RestHandler
from models.serving.router import Router

if TYPE_CHECKING:
    from ssl import SSLContext

    from models.serving.access.checked import CheckedAccess
    from models.serving.jobs.desk import Jobs
    from models.serving.jobs.store import JobStore
    from models.serving.websocket.server import WebSockets

MEGABYTE = 1 << 20


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PEM files. `client_ca`: who signs clients' certificates, None = clients show none. `client_required`: a client without
    one is refused; otherwise a token may stand in for it."""

    cert: Path
    key: Path
    client_ca: Path | None = None
    client_required: bool = True


class Listening(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a data plane answers and what it keeps. Ports: 0 = chosen by the system, None = not at all.

    `metrics_host`: where metrics and traces are, for whoever reaches it. `unix`: path of a socket, None = none. `access`: the
    access file (who may do what), None = open to whoever can connect. `cache_mb`: for models that opt in; `cache_url`: a Redis
    or Valkey beside it. `jobs`: file of asynchronous inference, or a Redis URL; None = there is none. `webhooks`: URLs below
    which a job's end may be told. `origins`: web pages that may ask here. `otlp`: collector of sampled traces; `trace_share`:
    0..1 of requests that nobody else has sampled.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    unix: Path | None = None
    access: Path | None = None
    tls: Tls | None = None
    cache_mb: int = DEFAULT_BYTES // MEGABYTE
    cache_url: str | None = None
    jobs: Path | None = None
    jobs_url: str | None = None
    webhooks: tuple[str, ...] = ()
    webhook_secret_file: Path | None = None
    origins: tuple[str, ...] = ()
    otlp: str | None = None
    trace_share: float = 0.01

    def __post_init__(self) -> None:
        for name in ("port", "grpc_port", "metrics_port"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 65_535:
                raise ValueError(f"{name} {value} is not 0 to 65535")
        if self.cache_mb < 0 or not 0 <= self.trace_share <= 1:
            raise ValueError("cache_mb is 0 or more, trace_share from 0 to 1")
        if self.jobs is not None and self.jobs_url is not None:
            raise ValueError("jobs are kept in a file or behind a jobs_url, not both")


@dataclass(frozen=True)
class Serving:
    """A data plane that answers. `addresses`: what -> URL, for people and scripts."""

    server: HttpServer
    plane: DataPlane
    addresses: Mapping[str, str]


@asynccontextmanager
async def caching(listening: Listening, local: Predictor, repository: Repository) -> AsyncIterator[Cache]:
    """`local` with a result cache for the models whose settings ask for one."""
    second: SecondLevel | None = None
    async with AsyncExitStack() as stack:
        if listening.cache_url is not None:
            from models.serving.cache.redis import RedisCache

            shared = RedisCache(listening.cache_url)
            stack.push_async_callback(shared.close)
            second = shared
        yield Cache(
            local,
            RepositoryIdentities(repository),
            models=lambda name: repository.settings(name).cache,
            budget=listening.cache_mb * MEGABYTE,
            second=second,
        )


@asynccontextmanager
async def serving(
    listening: Listening,
    predictor: Predictor,
    repository: Repository,
    *,
    tier: str,
    node: str,
    local: Local,
    cache: Cache,
    ready: Callable[[], bool],
    control: ModelControl | None = None,
    extra: Mapping[str, Handler] | None = None,
    watch: Callable[[Registry], None] | None = None,
) -> AsyncIterator[Serving]:
    """Open the ports; leaving the block drains and closes them. `node`: a name for traces. `watch` adds metrics of what the
    data plane does not know.

    Raises InvalidAccess, or OSError naming the file or port.
    """
    async with AsyncExitStack() as stack:
        access = _access(listening)
        guard = Guard(predictor, access)
        registry = Registry()
        tracer = await _tracer(listening, node, registry, stack)
        meter = Meter(guard, registry, repository, tier=tier, tracer=tracer)
        plane = DataPlane(meter, repository, ready=ready, access=access, control=control, statistics=meter)
        _watch(registry, guard, cache, repository, local, predictor)
        if watch is not None:
            watch(registry)
        jobs = await _jobs(listening, plane, guard, stack)
        sockets = _sockets(listening, plane, jobs, registry)
        routes = _routes(plane, jobs, sockets, extra)
        handler = RestHandler(plane, extra=routes, origins=listening.origins, host=listening.host)
        server = await stack.enter_async_context(
            serve_http(
                handler,
                host=listening.host,
                port=listening.port,
                tls=_server_context(listening.tls),
                unix=listening.unix,
            )
        )
        # Left before HTTP is: its drain does not wait for connections that have changed their protocol.
        stack.push_async_callback(sockets.close)
        addresses = {"http" if each.startswith("http") else "unix": each for each in server.urls}
        # Once HTTP answers, and beside it: they take long to import, and a first answer needs neither.
        await asyncio.to_thread(_prepare_the_rest, plane)
        if listening.grpc_port is not None:
            from models.serving.grpc.server import serve_grpc

            grpc = await stack.enter_async_context(
                serve_grpc(
                    plane, host=listening.host, port=listening.grpc_port, credentials=_grpc_credentials(listening.tls)
                )
            )
            addresses["grpc"] = grpc.url
        if listening.metrics_port is not None:
            watch_process(registry)
            await stack.enter_async_context(watching_loop(registry))
            host = listening.metrics_host
            scraped = Pages(listening.origins, host).around(metrics_handler(registry, tracer))
            metrics = await stack.enter_async_context(serve_http(scraped, host=host, port=listening.metrics_port))
            addresses["metrics"] = f"{metrics.url}/metrics"
        yield Serving(server, plane, addresses)


def _prepare_the_rest(plane: DataPlane) -> None:
    """What takes long the first time, before anyone waits for it."""
    import_module("models.serving.websocket.session")
    _ = plane.version


def _access(listening: Listening) -> CheckedAccess | None:
    if listening.access is None:
        return None
    from models.serving.access.checked import CheckedAccess

    hosts = [listening.host, *(["unix"] if listening.unix is not None else [])]
    return CheckedAccess(listening.access, listening=hosts)


async def _tracer(listening: Listening, node: str, registry: Registry, stack: AsyncExitStack) -> Tracer:
    if listening.otlp is None:
        return Tracer(rate=listening.trace_share)
    from models.serving.meter.otel import exporting

    exporter = await stack.enter_async_context(exporting(listening.otlp, service_instance_id=node))
    watch_exporter(registry, exporter)
    return Tracer(rate=listening.trace_share, export=exporter.offer)


def _watch(
    registry: Registry, guard: Guard, cache: Cache, repository: Repository, local: Local, predictor: Predictor
) -> None:
    watch_guard(registry, guard)
    watch_cache(registry, cache)
    watch_memory(registry, repository.residency)
    watch_queue(registry, local.pool)
    if isinstance(predictor, Router):
        watch_router(registry, predictor)


async def _jobs(listening: Listening, plane: DataPlane, guard: Guard, stack: AsyncExitStack) -> Jobs | None:
    if listening.jobs is None and listening.jobs_url is None:
        return None
    from models.serving.jobs.desk import Jobs
    from models.serving.jobs.webhook import Webhooks

    if listening.jobs_url is not None:
        from models.serving.jobs.redis import RedisJobs

        store: JobStore = RedisJobs(listening.jobs_url)
    else:
        from models.serving.jobs.sqlite import SqliteJobs

        assert listening.jobs is not None
        store = SqliteJobs(listening.jobs)
    webhooks = Webhooks(listening.webhooks, secret=_secret(listening.webhook_secret_file))
    jobs = Jobs(store, plane.predictor, ready=plane.is_ready, webhooks=webhooks, admit=guard.admit)
    await stack.enter_async_context(jobs.running())
    return jobs


def _secret(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes().strip()


def _sockets(listening: Listening, plane: DataPlane, jobs: Jobs | None, registry: Registry) -> WebSockets:
    from models.serving.websocket.server import WebSockets

    feed = None
    if jobs is not None:
        from models.serving.jobs.feed import job_feed

        feed = job_feed(jobs)
    sockets = WebSockets(plane, origins=listening.origins, jobs=feed)
    sockets.watch()
    registry.read("websocket.connections", lambda: sockets.connections)
    return sockets


def _routes(
    plane: DataPlane, jobs: Jobs | None, sockets: WebSockets, extra: Mapping[str, Handler] | None
) -> dict[str, Handler]:
    routes: dict[str, Handler] = {**(extra or {}), "/v2/ws": sockets}
    if jobs is not None:
        from models.serving.jobs.routes import PREFIX, job_handler, submit

        routes[PREFIX] = job_handler(plane, jobs)
        plane.submit = partial(submit, plane, jobs)
    return routes


def _server_context(tls: Tls | None) -> SSLContext | None:
    if tls is None:
        return None
    from models.serving.access.tls import server_context

    return server_context(tls.cert, tls.key, tls.client_ca, client_required=tls.client_required)


def _grpc_credentials(tls: Tls | None) -> Callable[[], Any] | None:
    if tls is None:
        return None
    from models.serving.access.tls import grpc_credentials

    return partial(grpc_credentials, tls.cert, tls.key, tls.client_ca, client_required=tls.client_required)
