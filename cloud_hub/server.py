"""The hub as a process: link, hub and HTTP server, started and stopped in order."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from cloud_hub.app import create_app
from cloud_hub.auth import admin_token_path, broker_hash
from cloud_hub.authority import open_authority
from cloud_hub.broker_connection import BrokerConnection
from cloud_hub.certificates import HubCertificates
from cloud_hub.enrolment import Public
from cloud_hub.files import locked
from cloud_hub.gate import Application
from cloud_hub.http_bounds import BoundedHttp
from cloud_hub.hub import Hub, new_epoch, open_hub
from cloud_hub.keys import root_path
from cloud_hub.publisher import hub_will
from models.serving.access.tls import server_context
from models.serving.process import announce
from sync.channel import broker_address
from sync.clock import SystemClock
from sync.errors import InvalidConfig
from sync.link import Link

MAX_CONNECTIONS = 512
"""Requests and connections under way; beyond it new ones are told 503."""
IDLE_SECONDS = 30
DRAIN_SECONDS = 5
"""How long a stop waits for answers under way; a long download is cut and resumes by range."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubOptions:
    """`port` 0 = chosen by the system. `broker_password`: a file holding the password of the broker user `_hub-1`, for a
    broker on this machine; elsewhere the hub shows a certificate.

    `names`: host names and addresses by which nodes reach this machine; saying one turns TLS on. `authority`: chain and key of
    an external authority, None = the hub's own. `public_brokers`, `public_urls`: what nodes are told, () = made from `names`.
    """

    data: Path
    host: str = "127.0.0.1"
    port: int = 8080
    broker: str = "mqtt://127.0.0.1:1883"
    broker_password: Path | None = None
    names: tuple[str, ...] = ()
    authority: tuple[Path, Path] | None = None
    public_brokers: tuple[str, ...] = ()
    public_urls: tuple[str, ...] = ()

    @property
    def tls(self) -> bool:
        return bool(self.names) or not is_loopback(self.host)


@asynccontextmanager
async def running_hub(options: HubOptions) -> AsyncIterator[str]:
    """Start a hub; yields its URL once it answers, written to `hub.json` too.

    The file is gone again when the block ends.
    Raises InvalidConfig for a host or broker beyond loopback or a data folder in use, OSError when the port is taken or a
    file cannot be read.
    """
    broker = broker_address(options.broker)
    if not broker.tls:
        check_loopback("broker", broker.host)
        if options.tls:
            log.warning("without mqtts to the broker a revoked node's live connection is silenced, but not ended")
    password = _read_password(options.broker_password)
    # Locked before the link connects: a second hub on the folder would take the first one's place at the broker.
    with locked(options.data), _listening(options.host, options.port) as listener:
        clock, epoch = SystemClock(), new_epoch()
        authority = await asyncio.to_thread(open_authority, options.data / "ca", clock.wall(), options.authority)
        own = HubCertificates(options.data / "tls", authority, options.names, clock)
        await asyncio.to_thread(own.refresh)
        connection = BrokerConnection(options.broker, own, authority, clock)
        hashed = broker_hash(password) if password else None
        async with (
            Link(connection.options(password, hub_will(epoch))) as link,
            open_hub(
                options.data,
                link,
                epoch=epoch,
                broker_password_hash=hashed,
                authority=authority,
                public=_public(options, listener),
                kick=connection.take_place_of if broker.tls else None,
                renew_own=own.refresh,
            ) as hub,
            _serving(create_app(hub), listener, own if options.tls else None),
            _alongside(own.keep_fresh()),
        ):
            url = f"{'https' if options.tls else 'http'}://{_authority(listener)}"
            with _announced(options.data / "hub.json", url):
                _print_start(hub, url, own if options.tls else None)
                yield url


@contextmanager
def _announced(path: Path, url: str) -> Iterator[None]:
    announce(path, url=url)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_loopback(field: str, host: str) -> None:
    """Nothing dials beyond this machine without TLS. Raises InvalidConfig."""
    if not is_loopback(host):
        raise InvalidConfig(
            f"{field} {host!r} is not loopback: use mqtts or wss, nothing leaves this machine in the open"
        )


def _public(options: HubOptions, listener: socket.socket) -> Public:
    """Under which addresses nodes are told to look for the hub and its broker."""
    names = [name.strip("[]") for name in options.names]
    hosts = [f"[{name}]" if ":" in name else name for name in names]
    brokers = options.public_brokers or tuple(f"mqtts://{host}:8883" for host in hosts)
    if not brokers and broker_address(options.broker).tls:
        brokers = (options.broker,)
    port = listener.getsockname()[1]
    return Public(brokers, options.public_urls or tuple(f"https://{host}:{port}" for host in hosts))


@asynccontextmanager
async def _alongside(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=1.0)


def _read_password(path: Path | None) -> str | None:
    return path.read_text().strip() if path is not None else None


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=256)
    try:
        yield listener
    finally:
        listener.close()


def _authority(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the process has its own, and stops more than HTTP."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@asynccontextmanager
async def _serving(
    application: Application, listener: socket.socket, own: HubCertificates | None
) -> AsyncIterator[None]:
    config = uvicorn.Config(
        application,
        http=BoundedHttp,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        # Looks at the files when somebody connects: a renewed certificate needs no restart.
        ssl_context_factory=None if own is None else lambda _config, _default: server_context(*own.server),
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    up = asyncio.create_task(server.up.wait())
    try:
        await asyncio.wait({task, up}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            raise OSError("the HTTP server did not start")
        yield
    finally:
        up.cancel()
        server.should_exit = True
        await asyncio.wait({task}, timeout=2 * DRAIN_SECONDS)


def _print_start(hub: Hub, url: str, own: HubCertificates | None) -> None:
    made = " (made just now)" if hub.first_run else ""
    print(f"hub answers on {url}, API at {url}/docs")
    if own is not None:
        print(
            f"authority: {hub.data / 'ca'} (back this folder up: nodes trust nothing else); for clients: {own.bundle}"
        )
    print(f"admin token: {admin_token_path(hub.data)}{made}")
    print(f"root metadata for nodes to pin: {root_path(hub.data)}", flush=True)
