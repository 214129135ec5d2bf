"""`tierline bundle export` and `tierline bundle import`: updates where no network goes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cloud_hub.client import HubClient
from cloud_hub.command import DEFAULT_HUB, read_token, reporting
from models.errors import InvalidRequest

CHUNK = 256 * 1024


def bundle(argv: Sequence[str]) -> int:
    if argv and argv[0] == "import":
        from sync.bundle_cli import import_bundle

        return import_bundle(argv[1:])
    parser = argparse.ArgumentParser(
        prog="tierline bundle",
        description="Carry updates to nodes without a network: export writes one file, import takes it in on the node.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write what nodes or packages need into one file")
    where = export.add_mutually_exclusive_group()
    where.add_argument("--hub", metavar="URL", default=os.environ.get("TIERLINE_HUB", DEFAULT_HUB))
    where.add_argument("--data", type=Path, help="the hub's data folder, instead of asking a running hub")
    export.add_argument("--node", action="append", default=[], metavar="ID", help="its documents and their files")
    export.add_argument("--packages", nargs="+", default=[], metavar="NAME/VERSION", help="their files")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    export.add_argument("--token-file", type=Path, default=os.environ.get("TIERLINE_TOKEN_FILE"), help="the admin's")
    export.add_argument("--ca", type=Path, help="PEM of whom an https hub is trusted by")
    commands.add_parser("import", help="take a bundle in: FILE --config node.toml", add_help=False)
    options = parser.parse_args(argv)
    if not options.node and not options.packages:
        parser.error("say --node or --packages")
    return reporting("bundle export", lambda: _export(options))


def _export(options: argparse.Namespace) -> int:
    """Raises InvalidRequest, HubError, OSError."""
    pieces = _of_folder(options) if options.data is not None else _of_hub(options)
    staged = options.output.with_name(f".{options.output.name}.new")
    try:
        with staged.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        size, expires = staged.stat().st_size, _expiry(staged)
        staged.replace(options.output)
    finally:
        staged.unlink(missing_ok=True)
    until = datetime.fromtimestamp(expires, UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"{options.output}: {size} bytes; to be taken in before {until}")
    return 0


def _of_hub(options: argparse.Namespace) -> Iterator[bytes]:
    if options.token_file is None:
        raise InvalidRequest("--token-file FILE, or TIERLINE_TOKEN_FILE in the environment, is needed to ask a hub")
    client = HubClient(options.hub, read_token(Path(options.token_file)), options.ca)
    try:
        query = [("node", node) for node in options.node] + [("package", package) for package in options.packages]
        yield from client.download("/api/v1/bundle", query)
    finally:
        client.close()


def _of_folder(options: argparse.Namespace) -> Iterator[bytes]:
    from cloud_hub.bundles import contents
    from cloud_hub.keys import metadata_folder
    from cloud_hub.storage import Storage
    from sync.bundle import END, heading, padding, small_members
    from sync.clock import SystemClock

    database = options.data / "hub.sqlite"
    if not database.is_file():
        raise InvalidRequest(f"{database} does not exist: not a hub's data folder")
    folder = metadata_folder(options.data)

    def read(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.parent == folder and path.is_file() else None

    storage = Storage(database)
    try:
        with storage.read() as records:
            now = SystemClock().wall()
            found = contents(records, read, now, nodes=options.node, packages=options.packages)
    finally:
        storage.close()
    yield from small_members(found.index, found.metadata, found.documents)
    for digest, size in found.index.files.items():
        name = digest.removeprefix("sha256:")
        yield heading(f"blobs/{name}", size)
        with (options.data / "blobs" / "sha256" / name).open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
        yield padding(size)
    yield END


def _expiry(path: Path) -> float:
    """Of the metadata inside. Raises InvalidRequest when the hub's answer was cut off."""
    import msgspec

    from sync.bundle import END, Index

    with path.open("rb") as file:
        head = file.read(512)
        size = int(head[124:136].rstrip(b"\0 ") or b"0", 8)
        index = msgspec.json.decode(file.read(size), type=Index)
        file.seek(-len(END), os.SEEK_END)
        if file.read() != END:
            raise InvalidRequest("the hub's answer was cut off")
    return index.expires
