"""What a node's checks look at: its configuration as far as it can be read, its disk, and the process if this is in it."""

from __future__ import annotations

import json
import os
import ssl
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

from sync.clock import Clock, SystemClock
from sync.credentials import Credentials, Identity, trusting
from sync.doctor.check import Skipped
from sync.doctor.kept import Kept, open_document, read_kept
from sync.doctor.reach import Place, place_of
from sync.doctor.redaction import Redaction, secrets_in, secrets_of_environment, secrets_of_url
from sync.errors import InvalidConfig, SyncError
from sync.identity import MAX_CONFIG_BYTES, MAX_CREDENTIAL_BYTES, Membership
from sync.quota import Quota

NO_CONFIG = "the configuration cannot be used"
MAX_NOTE_BYTES = 64 * 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Live:
    """The node, when the checks run inside its process. `protocol`: of its link, as the broker granted it."""

    connected: bool
    protocol: str
    running: Mapping[str, str]


class Once(Generic[T]):
    """A value several checks need, made by the first of them. What it raises is raised for all."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = Lock()
        self._made: list[T] = []
        self._error: Exception | None = None

    def get(self) -> T:
        with self._lock:
            if self._error is not None:
                raise self._error
            if not self._made:
                try:
                    self._made.append(self._make())
                except Exception as error:
                    self._error = error
                    raise
            return self._made[0]


@dataclass
class NodeSubject:
    """`path`: of the configuration, None inside a running node. `membership` None = it cannot be used, because of `problem`.

    `config`: the tier's own. `plan(body)`: digests that a desired document's body needs here. `up`: URLs of tiers above, by
    name. `quota`: of the store.
    """

    path: Path | None
    membership: Membership | None = None
    problem: str = ""
    config: Any = None
    quota: Quota = field(default_factory=Quota)
    plan: Callable[[bytes], Collection[str]] | None = None
    up: Mapping[str, str] = field(default_factory=dict)
    live: Live | None = None
    clock: Clock = field(default_factory=SystemClock)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def __post_init__(self) -> None:
        self._kept = Once(self._read_kept)
        self._credentials = Once(self._read_credentials)
        self.notes: dict[str, Once[Any]] = {}
        self._lock = Lock()

    # --- what is there ------------------------------------------------------------------------------------------

    @property
    def node(self) -> Membership:
        """Raises Skipped without a configuration that can be used."""
        if self.membership is None:
            raise Skipped(NO_CONFIG)
        return self.membership

    @property
    def data(self) -> Path:
        return self.node.data

    def blob(self, digest: str) -> Path:
        """Where a file lies, or would, without opening the store: a check must change nothing."""
        return self.data / "blobs" / digest.removeprefix("sha256:")

    def kept(self) -> Kept:
        """Raises Skipped for a node that never started, StoreFailed."""
        return self._kept.get()

    def credentials(self) -> Credentials:
        """Raises InvalidConfig."""
        return self._credentials.get()

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all checks that ask for `name`."""
        with self._lock:
            once: Once[T] = self.notes.setdefault(name, Once(make))
        return once.get()

    def active(self, kind: str) -> bytes | None:
        """The body of the active document of a kind. Raises what `kept` raises, Malformed."""
        envelope = self.kept().documents.get((kind, "active"))
        return None if envelope is None else bytes(open_document(envelope).body)

    def announced(self) -> Mapping[str, Any]:
        """What a running node of this folder wrote about itself; empty when none runs."""
        for name in ("edge.json", "worker.json"):
            try:
                found = json.loads((self.data / name).read_bytes()[:MAX_NOTE_BYTES])
            except (OSError, ValueError):
                continue
            if isinstance(found, dict) and _alive(found.get("pid")):
                return found
        return {}

    def runs(self) -> bool:
        """Whether a process holds this node's folder."""
        return self.live is not None or holder(self.data / "lock") is not None

    # --- where it goes ------------------------------------------------------------------------------------------

    def places(self) -> list[Place]:
        """Every host and port it talks to, each once. Raises Skipped, InvalidConfig."""
        node = self.node
        uses = [("broker", node.broker, node.proxy_to(node.broker))]
        uses += [("hub", node.hub, node.proxy_to(node.hub))] if node.hub else []
        uses += [("files", url, node.proxy_to(url)) for url in node.sources if not url.startswith("file:")]
        uses += [(name, url, None) for name, url in self.up.items()]
        found: dict[tuple[str, int, bool], Place] = {}
        for use, url, proxy in uses:
            place = place_of(use, url, self.trust, proxy)
            key = place.host, place.port, place.tls is not None
            known = found.get(key)
            if known is None:
                found[key] = place
            elif use not in known.uses:
                found[key] = Place((*known.uses, use), known.url, known.host, known.port, known.tls, known.proxy)
        return list(found.values())

    def trust(self) -> ssl.SSLContext:
        """Whom this node trusts, even when its own key cannot be used. Raises OSError, InvalidConfig."""
        node = self.node
        if node.identity is None:
            return ssl.create_default_context()
        try:
            context = self.credentials().http_context()
        except SyncError:
            context = trusting((node.identity / "ca.pem").read_text())()
        return context or ssl.create_default_context()

    def redaction(self) -> Redaction:
        """Made of every secret that this node has."""
        raw = read_raw(self.path) if self.path is not None else {}
        secrets = [*secrets_of_environment(self.environ), *secrets_in(raw)]
        if self.membership is not None:
            node = self.membership
            secrets += secrets_of_url(node.proxy or "")
            files = [node.credential] if node.credential else []
            files += sorted(node.identity.rglob("key.pem")) if node.identity else []
            secrets += [line for path in files for line in _lines_of(path)]
        return Redaction(secrets)

    def parts(self, *, bodies: bool) -> Mapping[str, Callable[[], object]]:
        """What a support bundle adds to the report."""
        from sync.doctor.node_parts import node_parts

        return node_parts(self, bodies=bodies)

    def _read_kept(self) -> Kept:
        path = self.data / "state.db"
        if not path.exists():
            raise Skipped("this node has not been started yet")
        return read_kept(path)

    def _read_credentials(self) -> Credentials:
        return self.node.credentials(self.clock)


