"""The access file and the files it names, while a server runs: each is parsed again only when it has become another one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from models.serving.access.revoked import NOTHING, Revoked, load_revoked
from models.serving.access.settings import InvalidAccess, Settings, load_settings
from models.serving.access.tokens import jws
from models.serving.access.watch import LOOK_SECONDS, Signature, signature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

T = TypeVar("T")


class State(msgspec.Struct, frozen=True):
    """Everything that was read, replaced as a whole. `wrong`: lines of the revocations that say nothing."""

    settings: Settings
    keys: Mapping[str, Ed25519PublicKey]
    revoked: Revoked
    wrong: list[str]


class _Source(Generic[T]):
    """What `load` makes of a file. When that fails with InvalidAccess, what it made of the file before holds on."""

    def __init__(self, load: Callable[[Path], T]) -> None:
        self.trouble = ""
        self._load = load
        self._path: Path | None = None
        self._seen: Signature | None = None
        self._value: T | None = None

    def has_changed(self) -> bool:
        return self._path is not None and signature(self._path) != self._seen

    def read(self, path: Path) -> T:
        """Raises InvalidAccess when nothing holds on."""
        if path != self._path:
            self._path, self._seen, self._value = path, None, None
        seen = signature(path)  # before it is read, so that no change is missed
        if seen != self._seen:
            self._seen = seen
            try:
                self._value, self.trouble = self._load(path), ""
            except InvalidAccess as error:
                self.trouble = str(error)
                # What cannot be opened now may be later, though it changes no more; what is wrong stays wrong.
                if isinstance(error.__cause__, OSError):
                    self._seen = None
        if self._value is None:
            raise InvalidAccess(self.trouble)
        return self._value

    def forget(self) -> None:
        """No file is named any more."""
        self._path = self._seen = self._value = None
        self.trouble = ""


class Files:
    """Looked at when somebody asks, at most once a second. `due`: monotonic seconds before which `changed` need not be
    asked."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.due = clock() + LOOK_SECONDS
        self._path = path
        self._clock = clock
        self._settings = _Source(load_settings)
        self._keys = _Source(_load_keys)
        self._revoked = _Source(load_revoked)

    def changed(self) -> bool:
        """Whether `read` may find something else than it found last."""
        now = self._clock()
        if now < self.due:
            return False
        self.due = now + LOOK_SECONDS
        return any(each.has_changed() for each in (self._settings, self._keys, self._revoked))

    def read(self) -> State:
        """What is not another file than last time comes back as the same object.

        A file that cannot be used leaves what it said before, and `troubles` says so; without anything before this raises
        InvalidAccess.
        """
        settings, folder = self._settings.read(self._path), self._path.parent
        keys: Mapping[str, Ed25519PublicKey] | None = None
        revoked: tuple[Revoked, list[str]] | None = None
        if settings.keys is None:
            self._keys.forget()
        else:
            keys = self._keys.read(folder / settings.keys)
        if settings.revoked is None:
            self._revoked.forget()
        else:
            revoked = self._revoked.read(folder / settings.revoked)
        return State(settings, keys or _NO_KEYS, *(revoked or (NOTHING, [])))

    @property
    def troubles(self) -> str:
        """Why what was read before holds on, "" = it does not."""
        return "; ".join(each.trouble for each in (self._settings, self._keys, self._revoked) if each.trouble)


_NO_KEYS: Mapping[str, Ed25519PublicKey] = {}


def _load_keys(path: Path) -> Mapping[str, Ed25519PublicKey]:
    # Here, not above: a server that knows certificates alone starts without loading cryptography.
    from models.serving.access.keys import load_keys

    jws()  # a missing package is an error now, not at the first token
    return load_keys(path)
