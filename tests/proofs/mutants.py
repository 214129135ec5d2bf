"""Damaged model files: `python tests/proofs/mutants.py` makes 10,000 of ONNX and LiteRT files and prints what became of them.

Seeded and bounded. Each passes two gates as it would in the field. **Delivery**: a mirror serves it under the digest of the
good file; nothing may enter the store. **Probe**: suppose its own digest had been approved; a bounded child loads it and runs
the golden inputs. This process stands for the node: it must live, and only what kept its promise may count as good. A file
that ends a child is contained; how many do is printed. Children are shared by many files, and begun again after each death.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TypeVar

from models.engines import EngineOptions, available_engines
from models.manifest import Blob, Manifest, Variant, decode_manifest
from models.serving.probe import try_in_turn
from models.serving.probe_child import ProbeLimits, ProbeRequest, Verdict
from models.zoo import digits
from sync.clock import SystemClock
from sync.errors import DigestMismatch, Unavailable
from sync.fetch import Fetcher, Source
from sync.store import BlobStore
from sync.trust import digest_of

T = TypeVar("T")

TOGETHER = 200
"""Files for one child."""
PATIENCE = 20.0
"""Seconds for one file, after which the child is ended."""
LIMITS = ProbeLimits(memory_bytes=2 << 30, cpu_seconds=10, wall_seconds=PATIENCE)


@dataclass(frozen=True)
class Seed:
    """A good file and what is promised of it."""

    name: str
    data: bytes
    variant: Variant
    manifest: Manifest
    golden: Path


def seeds() -> list[Seed]:
    """Every variant of the zoo whose engine is installed here."""
    found = []
    for tier in digits.PACKAGES:
        folder = digits.package_folder(tier)
        manifest = decode_manifest((folder / "manifest.json").read_bytes())
        by_digest = {digest_of(path.read_bytes()): path for path in folder.iterdir()}
        for variant in manifest.variants:
            if variant.engine in available_engines():
                path = by_digest[variant.blob.digest]
                name = f"{path.parent.name}/{path.name}"
                found.append(Seed(name, path.read_bytes(), variant, manifest, folder / "golden.npz"))
    return found


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Never the same bytes. Half get one small wound that keeps the length, and so often the structure; half one to four."""
    wounded = bytearray(data)
    kinds, count = (_IN_PLACE, 1) if rng.random() < 0.5 else (_WOUNDS, rng.randint(1, 4))
    while wounded == data:
        for _ in range(count):
            rng.choice(kinds)(wounded, rng)
    return bytes(wounded)


def _at(data: bytearray, rng: random.Random) -> int:
    """Anywhere, but more often in the first kilobyte, where structure lives."""
    return rng.randrange(min(len(data), 1024) if rng.random() < 0.3 else len(data)) if data else 0


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[_at(data, rng)] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, rng: random.Random) -> None:
    at = _at(data, rng)
    size = min(rng.choice((1, 2, 4, 8, 64)), len(data) - at)
    data[at : at + size] = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80", rng.randbytes(1))) * size


def _insert(data: bytearray, rng: random.Random) -> None:
    at = _at(data, rng)
    data[at:at] = rng.randbytes(rng.choice((1, 3, 9, 200)))


def _cut(data: bytearray, rng: random.Random) -> None:
    at = _at(data, rng)
    del data[at : at + rng.choice((1, 4, 50, 5000))]


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _repeat(data: bytearray, rng: random.Random) -> None:
    at, to = _at(data, rng), _at(data, rng)
    data[to:to] = data[at : at + rng.choice((2, 16, 256))]


_IN_PLACE = (_flip, _overwrite)
_WOUNDS = (*_IN_PLACE, _insert, _cut, _truncate, _repeat)


# --- the first gate: delivery -------------------------------------------------------------------------------------


