"""`tierline edge`: run an edge node from its configuration."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from edge_node.config import EdgeConfig, load_edge_config
from edge_node.node import EdgeNode, edge_node
from models.errors import TierlineError
from models.serving.process import announce, configure_logging, port_number, run_until_stopped
from sync.clock import SystemClock
from sync.errors import SyncError
from sync.upgrade import Upgrade, upgrade_from


def edge(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("join", "leave"):
        from sync.enrol_cli import identity

        return identity("edge", argv)
    parser = argparse.ArgumentParser(
        prog="tierline edge",
        description="Run an edge node.",
        epilog="tierline edge join URL --token TOKEN: enrol this machine; tierline edge leave CONFIG: take it out of service.",
    )
    parser.add_argument("config", type=Path, help="TOML file: [node], [listen], [up]")
    parser.add_argument("--http-port", type=port_number, help="overrides listen.port; 0 = chosen by the system")
    parser.add_argument("--check", action="store_true", help="read the configuration, load the code, start nothing")
    options = parser.parse_args(argv)
    try:
        config = load_edge_config(options.config)
        if options.check:
            print(f"{options.config}: an edge node's configuration, for {config.node.id}")
            return 0
        configure_logging(config.node.id)
        probe = ("edge", str(options.config.resolve()), "--check")
        upgrade = upgrade_from(os.environ, probe, SystemClock())
        return run_until_stopped(lambda: _announced(config, options.http_port, upgrade))
    except (SyncError, TierlineError, OSError, ImportError, ValueError) as error:
        print(f"tierline edge: {error}", file=sys.stderr)
        return 2


@asynccontextmanager
async def _announced(config: EdgeConfig, port: int | None, upgrade: Upgrade) -> AsyncIterator[EdgeNode]:
    from msgspec.structs import replace

    if port is not None:
        config = replace(config, listen=replace(config.listen, port=port))
    async with edge_node(config, upgrade) as node:
        announce(config.node.data / "edge.json", url=node.server.url, id=config.node.id, addresses=dict(node.addresses))
        print(f"edge node {config.node.id} answers on {', '.join(node.addresses.values())}", flush=True)
        yield node