def read_raw(path: Path) -> Mapping[str, Any]:
    """The configuration as TOML alone; empty when it is not even that."""
    try:
        with path.open("rb") as file:
            return tomllib.loads(file.read(MAX_CONFIG_BYTES).decode())
    except (OSError, ValueError, RecursionError):
        return {}


def subject_of(path: Path, load: Callable[[Path], T], fill: Callable[[T], Mapping[str, Any]]) -> NodeSubject:
    """`load` reads a tier's configuration; `fill` says, as fields of NodeSubject, what its checks need of it."""
    try:
        config = load(path)
    except (SyncError, ValueError, OSError) as error:
        return NodeSubject(path, problem=str(error))
    return NodeSubject(path, config=config, **fill(config))


def identity_of(subject: NodeSubject) -> Identity:
    """The identity. Raises Skipped for a node with a token, InvalidConfig."""
    if subject.node.identity is None:
        raise Skipped("this node has a token, no certificate")
    found = subject.credentials()
    if not isinstance(found, Identity):
        raise InvalidConfig("node.identity: cannot be used")
    return found


def holder(path: Path) -> int | None:
    """The process that has a lock on the file, 0 = one that is not to be seen from here; None = nobody.

    Looks it up first: taking the lock for a moment could keep the process from starting that needs it.
    """
    import fcntl

    try:
        inode = path.stat().st_ino
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except FileNotFoundError:
        return None
    except OSError:
        locks = []
    for fields in locks:
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
            return max(int(fields[4]), 0)
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    except OSError:
        return None
    return None


def _alive(pid: object) -> bool:
    return isinstance(pid, int) and pid > 0 and Path(f"/proc/{pid}").exists()


def _lines_of(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CREDENTIAL_BYTES).decode("ascii")
    except (OSError, UnicodeDecodeError):
        return []
    return [line for line in text.splitlines() if line and not line.startswith("-----")]
