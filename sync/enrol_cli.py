"""`tierline edge|device|worker join URL` and `... leave CONFIG`: the same for every kind of node."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from getpass import getpass
from pathlib import Path
from typing import Any

import msgspec

from sync.enrol import join_hub, leave_hub
from sync.errors import InvalidConfig, SyncError
from sync.identity import Membership, load_config

TIERS = {"edge": "edge", "device": "device", "worker": "cloud"}
MAX_TOKEN_BYTES = 1024
TOKEN_VARIABLE, PROXY_VARIABLE = "TIERLINE_JOIN_TOKEN", "TIERLINE_PROXY"
MAX_SKEW_SECONDS = 30.0
"""Beyond it the operator is told: at a minute the hub refuses what a node signs."""


class _Whole(msgspec.Struct, frozen=True):
    """Any node's configuration, of which only this table matters here."""

    node: Membership


def identity(command: str, argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 refused or out of reach, 2 wrong usage or input."""
    options = _parser(command, argv[0]).parse_args(argv[1:])
    try:
        return _leave(options) if argv[0] == "leave" else _join(command, options)
    except InvalidConfig as error:
        code, text = 2, str(error)
    except (SyncError, OSError) as error:
        code, text = 1, str(error)
    print(f"tierline {command} {argv[0]}: {text}", file=sys.stderr)
    return code


def _parser(command: str, action: str) -> argparse.ArgumentParser:
    if action == "leave":
        parser = argparse.ArgumentParser(
            prog=f"tierline {command} leave", description="Ask the hub to forget this node, then delete its keys."
        )
        parser.add_argument("config", type=Path, help="the node.toml it was started with")
        return parser
    parser = argparse.ArgumentParser(
        prog=f"tierline {command} join", description="Enrol this machine with a hub and write what it is started with."
    )
    parser.add_argument("url", help="https://host:port of the hub")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token of 'tierline hub enrol'")
    parser.add_argument(
        "--token",
        help="the token itself, which every user of this machine can then see in the process list. Without either it is "
        f"taken from {TOKEN_VARIABLE} or read from standard input ('-' too)",
    )
    parser.add_argument("--folder", type=Path, default=Path(f"tierline-{command}"), help="a new folder for the node")
    parser.add_argument("--hardware", metavar="SERIAL", help="this machine's serial number, if the token asks for it")
    parser.add_argument(
        "--proxy",
        metavar="URL",
        help=f"http://[user:password@]host:port, for the hub and the broker; with a password better as {PROXY_VARIABLE}",
    )
    if command == "device":
        parser.add_argument("--edge", metavar="URL", help="the edge node to escalate to")
    return parser


def _join(command: str, options: Any) -> int:
    token = _token(options)
    if options.proxy and "@" in options.proxy:
        _warn(f"the process list shows the proxy's password: set {PROXY_VARIABLE} instead of --proxy")
    top = {"edge": options.edge} if getattr(options, "edge", None) else {}
    joined = join_hub(
        options.url,
        token,
        options.folder,
        tier=TIERS[command],
        hardware=options.hardware,
        proxy=options.proxy or os.environ.get(PROXY_VARIABLE),
        top=top,
    )
    print(f"{joined.node} is enrolled; its key is in {options.folder / 'identity'} and stays there")
    if abs(joined.ahead) > MAX_SKEW_SECONDS:
        where = "ahead of" if joined.ahead > 0 else "behind"
        _warn(f"this machine is {abs(joined.ahead):.0f} s {where} the hub's clock: set it, or no file can be fetched")
    print(f"next: tierline {command} {joined.config}")
    return 0


def _token(options: Any) -> str:
    if options.token_file is not None:
        with options.token_file.open(encoding="ascii", errors="replace") as file:
            return str(file.read(MAX_TOKEN_BYTES))
    if options.token not in (None, "-"):
        _warn("every user of this machine can see the token in the process list: use --token-file or standard input")
        return str(options.token)
    if options.token is None and os.environ.get(TOKEN_VARIABLE):
        return os.environ[TOKEN_VARIABLE]
    return getpass("token: ") if sys.stdin.isatty() else sys.stdin.read(MAX_TOKEN_BYTES)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _leave(options: Any) -> int:
    print(leave_hub(load_config(options.config, _Whole).node))
    return 0
