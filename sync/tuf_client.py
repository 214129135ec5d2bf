"""The update client: python-tuf's workflow, with what it leaves to its user. Blocking; the one importer of tuf on a node.

Added here: the pinned root is always the start; files are flushed before they take their place; floors that outlive the
cache; the time to judge expiry by is given, not read; one instance for each folder. Raises nothing: see `Answer.code`.
TUF specification 1.0.34, section 5.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuf.api import exceptions
from tuf.api.metadata import Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from sync.durable import write_whole
from sync.errors import (
    Absent,
    BadSignature,
    DigestMismatch,
    Expired,
    Malformed,
    NotListed,
    Replayed,
    StoreFailed,
    SyncError,
    Unavailable,
)
from sync.tuf_messages import Answer, Ask, Listed, Mark

ISSUED = "x-issued"
"""Field of our own in signed metadata: Unix seconds of its signing. TUF tells readers to leave unknown fields alone."""
MAX_ROOT_ROTATIONS = 256
"""New roots taken in one refresh: a node that slept through more takes the rest at the next one."""
MAX_ROOT_BYTES = 512_000
MAX_TIMESTAMP_BYTES = 16_384
MAX_SNAPSHOT_BYTES = 1_000_000
MAX_TARGETS_BYTES = 5_000_000
"""Most of one metadata file: ours have 2 kB, 0.5 kB, 10 kB and 3 kB."""
MAX_TARGET_BYTES = 4 << 30
"""Largest single file (4 GiB)."""
MAX_TEXT = 500
BASE = "tuf:/"

Get = Callable[[str, int], bytes]
"""(path below the repository, most bytes) -> the file. Raises `Absent`, or a SyncError."""

# What vouches for a role's version, all the way down: a stolen key of any of these could have raised it.
_VOUCHERS = {
    Root.type: (),
    Timestamp.type: (Timestamp.type,),
    Snapshot.type: (Timestamp.type, Snapshot.type),
    Targets.type: (Timestamp.type, Snapshot.type, Targets.type),
}
_KEPT = (Timestamp.type, Snapshot.type)


class TufClient(Updater):
    """python-tuf's updater whose files survive a power cut."""

    def __init__(self, folder: Path, root: bytes, get: Get, now: float, base: str = BASE) -> None:
        config = UpdaterConfig(
            max_root_rotations=MAX_ROOT_ROTATIONS,
            root_max_length=MAX_ROOT_BYTES,
            timestamp_max_length=MAX_TIMESTAMP_BYTES,
            snapshot_max_length=MAX_SNAPSHOT_BYTES,
            targets_max_length=MAX_TARGETS_BYTES,
        )
        super().__init__(str(folder), base, fetcher=_Fetch(get, base), config=config, bootstrap=root)
        self._trusted_set.reference_time = datetime.fromtimestamp(now, UTC)

    @property
    def trusted(self) -> Mapping[str, Signed]:
        """What was verified so far, by role."""
        found: Mapping[str, Signed] = self._trusted_set._trusted_set
        return found

    def _persist_file(self, filename: str, data: bytes) -> None:
        write_whole(Path(filename), data)


class _Fetch(FetcherInterface):
    """Hands every transfer to `get`, which has the limits, the timeouts and the credentials."""

    def __init__(self, get: Get, base: str) -> None:
        self._get = get
        self._base = base if base.endswith("/") else f"{base}/"

    def download_bytes(self, url: str, max_length: int) -> bytes:
        try:
            data = self._get(url.removeprefix(self._base), max_length)
        except Absent as error:
            raise exceptions.DownloadHTTPError(str(error), 404) from error
        except Malformed as error:
            raise exceptions.DownloadLengthMismatchError(str(error)) from error
        except SyncError as error:
            raise exceptions.DownloadError(str(error)) from error
        if len(data) > max_length:
            raise exceptions.DownloadLengthMismatchError(f"{url} has more than {max_length} bytes")
        return data

    def _fetch(self, url: str) -> Iterator[bytes]:
        yield self.download_bytes(url, MAX_TARGETS_BYTES)


class Opened:
    """One refresh and what follows from it. Every method raises a SyncError."""

    def __init__(self, client: TufClient, folder: Path, floors: Mapping[str, Mark]) -> None:
        self._client = client
        self._folder = folder
        self._floors = floors
        self._whole = False

    def refresh(self) -> None:
        """Bring the top-level metadata up to date."""
        with _translating():
            self._client.refresh()
        _check_floors(self._client, self._floors)
        self._whole = True

    def find(self, name: str) -> TargetFile | None:
        """The target of that name, if it is listed."""
        with _translating():
            return self._client.get_targetinfo(name)

    def target(self, name: str) -> TargetFile:
        """Raises NotListed."""
        found = self.find(name)
        if found is None:
            raise NotListed(f"target {name} is not listed")
        return found

    def location(self, target: TargetFile) -> str:
        """Where a repository keeps the file, below its base (specification 6.2: the digest before the name)."""
        folder, slash, name = target.path.rpartition("/")
        root = self._client.trusted[Root.type]
        if isinstance(root, Root) and root.consistent_snapshot:
            name = f"{next(iter(target.hashes.values()))}.{name}"
        return f"{folder}{slash}{name}"

    def check(self, target: TargetFile, data: bytes) -> None:
        """Raises DigestMismatch when the bytes are not those that were signed for."""
        with _translating():
            target.verify_length_and_hashes(data)

    def matches(self, target: TargetFile, data: bytes) -> bool:
        try:
            self.check(target, data)
        except DigestMismatch:
            return False
        return True

    def told(self, files: Mapping[str, Listed] | None = None, failure: SyncError | None = None) -> Answer:
        """What must be remembered. Of a refresh that failed only the root: an intermediate snapshot may be the cached one,
        under a timestamp that nothing stands behind yet."""
        whole, trusted = self._whole, self._client.trusted
        marks = {role: mark for role, mark in _marks(self._client).items() if whole or role == Root.type}
        return Answer(
            files=dict(files or {}),
            marks=marks,
            kept={role: (self._folder / f"{role}.json").read_bytes() for role in _KEPT} if whole else {},
            expires=min(signed.expires.timestamp() for signed in trusted.values()) if whole else 0.0,
            issued=_issued(trusted[Timestamp.type]) if whole else 0.0,
            code="" if failure is None else failure.code,
            text="" if failure is None else str(failure)[:MAX_TEXT],
        )


