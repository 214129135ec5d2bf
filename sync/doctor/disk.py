"""What a node has on its disk: room, what it writes, its databases, its files."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path
from uuid import uuid4

from sync.doctor.check import Check, Finding, Skipped, amount, duration, fail, needed, ok, warn
from sync.doctor.kept import quick_check
from sync.doctor.subject import NodeSubject, holder
from sync.ledger import Ledger
from sync.outbox_store import read_ledger
from sync.schema import FOLDER_FORMAT, FORMAT_FILE

SLOW_FLUSH_SECONDS = 0.5
"""A worn memory card takes this long; every document and event costs one such flush."""
MIN_INODES = 1_000
SAMPLE_BYTES = 64 << 20
"""Of files that are hashed again, beginning with the smallest: half a second of an ordinary processor."""
MAX_PENDING = 10_000


def check_writable(subject: NodeSubject) -> Finding:
    return probe_folder(subject.data)


def probe_folder(folder: Path) -> Finding:
    """Whether a file can be written there and flushed."""
    if not folder.exists():
        raise Skipped("the data folder is not there yet: the node makes it at its first start")
    probe = folder / f".doctor-{uuid4().hex[:8]}"
    began = time.monotonic()
    try:
        with probe.open("xb") as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return fail(f"{folder} cannot be written: {error.strerror}")
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    took = time.monotonic() - began
    found = f"a file was written and flushed in {took * 1e3:.0f} ms"
    if took > SLOW_FLUSH_SECONDS:
        return warn(found, "the disk is slow or worn: look at its health (smartctl, dmesg), or put data on another one")
    return ok(found)


def check_room(subject: NodeSubject) -> Finding:
    folder = _existing(subject.data)
    free, quota = os.statvfs(folder), subject.quota
    left = free.f_bavail * free.f_frsize
    used = sum(_size(path) for name in ("blobs", "staging") for path in _files(subject.data / name))
    limit = "what the disk has" if quota.max_bytes is None else amount(quota.max_bytes)
    found = f"{amount(left)} free, of which {amount(quota.free_bytes)} stay free; files take {amount(used)} of {limit}"
    if left < quota.free_bytes:
        return fail(found)
    over = quota.max_bytes is not None and used > quota.max_bytes
    short = left < 2 * quota.free_bytes or left < 0.03 * free.f_blocks * free.f_frsize
    return warn(found) if over or short else ok(found)


def check_inodes(subject: NodeSubject) -> Finding:
    return probe_inodes(_existing(subject.data))


def probe_inodes(folder: Path) -> Finding:
    status = os.statvfs(folder)
    if not status.f_files:
        raise Skipped("this file system does not count its files")
    found = f"{status.f_favail} more files can be made"
    return fail(found) if status.f_favail < MIN_INODES else ok(found)


def check_lock(subject: NodeSubject) -> Finding:
    pid = holder(subject.data / "lock")
    if pid is None:
        return ok("nobody has the data folder: the node does not run")
    name = _command(pid)
    if subject.live is not None:
        return ok(f"this node has it ({name})")
    return ok(f"a running node has it: {name}")


def check_format(subject: NodeSubject) -> Finding:
    path = subject.data / FORMAT_FILE
    try:
        text = path.read_text()[:64].strip()
    except FileNotFoundError:
        raise Skipped("the folder has no format number yet") from None
    if not text.isdecimal():
        return fail(f"{path.name}: no format number", "restore the folder from a copy, or join the node again")
    if int(text) > FOLDER_FORMAT:
        return fail(f"the folder has format {text}, this release reads up to {FOLDER_FORMAT}")
    return ok(f"format {text}")


def check_state(subject: NodeSubject) -> Finding:
    path = subject.data / "state.db"
    if not path.exists():
        raise Skipped("this node has not been started yet")
    told = quick_check(path)
    if told != "ok":
        return fail(f"state.db is damaged: {told}")
    kept = subject.kept()
    kinds = ", ".join(sorted(kind for kind, slot in kept.documents if slot == "active")) or "none"
    return ok(f"whole; documents in force: {kinds}")


def check_outbox(subject: NodeSubject) -> Finding:
    path = _outbox(subject)
    told = quick_check(path)
    if told != "ok":
        return fail(f"outbox.db is damaged: {told}")
    return ok("whole")


def check_ledger(subject: NodeSubject) -> Finding:
    return judge_ledger(read_ledger(_outbox(subject)))


def judge_ledger(ledger: Ledger) -> Finding:
    total = ledger.total()
    dropped = sum(total.dropped.values())
    found = (
        f"{total.enqueued} events = {total.delivered} delivered + {total.expired} expired + {dropped} dropped"
        f" + {total.pending} pending"
    )
    if ledger.imbalance:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(ledger.imbalance.items()))
        return fail(f"{found}; without a known end: {kinds}")
    if total.pending > MAX_PENDING:
        return warn(found, "the hub is not reached, or cannot keep up: see the broker's checks")
    if ledger.set_aside:
        return warn(
            f"{found}; {ledger.set_aside} damaged files were put aside",
            "the disk lost data: look at its health; what those files held can no longer be counted",
        )
    return ok(found)


def check_present(subject: NodeSubject) -> Finding:
    wanted = _wanted(subject)
    missing = sorted(digest for digest in wanted if not subject.blob(digest).is_file())
    if missing:
        return fail(f"{len(missing)} of {len(wanted)} files are missing, the first is {missing[0][:19]}...")
    return ok(f"all {len(wanted)} files that the document in force needs are here")


def check_hashes(subject: NodeSubject) -> Finding:
    wanted = sorted((subject.blob(digest) for digest in _wanted(subject)), key=_size)
    there = [path for path in wanted if path.is_file()]
    left, hashed, bad = SAMPLE_BYTES, 0, []
    for path in there:
        left -= _size(path)
        if left < 0:
            break
        hashed += 1
        with path.open("rb") as file:
            if file_digest(file, "sha256").hexdigest() != path.name:
                bad.append(path.name)
    if bad:
        return fail(f"{len(bad)} of {hashed} files hashed are damaged, the first is {bad[0][:12]}...")
    skipped = f"; {len(there) - hashed} larger ones were not hashed" if hashed < len(there) else ""
    return ok(f"{hashed} files hashed, each is what its name says{skipped}")


DISK: tuple[Check[NodeSubject], ...] = (
    Check(
        "disk.writable",
        "whether the data folder takes a file and flushes it",
        "make room, remount it writable, or give it to the user the node runs as (chown)",
        check_writable,
    ),
    Check(
        "disk.room",
        "free space, and what the store may take",
        "make room, or set [store] max_bytes and cache_bytes: downloads stop here, what runs goes on",
        check_room,
    ),
    Check("disk.inodes", "how many files can still be made", "delete small files (logs, caches) here", check_inodes),
    Check(
        "disk.lock",
        "who has the data folder",
        "one folder belongs to one node: stop the other process, or give this one a folder of its own",
        check_lock,
    ),
    Check(
        "disk.format",
        "whether this release can read the folder",
        "run the later release again, or restore a copy from before it",
        check_format,
    ),
    Check(
        "disk.state",
        "the state file: floors and documents",
        "stop the node, keep a copy of state.db, remove it and start: the hub sends all again. Its protection against old "
        "documents begins anew, so look for what damaged the disk first",
        check_state,
        10.0,
    ),
    Check(
        "disk.outbox",
        "the file of events that wait",
        "nothing has to be done: at its next start the node puts it aside, keeps what can be read and counts it",
        check_outbox,
        10.0,
    ),
    Check(
        "disk.ledger",
        "whether every event has a known end",
        "this must not happen: send a support bundle with outbox.db's ledger",
        check_ledger,
    ),
    Check(
        "store.present",
        "every file that the documents in force name",
        "restart the node: it fetches what is missing; if it stays missing see files.answer",
        check_present,
    ),
    Check(
        "store.hashes",
        "a sample of those files, hashed again",
        "delete the damaged file below blobs/ and restart the node; look at the disk's health",
        check_hashes,
        20.0,
    ),
)


def _wanted(subject: NodeSubject) -> Collection[str]:
    body = subject.active("desired")
    plan = needed(subject.plan, "what the document needs here is not known")
    if body is None:
        raise Skipped("no desired document is in force")
    return frozenset(plan(body))


def _outbox(subject: NodeSubject) -> Path:
    path = subject.data / "outbox.db"
    if not path.exists():
        raise Skipped("this node has not been started yet")
    return path


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    return next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))


def _command(pid: int) -> str:
    """A process by its short name: its arguments may hold anything."""
    if pid == 0:
        return "a process that is not to be seen from here"
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        began = time.time() - Path(f"/proc/{pid}").stat().st_mtime
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({name}), since {duration(began)}"
