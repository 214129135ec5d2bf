"""A gRPC port in front of a data plane.

grpc's asyncio server: everything happens in the event loop that the data plane belongs to. Measured at 32 connections it needs
two thirds of the processor time of the server with threads, before the hops between those and the loop.
grpc and protobuf are imported when a port is opened, in a thread: it takes a while.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

import msgspec

from models.serving.plane import DataPlane

log = logging.getLogger("tierline.grpc")

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Longest message, also once it is decompressed: as a body over HTTP."""
MAX_METADATA_BYTES = 16 * 1024
"""Most metadata of one call."""
MAX_CALLS_PER_CONNECTION = 256
"""Most calls of one connection at once; a client keeps more until there is room."""
MAX_CALLS_HELD = 4096
"""Most calls at once, of all connections, also those that are being refused, which are over at once unless a client reads
nothing: 60 MB. What is served is bounded much lower, by caller: see `servicer` and `stream`."""
MAX_CONNECTIONS = 1024
"""Most connections at once; more are closed at once, before they take the file descriptors of everything else."""
IDLE_SECONDS = 300
"""A connection without a call for this long is closed; clients connect again by themselves."""
HANDSHAKE_SECONDS = 10
"""Longest time for a connection to be set up."""
KEEPALIVE_SECONDS = 60
"""A connection that is silent for this long is asked whether it still exists."""
KEEPALIVE_ANSWER_SECONDS = 20
RESTART_SECONDS = 0.1
MAX_RESTART_SECONDS = 10.0
"""A server that ended is opened again at once; where its port is taken meanwhile, after pauses between these."""
LEAST_PING_SECONDS = 10
"""A client that pings more often than this is cut off."""


class GrpcServer(msgspec.Struct, frozen=True):
    """Where a server listens."""

    url: str
    port: int


@asynccontextmanager
async def serve_grpc(
    plane: DataPlane,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    credentials: Callable[[], Any] | None = None,
    drain_seconds: float = 5.0,
) -> AsyncIterator[GrpcServer]:
    """Serve `plane`, which belongs to the running loop, while the context lasts. `port` 0 = chosen by the system.

    `credentials`: makes the `grpc.ServerCredentials` (`models.serving.access.tls.grpc_credentials`), None = not encrypted.

    On leaving: stops accepting, lets calls finish for up to `drain_seconds`, then cancels them. Raises OSError when it cannot
    listen, and ImportError, saying what to install.
    """
    await asyncio.to_thread(_import)
    listener = _Listener(plane, host, port, credentials)
    await listener.start()
    keeping = asyncio.create_task(listener.keep())
    try:
        scheme = "grpc" if credentials is None else "grpcs"
        yield GrpcServer(f"{scheme}://{_authority(host, listener.port)}", listener.port)
    finally:
        keeping.cancel()
        await asyncio.wait((keeping,))
        await listener.server.stop(drain_seconds)


class _Listener:
    """A server of grpc's, and the next one when it ends: a call whose path is not text ends the whole of it (grpcio 1.85)."""

    def __init__(self, plane: DataPlane, host: str, port: int, credentials: Callable[[], Any] | None) -> None:
        self._plane = plane
        self._host = host
        self._credentials = credentials
        self.port = port
        self.server: Any = None

    async def start(self) -> None:
        """Raises OSError."""
        server, self.port = _open(self._plane, self._host, self.port, self._credentials)
        await server.start()
        self.server = server

    async def keep(self) -> None:
        delay = RESTART_SECONDS
        while True:
            # Not awaited here: a cancellation would go on into the server, which then could not be stopped.
            ending = asyncio.ensure_future(self.server.wait_for_termination())
            await asyncio.wait((ending,))
            log.error("the gRPC server has ended by itself and is started anew", exc_info=ending.exception())
            while True:
                try:
                    await self.server.stop(0)
                    await self.start()
                    break
                except OSError as error:
                    log.error("gRPC is not answered: %s", error)  # noqa: TRY400 - it says all
                    await asyncio.sleep(delay * (0.5 + random.random()))  # noqa: S311 - jitter
                    delay = min(2 * delay, MAX_RESTART_SECONDS)
            delay = RESTART_SECONDS


def _import() -> None:
    try:
        import_module("models.serving.grpc.stream")
    except ImportError as error:
        raise ImportError(f"gRPC needs grpcio and protobuf: pip install 'tierline[grpc]' ({error})") from error


def _open(plane: DataPlane, host: str, port: int, credentials: Callable[[], Any] | None) -> tuple[Any, int]:
    """A server that listens, and its port."""
    import grpc.aio  # type: ignore[import-untyped]

    from models.serving.grpc.servicer import SERVICE, Servicer
    from models.serving.grpc.stream import StreamServicer

    servicer = Servicer(plane, encrypted=credentials is not None)
    methods = {name: grpc.stream_unary_rpc_method_handler(act) for name, act in servicer.handlers().items()}
    methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(StreamServicer(servicer).infer)
    server = grpc.aio.server(
        handlers=(grpc.method_handlers_generic_handler(SERVICE, methods),),
        options=_options(),
        maximum_concurrent_rpcs=MAX_CALLS_HELD,
    )
    address = _authority(host, port)
    try:
        if credentials is None:
            return server, server.add_insecure_port(address)
        return server, server.add_secure_port(address, credentials())
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host} port {port} for gRPC: {error}") from error


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_ANSWER_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PING_SECONDS * 1000),
        # Two servers on one port would take turns, and neither would be told.
        ("grpc.so_reuseport", 0),
    ]