@contextmanager
def opened(ask: Ask, get: Get) -> Iterator[Opened]:
    """The client of a folder, alone on it. Raises StoreFailed, or what is wrong with the pinned root."""
    folder = Path(ask.folder)
    with _alone(folder):
        with _translating():
            _put_back(folder, ask.kept)
            client = TufClient(folder, ask.root, get, ask.now)
        yield Opened(client, folder, ask.floors)


def answer(ask: Ask, get: Get) -> Answer:
    """Refresh and look up. Never raises: what went wrong is in the answer, beside what was verified before it did."""
    client: Opened | None = None
    try:
        with opened(ask, get) as client:
            client.refresh()
            found = ((name, client.find(name)) for name in ask.names)
            return client.told({name: listed(name, target) for name, target in found if target is not None})
    except Exception as error:  # noqa: BLE001 - whatever hostile bytes cause is an answer, not the end of the child
        failure = translated(error)
    if client is None:
        return Answer(code=failure.code, text=str(failure)[:MAX_TEXT])
    return client.told(failure=failure)


@contextmanager
def _translating() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise translated(error) from error


def listed(name: str, target: TargetFile) -> Listed:
    """Raises Malformed for a target without sha256, of an impossible size, or whose name says another digest."""
    value = target.hashes.get("sha256", "")
    if not 0 < target.length <= MAX_TARGET_BYTES:
        raise Malformed(f"target {name}: {target.length} bytes, 1 to {MAX_TARGET_BYTES} are accepted")
    if len(value) != 64 or (name.startswith("sha256/") and name != f"sha256/{value}"):
        raise Malformed(f"target {name}: its sha256 is {value[:70]!r}")
    return Listed(f"sha256:{value}", target.length)


_ERRORS: tuple[tuple[type[Exception], type[SyncError]], ...] = (
    (exceptions.ExpiredMetadataError, Expired),
    (exceptions.BadVersionNumberError, Replayed),
    (exceptions.UnsignedMetadataError, BadSignature),
    (exceptions.LengthOrHashMismatchError, DigestMismatch),
    (exceptions.DownloadLengthMismatchError, Malformed),
    (exceptions.DownloadError, Unavailable),
    (exceptions.RepositoryError, Malformed),
    (OSError, StoreFailed),
)


def translated(error: Exception) -> SyncError:
    """python-tuf's error as one of ours."""
    if isinstance(error, SyncError):
        return error
    text = f"repository: {error}" if str(error) else f"repository: {type(error).__name__}"
    for theirs, ours in _ERRORS:
        if isinstance(error, theirs):
            return ours(text)
    return Malformed(f"repository: {type(error).__name__}: {error}")


def _check_floors(client: TufClient, floors: Mapping[str, Mark]) -> None:
    """Below a floor nothing is accepted, whatever became of the cache. Raises Replayed."""
    for role, mark in _marks(client).items():
        floor = floors.get(role)
        if floor is not None and floor.keys == mark.keys and mark.version < floor.version:
            raise Replayed(f"{role} version {mark.version} is below {floor.version}, which was already accepted")


def _marks(client: TufClient) -> dict[str, Mark]:
    root = client.trusted[Root.type]
    assert isinstance(root, Root)
    return {
        role: Mark(client.trusted[role].version, _fingerprint(root, vouchers))
        for role, vouchers in _VOUCHERS.items()
        if role in client.trusted
    }


def _fingerprint(root: Root, roles: tuple[str, ...]) -> str:
    parts = [f"{role}:{root.roles[role].threshold}:{','.join(sorted(root.roles[role].keyids))}" for role in roles]
    return hashlib.sha256(";".join(parts).encode()).hexdigest()[:16] if parts else ""


def _issued(signed: Signed) -> float:
    value: Any = signed.unrecognized_fields.get(ISSUED)
    return float(value) if isinstance(value, int) and value > 0 else 0.0


def _put_back(folder: Path, kept: Mapping[str, bytes]) -> None:
    """A cache that was emptied, cut to nothing or altered must not make older versions look new."""
    for role in _KEPT:
        path = folder / f"{role}.json"
        if role in kept and (not path.is_file() or _version(path.read_bytes()) < _version(kept[role])):
            write_whole(path, kept[role])


def _version(data: bytes) -> int:
    """As claimed: 0 for what is no metadata."""
    try:
        version = json.loads(data)["signed"]["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return version if isinstance(version, int) else 0


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two clients on one folder would mix two states of the repository. The kernel ends the lock with the process."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreFailed(f"{folder} is in use by another process") from error
        yield
