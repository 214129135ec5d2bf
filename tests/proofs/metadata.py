"""What an update costs in bytes of metadata, with HTTP's own counted: a poll without news, and one model of a thousand changed.

    python tests/proofs/metadata.py [--models 1000] [--json FILE]

A real repository behind a real HTTP server, the real client; each model has four files. Fails above the budget.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cloud_hub.keys import open_keys
from cloud_hub.tuf_repository import Repository
from sync.clock import SystemClock
from sync.download import Download, Limits
from sync.testing import FakeClock
from sync.trust import digest_of, encode_keyring
from sync.tuf_client import answer
from sync.tuf_messages import Answer, Ask, Mark

FILES_PER_MODEL = 4
POLL_BUDGET, CHANGE_BUDGET = 3_000, 25_000


class Counted(BaseHTTPRequestHandler):
    """Serves the repository; `sent` counts every byte of the answers, `received` those of the requests."""

    protocol_version = "HTTP/1.1"
    repository: Repository
    sent = received = requests = 0

    def do_GET(self) -> None:
        cls = type(self)
        data = self.repository.read(self.path.removeprefix("/tuf/"))
        head = "HTTP/1.1 200 OK\r\n" if data is not None else "HTTP/1.1 404 Not Found\r\n"
        body = data if data is not None else b'{"error":"no metadata"}'
        # What the hub's server sends with it.
        head += f"content-type: application/json\r\ncache-control: no-cache\r\ncontent-length: {len(body)}\r\n"
        head += "date: Thu, 01 Jan 2026 00:00:00 GMT\r\nconnection: close\r\n\r\n"
        whole = head.encode() + body
        cls.sent += len(whole)
        cls.received += len(self.raw_requestline) + len(bytes(self.headers)) + 2
        cls.requests += 1
        self.wfile.write(whole)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Silent."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.models)
    for name, value in figures.items():
        print(f"{name:<40} {value:>12,.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures))
    good = figures["poll without news, bytes"] <= POLL_BUDGET and figures["one model changed, bytes"] <= CHANGE_BUDGET
    print("within budget" if good else "OVER BUDGET")
    return 0 if good else 1


def measure(folder: Path, models: int) -> dict[str, float]:
    clock = FakeClock(SystemClock().wall())
    keys = open_keys(folder / "hub")
    ring = encode_keyring(keys.keyring())
    repository = Repository(folder / "hub", keys, clock)
    listing = (digest_of(ring), len(ring))
    files = {digest_of(b"%d" % number): 100_000 + number for number in range(models * FILES_PER_MODEL)}
    began = time.perf_counter()
    repository.publish(files, listing)
    first_publish = time.perf_counter() - began
    # A repository with a past: its versions have grown digits.
    for _ in range(12):
        clock.advance(60)
        repository.publish(dict(list(files.items())[:-1]), listing)
        repository.publish(files, listing)
    handler = type("Handler", (Counted,), {"repository": repository})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    get = over_http(f"http://127.0.0.1:{server.server_port}/tuf/")
    node = Node(folder / "node", repository.root, clock, get)

    def counted(names: tuple[str, ...]) -> tuple[float, float, float]:
        handler.sent = handler.received = handler.requests = 0
        started = time.perf_counter()
        node.refresh(names)
        return handler.sent + handler.received, handler.requests, 1_000 * (time.perf_counter() - started)

    known = tuple(f"sha256/{digest.removeprefix('sha256:')}" for digest in list(files)[:FILES_PER_MODEL])
    first = counted(known)
    poll = counted(known)
    changed = {digest_of(b"new %d" % number): 100_000 for number in range(FILES_PER_MODEL)}
    clock.advance(60)
    began = time.perf_counter()
    repository.publish({**files, **changed}, listing)
    publish = time.perf_counter() - began
    change = counted(tuple(f"sha256/{digest.removeprefix('sha256:')}" for digest in changed))
    server.shutdown()
    server.server_close()
    return {
        "models": models,
        "files": len(files),
        "first refresh, bytes": first[0],
        "poll without news, bytes": poll[0],
        "poll without news, requests": poll[1],
        "poll without news, ms": poll[2],
        "one model changed, bytes": change[0],
        "one model changed, requests": change[1],
        "one model changed, ms": change[2],
        "publish all, ms": 1_000 * first_publish,
        "publish one model, ms": 1_000 * publish,
    }


class Node:
    def __init__(self, folder: Path, root: bytes, clock: FakeClock, get: Callable[[str, int], bytes]) -> None:
        self.folder, self.root, self.clock, self.get = folder, root, clock, get
        self.floors: Mapping[str, Mark] = {}
        self.kept: Mapping[str, bytes] = {}

    def refresh(self, names: tuple[str, ...]) -> Answer:
        told = answer(
            Ask(
                root=self.root,
                folder=str(self.folder),
                now=self.clock.wall(),
                floors=dict(self.floors),
                kept=dict(self.kept),
                names=("keys/documents.json", *names),
            ),
            self.get,
        )
        if told.code or len(told.files) != len(names) + 1:
            raise SystemExit(f"refresh failed: {told.code} {told.text}")
        self.floors, self.kept = told.marks, told.kept
        return told


def over_http(base: str) -> Callable[[str, int], bytes]:
    def get(path: str, limit: int) -> bytes:
        return Download(base + path, "t" * 47, Limits()).read(limit)

    return get


if __name__ == "__main__":
    sys.exit(main())