class NoWait(SystemClock):
    """Retries at once: a thousand refusals must not take a thousand pauses."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


@contextmanager
def mirror(answers: dict[str, bytes]) -> Iterator[str]:
    """Serves `answers`, path -> bytes, whoever asks; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            body = answers[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            """The other side hung up on what it refused."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


async def deliver(mutants: Sequence[tuple[Seed, bytes]], folder: Path) -> Counter[str]:
    """Fetch each under the good file's digest. Counts refusals by kind, and `ACCEPTED`."""
    store, outcomes = BlobStore(folder / "store"), Counter[str]()
    answers: dict[str, bytes] = {}
    with mirror(answers) as url:
        fetcher = Fetcher([Source(url)], store, clock=NoWait())
        for seed, data in mutants:
            digest = seed.variant.blob.digest
            answers[f"/blobs/{digest}"] = data
            try:
                await fetcher.fetch(digest, seed.variant.blob.size)
                outcomes["ACCEPTED"] += 1
            except DigestMismatch:
                outcomes["refused: other bytes"] += 1
            except Unavailable:
                outcomes["refused: other length"] += 1
            outcomes["ACCEPTED"] += store.has(digest)
        fetcher.close()
    return outcomes


# --- the second gate: the probe ------------------------------------------------------------------------------------


async def try_all(mutants: Sequence[tuple[Seed, bytes]], folder: Path) -> tuple[Counter[str], Counter[str]]:
    """Verdicts by kind, and how the children ended that did not end well."""
    verdicts, deaths = Counter[str](), Counter[str]()
    for start in range(0, len(mutants), TOGETHER):
        waiting = [
            _request(*mutant, folder / f"{index}.model")
            for index, mutant in enumerate(mutants[start : start + TOGETHER])
        ]
        while waiting:
            answers, ending = await try_in_turn(waiting, PATIENCE)
            verdicts.update("good: outputs as promised" if each.ok else _kind(each) for each in answers)
            waiting = waiting[len(answers) :]
            if waiting:
                # The first without an answer is what ended the child.
                reason = ending.reason if ending else "the child fell silent"
                deaths[reason] += 1
                verdicts["refused: it ended the child"] += 1
                waiting = waiting[1:]
    return verdicts, deaths


def _request(seed: Seed, data: bytes, path: Path) -> ProbeRequest:
    path.write_bytes(data)
    variant = Variant(
        seed.variant.engine, seed.variant.precision, Blob(digest_of(data), len(data)), seed.variant.tolerance
    )
    return ProbeRequest(str(path), str(seed.golden), variant, seed.manifest, EngineOptions(), LIMITS)


def _kind(verdict: Verdict) -> str:
    if "golden" in verdict.reason or "differ" in verdict.reason:
        return "refused: other outputs than promised"
    if "memory" in verdict.reason or "alloc" in verdict.reason:
        return "refused: it wants too much memory"
    return "refused: it does not load or run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="damaged files (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng, sources = random.Random(arguments.seed), seeds()
    mutants = [
        (seed, mutate(seed.data, rng)) for _, seed in zip(range(arguments.count), _in_turn(sources), strict=False)
    ]
    print(f"{len(mutants)} damaged files of {', '.join(seed.name for seed in sources)} (seed {arguments.seed})")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        delivered, took = _timed(deliver(mutants, folder))
        _show(f"delivery by a forging mirror ({took:.0f} s)", delivered)
        (verdicts, deaths), took = _timed(try_all(mutants, folder))
        _show(f"probe, had they been approved ({took:.0f} s)", verdicts)
        _show("children ended by a file", deaths)
    wrong = delivered["ACCEPTED"] + abs(sum(verdicts.values()) - len(mutants))
    print(f"deaths of the node: 0; entered the store unverified: {delivered['ACCEPTED']}")
    return 1 if wrong else 0


def _in_turn(sources: Sequence[Seed]) -> Iterator[Seed]:
    while True:
        yield from sources


def _timed(work: Coroutine[object, object, T]) -> tuple[T, float]:
    began = time.monotonic()
    return asyncio.run(work), time.monotonic() - began


def _show(title: str, counts: Counter[str]) -> None:
    print(title)
    for what, count in counts.most_common():
        print(f"  {count:7d}  {what}")


if __name__ == "__main__":
    sys.exit(main())
