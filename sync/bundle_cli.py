"""`tierline bundle import`: take a bundle in on the machine of a node, which may run or not."""

from __future__ import annotations

import argparse
import fcntl
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from sync.bundle_import import FOLDER, Taken, take_in
from sync.bundle_watch import Outcome
from sync.clock import SystemClock
from sync.errors import SyncError
from sync.identity import Membership, load_config

POLL_SECONDS = 0.2
WAIT_SECONDS = 120.0


class _Config(msgspec.Struct, frozen=True):
    """What every tier's configuration has."""

    node: Membership


def import_bundle(argv: Sequence[str]) -> int:
    """Returns 0 = in force, or waiting for the node to start; 1 = refused, 2 = it cannot be read or is no bundle for this node,
    3 = still under way."""
    parser = argparse.ArgumentParser(prog="tierline bundle import", description="Take a bundle in on a node's machine.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--config", type=Path, required=True, help="the node's TOML file")
    parser.add_argument("--wait", type=float, default=WAIT_SECONDS, help="seconds to wait for a running node")
    options = parser.parse_args(argv)
    try:
        node = load_config(options.config, _Config).node
        taken = take_in(options.file, node, SystemClock())
    except SyncError as error:
        print(f"tierline bundle: refused: {error.code}: {error}", file=sys.stderr)
        return 2
    print(_told(taken))
    if not _runs(node.data):
        print("the node is not running: the bundle is taken up when it starts")
        return 0
    return _await(node.data / FOLDER / f"{taken.name}.json", options.wait)


def _told(taken: Taken) -> str:
    documents = [
        f"{kind} revision {revision}{' (known already)' if kind in taken.known else ''}"
        for kind, revision in taken.documents.items()
    ]
    until = datetime.fromtimestamp(taken.index.expires, UTC).strftime("%Y-%m-%d %H:%M UTC")
    what = ", ".join(documents) or "files only"
    return f"bundle {taken.name}: verified: {what}; {len(taken.index.files)} files; good until {until}"


def _runs(data: Path) -> bool:
    try:
        with (data / "lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _await(path: Path, seconds: float) -> int:
    end = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() > end:
            print(f"not done after {seconds:g} s; the node goes on: see 'tierline updates'")
            return 3
        time.sleep(POLL_SECONDS)
    outcome = msgspec.json.decode(path.read_bytes(), type=Outcome)
    for kind, state in outcome.states.items():
        print(f"{kind}: {state} {outcome.errors.get(kind, '')}".rstrip())
    if outcome.error:
        print(f"tierline bundle: {outcome.error}", file=sys.stderr)
    return 1 if outcome.error or any(state in ("refused", "rolled_back") for state in outcome.states.values()) else 0
