"""The hub as a process: link, hub and HTTP server, started and stopped in order."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from cloud_hub.app import create_app
from cloud_hub.auth import admin_token_path, broker_hash
from cloud_hub.files import locked
from cloud_hub.gate import Application
from cloud_hub.hub import Hub, new_epoch, open_hub
from cloud_hub.keys import keyring_path
from cloud_hub.publisher import hub_will
from models.serving.process import announce
from sync.channel import LinkOptions, address_of
from sync.errors import InvalidConfig
from sync.link import Link
from sync.topics import HUB_USER

MAX_CONNECTIONS = 512
"""Requests and connections under way; beyond it new ones are told 503."""
IDLE_SECONDS = 30
DRAIN_SECONDS = 5
"""How long a stop waits for answers under way; a long download is cut and resumes by range."""
MAX_INCOMING = 20_000
"""A fleet's retained messages arrive at once on every connect: three per node."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubOptions:
    """`port` 0 = chosen by the system. `broker_password`: a file holding the password of the broker user `_hub-1`."""

    data: Path
    host: str = "127.0.0.1"
    port: int = 8080
    broker: str = "mqtt://127.0.0.1:1883"
    broker_password: Path | None = None


@asynccontextmanager
async def running_hub(options: HubOptions) -> AsyncIterator[str]:
    """Start a hub; yields its URL once it answers, written to `hub.json` too.

    The file is gone again when the block ends.
    Raises InvalidConfig for a host or broker beyond loopback or a data folder in use, OSError when the port is taken or a
    file cannot be read.
    """
    check_loopback("host", options.host)
    check_loopback("broker", address_of(options.broker)[0])
    password = _read_password(options.broker_password)
    epoch = new_epoch()
    link_options = LinkOptions(
        url=options.broker,
        client_id=HUB_USER,
        username=HUB_USER,
        password=password,
        will=hub_will(epoch),
        max_incoming=MAX_INCOMING,
    )
    # Locked before the link connects: a second hub on the folder would take the first one's place at the broker.
    with locked(options.data), _listening(options.host, options.port) as listener:
        async with Link(link_options) as link:
            hashed = broker_hash(password) if password else None
            async with (
                open_hub(options.data, link, epoch=epoch, broker_password_hash=hashed) as hub,
                _serving(create_app(hub), listener),
            ):
                url = f"http://{_authority(listener)}"
                with _announced(options.data / "hub.json", url):
                    _print_start(hub, url)
                    yield url


@contextmanager
def _announced(path: Path, url: str) -> Iterator[None]:
    announce(path, url=url)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def check_loopback(field: str, host: str) -> None:
    """Nothing binds or dials beyond this machine until nodes can be enrolled with certificates. Raises InvalidConfig."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InvalidConfig(f"{field} {host!r} is not loopback: without certificates nothing leaves this machine")


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
async def _serving(application: Application, listener: socket.socket) -> AsyncIterator[None]:
    config = uvicorn.Config(
        application,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
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


def _print_start(hub: Hub, url: str) -> None:
    made = " (made just now)" if hub.first_run else ""
    print(f"hub answers on {url}, API at {url}/docs")
    print(f"admin token: {admin_token_path(hub.data)}{made}")
    print(f"keyring for nodes: {keyring_path(hub.data)}", flush=True)
