"""`tierline ledger`: whether every event has a known end, on a node's disk; what the hub received of a node."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cloud_hub.client import HubClient
from cloud_hub.command import print_table, read_token, reporting
from models.errors import InvalidRequest
from sync.ledger import Ledger, Stream, as_json
from sync.outbox_store import read_ledger

OUTBOX_FILE = "outbox.db"
HEADS = ("STREAM", "ENQUEUED", "DELIVERED", "EXPIRED", "DROPPED", "PENDING")


def ledger(argv: Sequence[str]) -> int:
    """Returns 0 = balanced, 1 = not, or the hub refused; 2 = wrong usage or no such file."""
    parser = argparse.ArgumentParser(
        prog="tierline ledger",
        description="A node's events: enqueued = delivered + expired + dropped + pending. Or the hub's half: what it received.",
    )
    parser.add_argument("path", nargs="?", type=Path, help="the node's data folder, or its outbox.db")
    parser.add_argument("--hub", metavar="URL", help="ask a hub instead")
    parser.add_argument("--node", metavar="ID", help="with --hub: this node only; default: every node")
    parser.add_argument(
        "--token-file", type=Path, default=os.environ.get("TIERLINE_TOKEN_FILE"), help="the admin token's"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    if (options.path is None) == (options.hub is None):
        print("tierline ledger: say a node's folder or --hub URL, one of the two", file=sys.stderr)
        return 2
    if options.hub is not None:
        return reporting("ledger", lambda: _of_hub(options))
    return reporting("ledger", lambda: _of_node(options.path, options.json))


def _of_node(path: Path, as_program: bool) -> int:
    file = path / OUTBOX_FILE if path.is_dir() else path
    if not file.is_file():
        raise InvalidRequest(f"{file} does not exist: not a node's folder, or it never had an event")
    found = read_ledger(file)
    if as_program:
        print(json.dumps(as_json(found), indent=2))
    else:
        _print(found)
    return 1 if found.imbalance else 0


def _print(found: Ledger) -> None:
    rows = [_row(kind, stream) for kind, stream in found.streams.items()]
    print_table(HEADS, [*rows, _row("all", found.total())])
    for kind, stream in found.streams.items():
        if stream.dropped:
            reasons = ", ".join(f"{reason} {count}" for reason, count in stream.dropped.items())
            print(f"dropped of {kind}: {reasons}")
    if found.set_aside:
        print(f"damaged files put aside: {found.set_aside}; what they held is in no ledger")
    for kind, count in found.imbalance.items():
        print(f"NOT BALANCED: {kind}: {count} events without a known end")
    if not found.imbalance:
        print("BALANCED")


def _row(name: str, stream: Stream) -> tuple[str, ...]:
    dropped = sum(stream.dropped.values())
    return (name, *(str(n) for n in (stream.enqueued, stream.delivered, stream.expired, dropped, stream.pending)))


def _of_hub(options: argparse.Namespace) -> int:
    if options.token_file is None:
        raise InvalidRequest("say --token-file or set TIERLINE_TOKEN_FILE")
    with closing(HubClient(options.hub, read_token(Path(options.token_file)))) as client:
        nodes = [options.node] if options.node else [node["id"] for node in client.pages("/api/v1/nodes")]
        found = [client.get(f"/api/v1/nodes/{quote(node, safe='')}/ledger") for node in nodes]
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_table(
            ("NODE", "STREAM", "RECEIVED", "DUPLICATES", "DEAD LETTERS"),
            [row for one in found for row in _hub_rows(one)],
        )
    return 0


def _hub_rows(one: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (one["node"], kind or "(none)", str(c["received"]), str(c["duplicates"]), str(c["dead_letters"]))
        for kind, c in one["streams"].items()
    ]
