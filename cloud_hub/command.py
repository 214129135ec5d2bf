"""What the commands that speak to a running hub have in common: where it is, the token, what goes wrong, tables.

Exit codes: 0 done, 1 refused by the hub or out of reach, 2 wrong usage or input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from cloud_hub.client import HubClient, HubError
from models.errors import InvalidRequest, TierlineError
from sync.errors import SyncError

DEFAULT_HUB = "http://127.0.0.1:8080"


def hub_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Of a command that speaks to a hub: where it is, and with what token."""
    parser = argparse.ArgumentParser(prog=f"tierline {command}", description=description)
    parser.add_argument("--hub", default=os.environ.get("TIERLINE_HUB", DEFAULT_HUB), metavar="URL")
    parser.add_argument(
        "--token-file",
        type=Path,
        default=os.environ.get("TIERLINE_TOKEN_FILE"),
        help="file holding the admin token; or set TIERLINE_TOKEN_FILE",
    )
    parser.add_argument(
        "--hub-ca",
        type=Path,
        default=os.environ.get("TIERLINE_HUB_CA"),
        metavar="FILE",
        help="whom an https hub is trusted by: its tls/ca.pem; or set TIERLINE_HUB_CA",
    )
    return parser


def speak(command: str, options: argparse.Namespace, run: Callable[[HubClient], None]) -> int:
    """Run `run` with a client of the hub that `hub_parser` was told of. Returns the exit code."""
    if options.token_file is None:
        print(f"tierline {command}: say --token-file or set TIERLINE_TOKEN_FILE", file=sys.stderr)
        return 2

    def connected() -> int:
        with closing(HubClient(options.hub, read_token(Path(options.token_file)), options.hub_ca)) as client:
            run(client)
        return 0

    return reporting(command, connected)


def read_token(path: Path) -> str:
    """Raises InvalidRequest naming the file."""
    try:
        token = path.read_bytes().strip().decode("ascii")
    except OSError as error:
        raise InvalidRequest(f"--token-file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isprintable() or " " in token:
        raise InvalidRequest(f"--token-file {path}: holds no token")
    return token


def reporting(command: str, run: Callable[[], int]) -> int:
    """One line on standard error instead of a traceback for everything that is not our fault."""
    try:
        return run()
    except HubError as error:
        print(f"tierline {command}: {error}", file=sys.stderr)
        return 1
    except (TierlineError, SyncError, OSError) as error:
        print(f"tierline {command}: {error}", file=sys.stderr)
        return 2


def pair(text: str) -> tuple[str, str]:
    """KEY=VALUE of a command line. Raises argparse.ArgumentTypeError."""
    key, equals, value = text.partition("=")
    if not key or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """In columns as wide as they need; nothing without rows."""
    lines = [heads, *rows]
    if len(lines) == 1:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def pairs_text(values: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(values.items()))
