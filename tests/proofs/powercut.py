"""Power cuts: `python tests/proofs/powercut.py` records the real file-system calls of a node's updater and outbox (with
`strace`), works out what a power cut may leave at every step (`crash_states.py`), and starts the real code on each such disk.

What must hold for every state. Updater: what had been reported as applied, or something newer, is in force after the start,
from files whose bytes are right, without any network; before the first report nothing or something good may be. Outbox:
every event whose `put` returned and that the hub had not taken is there once, and the ledger balances.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from proofs.crash_states import SYSCALLS, Disk, Operation, State, parse, states, write_state
from proofs.powercut_child import KIND, SCOPE, Node

from sync.clock import SystemClock
from sync.messages import Document
from sync.outbox import Outbox
from sync.trust import Keyring, SigningKey, digest_of, encode_keyring, sign, unseal

CHILD = Path(__file__).with_name("powercut_child.py")
RECORD_SECONDS = 120
VERSIONS = 3
EVENTS = 24
SIGNER = SigningKey.from_bytes(b"\1" * 32)

Check = Callable[[State, Path], Coroutine[None, None, str]]
"""Starts the real code on a state's files; what is wrong, or nothing."""


def record(folder: Path, *arguments: str) -> tuple[list[Operation], Disk]:
    """Run the child under strace; what it did to the files in `folder`, which are there `before`."""
    trace = folder.parent / "trace"
    before = [path for path in folder.rglob("*") if path.is_file()]
    command = ["strace", "-f", "-y", "-xx", "-s", "4000000", "-o", str(trace), "-e", f"trace={SYSCALLS}"]
    run = subprocess.run(
        [*command, sys.executable, str(CHILD), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=RECORD_SECONDS,
    )
    if run.returncode:
        raise RuntimeError(f"the recorded process failed\n{run.stderr[-2000:]}")
    with trace.open() as lines:
        operations, disk = parse(lines, folder, before)
    trace.unlink()
    return operations, disk


@contextmanager
def source(folder: Path) -> Iterator[str]:
    """Serves `folder`; yields its URL."""

    class Quiet(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *arguments: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


# --- the updater --------------------------------------------------------------------------------------------------


def record_updater(work: Path) -> tuple[list[Operation], Disk]:
    """Three versions, each of two files of its own and one that they share."""
    rng, served = random.Random(0), work / "served" / "blobs"
    served.mkdir(parents=True)
    folder = work / "node"
    for name in ("blobs", "staging", "tuf"):
        (folder / name).mkdir(parents=True)
    shared, files, envelopes = rng.randbytes(3_000), {}, []
    for version in range(1, VERSIONS + 1):
        contents = [shared, rng.randbytes(9_000), rng.randbytes(500)]
        digests = [digest_of(each) for each in contents]
        for digest, data in zip(digests, contents, strict=True):
            (served / digest).write_bytes(data)
            files[digest] = len(data)
        body = msgspec.Raw(msgspec.json.encode(digests))
        document = Document(KIND, SCOPE, version, time.time() - 60, tuple(digests), body)
        path = work / f"{version}.envelope"
        path.write_bytes(sign(document, [SIGNER]))
        envelopes.append(str(path))
    ring = encode_keyring(Keyring((SIGNER.key(KIND),)))
    (served / digest_of(ring)).write_bytes(ring)
    (work / "served" / "tuf").mkdir()
    (work / "served" / "tuf" / "timestamp.json").write_bytes(b"{}")
    (work / "keyring.json").write_bytes(ring)
    (work / "files.json").write_bytes(msgspec.json.encode(files))
    with source(work / "served") as url:
        return record(folder, "updater", str(folder), url, *envelopes)


async def check_updater(state: State, folder: Path) -> str:
    promised = max((int(mark.split()[1]) for mark in state.marks), default=0)
    node = Node(folder)
    try:
        await node.updater.start()
        active = node.state.slots(KIND, SCOPE).active
        stored = 0 if active is None else unseal(active).document.revision
        if node.updater.report.applied != stored:
            return f"revision {stored} is stored and does not start: {node.updater.report.error}"
        if stored < promised:
            return f"revision {promised} was reported as applied, {stored} is there"
        if node.state.floor(KIND, SCOPE).revision < stored:
            return "the floor is below what is in force"
    finally:
        await node.close()
    return ""


# --- the outbox ---------------------------------------------------------------------------------------------------


def record_outbox(work: Path) -> tuple[list[Operation], Disk]:
    folder = work / "node"
    folder.mkdir()
    return record(folder, "outbox", str(folder), str(EVENTS))


async def check_outbox(state: State, folder: Path) -> str:
    put = {mark.split()[1] for mark in state.marks if mark.startswith("put ")}
    taken = {mark.split()[1] for mark in state.marks if mark.startswith("taken ")}
    async with Outbox(folder / "outbox.db", clock=SystemClock()) as outbox:
        await outbox.put("app.proof", b"after the cut")
        waiting = (await outbox.fetch(10 * EVENTS)).events
        ledger = outbox.ledger()
    there = [event.id for event in waiting]
    missing = put - taken - set(there)
    if missing:
        return f"{len(missing)} events whose put had returned are gone"
    if len(set(there)) != len(there):
        return "an event is there twice"
    if ledger.imbalance:
        return f"the ledger does not balance: {ledger}"
    if ledger.set_aside:
        return "the file was taken for damaged"
    return ""


# --- all of it ----------------------------------------------------------------------------------------------------

PROOFS: dict[str, tuple[Callable[[Path], tuple[list[Operation], Disk]], Check]] = {
    "updater": (record_updater, check_updater),
    "outbox": (record_outbox, check_outbox),
}


def prove(name: str, work: Path, per_step: int, most: int) -> tuple[int, Counter[str]]:
    """(states tried, what was wrong with how many)."""
    recording, check = PROOFS[name]
    operations, disk = recording(work)
    kinds = Counter(type(operation).__name__.lower() for operation in operations)
    root, wrong = work / "node", Counter[str]()
    found = list(states(operations, disk, random.Random(1), per_step))
    if len(found) > most:
        found = random.Random(2).sample(found, most)
    for index, state in enumerate(found):
        folder = work / f"state-{index}"
        folder.mkdir()
        write_state(state, root, folder)
        try:
            problem = asyncio.run(check(state, folder))
        except Exception as error:  # noqa: BLE001 - whatever it is, this state is unusable
            problem = f"{type(error).__name__}: {error}"
        if problem:
            wrong[problem] += 1
        shutil.rmtree(folder, ignore_errors=True)  # the outbox's thread may still be closing its file
    print(f"{name}: {len(operations)} recorded operations {dict(kinds)}, {len(found)} distinct states")
    return len(found), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-step", type=int, default=6, help="choices after each operation (default %(default)s)")
    parser.add_argument("--most", type=int, default=1500, help="states tried of each (default %(default)s)")
    parser.add_argument("--only", choices=list(PROOFS))
    arguments = parser.parse_args()
    if shutil.which("strace") is None:
        print("this proof needs strace (Debian, Ubuntu: apt install strace)", file=sys.stderr)
        return 2
    logging.disable(logging.CRITICAL)
    failed = 0
    for name in [arguments.only] if arguments.only else list(PROOFS):
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            count, wrong = prove(name, Path(folder), arguments.per_step, arguments.most)
            failed += wrong.total()
            print(f"  wrong: {wrong.total()} of {count} ({time.monotonic() - began:.0f} s)")
            for problem, number in wrong.most_common(10):
                print(f"  {number:5d}  {problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
