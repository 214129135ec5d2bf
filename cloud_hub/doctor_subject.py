"""What a hub's checks look at: its data folder, read without changing it, and the running hub if there is one."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from msgspec import to_builtins
from sqlalchemy import create_engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from cloud_hub.keys import has_repository, keys_folder
from cloud_hub.records import Records
from sync.clock import Clock, SystemClock
from sync.credentials import trusting
from sync.doctor.check import Skipped
from sync.doctor.reach import Place, Reply, get, place_of
from sync.doctor.redaction import Redaction, secrets_of_environment
from sync.doctor.subject import Once, holder

MAX_NOTE_BYTES = 64 * 1024
MAX_TOKEN_BYTES = 4096
MAX_LISTED = 2_000
BACKUP_FOLDER = "TIERLINE_BACKUP_DIR"
PUBLIC_NAMES = "TIERLINE_PUBLIC_NAMES"
"""Environment of a check: where backups are, and by which names nodes reach this hub, with commas between them."""

T = TypeVar("T")


@dataclass
class HubSubject:
    """`data`: the hub's folder."""

    data: Path
    clock: Clock = field(default_factory=SystemClock)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    name: str = "hub"

    def __post_init__(self) -> None:
        self._lock = Lock()
        self._shared: dict[str, Once[Any]] = {}

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all checks that ask for `name`."""
        with self._lock:
            once: Once[T] = self._shared.setdefault(name, Once(make))
        return once.get()

    @property
    def database(self) -> Path:
        """Raises Skipped for a hub that never started."""
        path = self.data / "hub.sqlite"
        if not path.is_file():
            raise Skipped("this hub has not been started yet")
        return path

    @contextmanager
    def records(self) -> Iterator[Records]:
        """A snapshot of the database that cannot be written. Raises Skipped when it is of another release, or damaged."""
        engine = create_engine(
            f"sqlite:///file:{self.database.resolve()}?mode=ro&uri=true", connect_args={"timeout": 3.0}
        )
        try:
            with Session(engine) as session:
                yield Records(session)
        except DatabaseError as error:
            raise Skipped(f"the database cannot be read ({error.orig}): see disk.schema and disk.database") from None
        finally:
            engine.dispose()

    def keys(self) -> Path:
        """Where the keys are. Raises Skipped for a hub that never started."""
        if not has_repository(self.data):
            raise Skipped("this hub has no update repository yet")
        return keys_folder(self.data)

    def runs(self) -> bool:
        return holder(self.data / "lock") is not None

    def url(self) -> str:
        """Where the running hub answers. Raises Skipped."""
        try:
            with (self.data / "hub.json").open("rb") as file:
                url = json.loads(file.read(MAX_NOTE_BYTES))["url"]
        except (OSError, ValueError, KeyError, TypeError):
            raise Skipped("the hub does not run") from None
        if not self.runs():
            raise Skipped("the hub does not run")
        return str(url)

    def ask(self, path: str) -> Reply:
        """Of the running hub. Raises Skipped, OSError, ValueError."""
        return get(self.place(), path)

    def place(self) -> Place:
        return place_of("hub", self.url(), self._trust)

    def redaction(self) -> Redaction:
        secrets = secrets_of_environment(self.environ)
        for path in (self.data / "admin.token", *self.data.glob("ca/*/key.pem"), *self.data.glob("tls/*.key")):
            try:
                with path.open("rb") as file:
                    text = file.read(MAX_TOKEN_BYTES).decode("ascii")
            except (OSError, UnicodeDecodeError):
                continue
            secrets += [line for line in text.splitlines() if not line.startswith("-----")]
        return Redaction(secrets)

    def parts(self, *, bodies: bool) -> Mapping[str, Callable[[], object]]:
        """What a support bundle adds to the report. There are no bodies: what is deployed stands in the nodes' bundles."""
        return {"nodes.json": self._nodes, "packages.json": self._packages, "metadata.json": self._metadata}

    def _nodes(self) -> list[object]:
        with self.records() as records:
            return [
                {
                    "id": member.node.id,
                    "tier": member.node.tier,
                    "state": member.state,
                    "seen": member.seen,
                    "left": member.left,
                    "running": member.reported.running if member.reported else {},
                    "documents": to_builtins(member.reported.documents) if member.reported else {},
                    "refused": member.reported.refused if member.reported else {},
                }
                for member in records.members(MAX_LISTED)
            ]

    def _packages(self) -> list[object]:
        with self.records() as records:
            return [
                {"package": found.ref.package, "version": found.ref.version, "digest": found.digest}
                for found in records.packages(MAX_LISTED)
            ]

    def _metadata(self) -> list[object]:
        """Names and sizes in the update repository."""
        paths = sorted(path for path in (self.data / "tuf").glob("*.json") if ".bin-" not in path.name)
        return [{"file": path.name, "size": path.stat().st_size} for path in paths[:MAX_LISTED]]

    def _trust(self) -> ssl.SSLContext:
        return trusting((self.data / "tls" / "ca.pem").read_text())()
