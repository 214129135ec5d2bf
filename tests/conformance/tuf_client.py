#!/usr/bin/env python3
"""The update client as a command, in the three verbs of the upstream project tuf-conformance (its CLIENT-CLI document).

    tuf_client.py --metadata-dir DIR init ROOT
    tuf_client.py --metadata-dir DIR --metadata-url URL refresh
    tuf_client.py --metadata-dir DIR --metadata-url URL --target-name NAME... --target-base-url URL --target-dir DIR download

Exit code 0 when it succeeded fully, 1 otherwise. What runs is `sync.tuf_client`, with floors in a `sync.state.StateStore` and
transfers by `sync.download`, as on a node; only the child process is left out. The pinned root lies beside the metadata.

    pytest tuf_conformance --entrypoint /path/to/tests/conformance/tuf_client.py        in a checkout of the upstream project
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sync.download import Download, Limits
from sync.durable import write_whole
from sync.errors import SyncError
from sync.state import StateStore
from sync.tuf_client import Opened, opened
from sync.tuf_messages import Ask

LIMITS = Limits(connect_seconds=5, read_seconds=10, budget_seconds=20)
PINNED = "pinned"


def main() -> int:
    options = arguments().parse_args()
    folder = Path(options.metadata_dir)
    if options.verb == "init":
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PINNED, Path(options.trusted_root).read_bytes())
        write_whole(folder / "root.json", Path(options.trusted_root).read_bytes())
        return 0
    state = StateStore(folder / "floors.db")
    try:
        ask = Ask(
            root=(folder / PINNED).read_bytes(),
            folder=str(folder),
            now=max(time.time(), state.time_floor()),
            floors=state.tuf_floors(),
            kept=state.tuf_kept(),
            names=(),
        )
        with opened(ask, from_url(options.metadata_url)) as client:
            try:
                client.refresh()
                for name in options.target_name or ():
                    bring(client, name, options.target_base_url, Path(options.target_dir))
            finally:
                told = client.told()
                state.raise_tuf(told.marks, told.kept, 0.0)
    except (SyncError, OSError) as error:
        print(f"{getattr(error, 'code', 'error')}: {error}", file=sys.stderr)
        return 1
    finally:
        state.close()
    return 0


def bring(client: Opened, name: str, base: str, into: Path) -> None:
    """Raises a SyncError when it is not listed, or not to be had as it was signed for."""
    target = client.target(name)
    path = into / quote(name, "")
    if path.exists() and client.matches(target, path.read_bytes()):
        return
    where = client.location(target)
    data = from_url(base)(where, target.length)
    client.check(target, data)
    write_whole(path, data)


def from_url(base: str) -> Callable[[str, int], bytes]:
    def get(path: str, limit: int) -> bytes:
        request = Download(f"{base.rstrip('/')}/{path}", None, LIMITS)
        late = Timer(LIMITS.seconds(0), request.stop, ("too slow",))
        late.daemon = True
        late.start()
        try:
            return request.read(limit)
        finally:
            late.cancel()

    return get


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metadata-dir", required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append")
    parser.add_argument("--target-dir")
    parser.add_argument("--target-base-url")
    parser.add_argument("-v", "--verbose", action="count", default=0)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("init", help="start from a trusted root").add_argument("trusted_root")
    verbs.add_parser("refresh", help="bring the metadata up to date")
    verbs.add_parser("download", help="bring targets")
    return parser


if __name__ == "__main__":
    sys.exit(main())
