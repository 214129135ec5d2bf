"""Which files are approved, and how large they are: the signed catalogue. The one file that knows how packages are approved.

The catalogue is a document of kind `catalog`, scope `hub`, with its own key on the hub; its body lists every approved digest.
A desired document can therefore only choose among approved files. python-tuf takes this file's place, behind `require`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain

import msgspec

from sync.clock import Clock
from sync.errors import Malformed, NotListed, Refused, SyncError, Unavailable
from sync.fetch import Fetcher
from sync.messages import MAX_DOCUMENT_BYTES
from sync.state import StateStore
from sync.trust import Keyring, Verified, check_digest, unseal, verify

KIND, SCOPE, PATH = "catalog", "hub", "/catalog"
REFRESH_GAP = 1.0
"""Seconds between two refreshes: documents that name unknown files cannot make a node hammer its sources."""
MAX_FILE_BYTES = 4 << 30
"""Largest single file (4 GiB)."""


class Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of the catalogue. `files`: digest -> size in bytes."""

    files: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Known:
    envelope: bytes
    files: Mapping[str, int]
    verified: Verified

    @property
    def revision(self) -> int:
        return self.verified.document.revision


class Packages:
    """The last good catalogue, kept on the disk so that a node starts and a mirror serves without the hub."""

    def __init__(self, fetcher: Fetcher, state: StateStore, keyring: Keyring, clock: Clock) -> None:
        self._fetcher = fetcher
        self._state = state
        self._keyring = keyring
        self._clock = clock
        self._lock = asyncio.Lock()
        self._refreshed: float | None = None
        self._begun = self._ended = 0
        self._failure: SyncError | None = None
        self._asking: list[Collection[str]] = []
        stored = state.slots(KIND, SCOPE).active
        self._known = None if stored is None else _known(stored, unseal(stored, MAX_DOCUMENT_BYTES))

    def envelope(self) -> bytes | None:
        """The signed bytes of the last good catalogue, for those who fetch through this node."""
        return None if self._known is None else self._known.envelope

    async def current(self) -> bytes:
        """The catalogue's signed bytes for those who fetch through this node: asked for now, else the last good one.

        Calls that wait for one refresh share it. Raises a SyncError when there is none at all.
        """
        try:
            await self._refresh()
        except SyncError:
            if self._known is None:
                raise
        if self._known is None:
            raise Unavailable("no catalogue came here yet")
        return self._known.envelope

    async def require(self, digests: Collection[str]) -> Mapping[str, int]:
        """The size of each digest. Asks the sources only when one is unknown here; calls that wait share one refresh.

        Raises Malformed for what is no digest, NotListed when a fresh catalogue does not have one, Unavailable when no
        source answered, or the refusal of the only catalogue that did.
        """
        for digest in digests:
            check_digest(digest)
        if not self._lists(digests):
            self._asking.append(digests)
            try:
                await self._refresh()
            finally:
                self._asking.remove(digests)
        known = self._files()
        missing = [digest for digest in digests if digest not in known]
        if missing:
            raise NotListed(
                f"{len(missing)} of {len(digests)} files are not in the catalogue, the first is {missing[0]}"
            )
        return {digest: known[digest] for digest in digests}

    def _files(self) -> Mapping[str, int]:
        """Nothing once it has expired: expiry stops updates (and only updates)."""
        known = self._known
        if known is None:
            return {}
        expires = known.verified.document.expires
        return {} if expires is not None and self._clock.wall() > expires else known.files

    def _lists(self, digests: Collection[str]) -> bool:
        files = self._files()
        return all(digest in files for digest in digests)

    async def _refresh(self) -> None:
        """A refresh that began after this call: so however many wait, the next one serves them all, also with its failure."""
        asked = self._begun
        async with self._lock:
            if self._ended <= asked:
                await self._begin()
            if self._failure is not None:
                raise self._failure

    async def _begin(self) -> None:
        if self._refreshed is not None:
            await self._clock.sleep(self._refreshed + REFRESH_GAP - self._clock.monotonic())
        self._refreshed = self._clock.monotonic()
        self._begun += 1
        self._failure = None
        try:
            await self._ask()
        except SyncError as error:
            self._failure = error
        # One that is cancelled does not get here and answers nobody: the next call in line begins its own.
        self._ended = self._begun

    async def _ask(self) -> None:
        wanted = frozenset(chain.from_iterable(self._asking))
        good: list[_Known] = []
        refusals: list[Refused] = []

        def look(envelope: bytes) -> bool:
            """A mirror's catalogue may be old, or forged: then the next source is asked, and the newest good one counts."""
            try:
                good.append(self._check(envelope))
            except Refused as error:
                refusals.append(error)
                return False
            return wanted <= good[-1].files.keys()

        await self._fetcher.document(PATH, enough=look)
        if not good:
            raise refusals[-1]
        known = max(good, key=lambda item: item.revision)
        if self._known is None or known.revision > self._state.floor(KIND, SCOPE).revision:
            await asyncio.to_thread(self._state.activate, known.verified, known.envelope)
        self._known = known

    def _check(self, envelope: bytes) -> _Known:
        """Called in the fetcher's thread: a large catalogue takes tens of milliseconds."""
        floor = self._state.floor(KIND, SCOPE)
        verified = verify(
            envelope,
            self._keyring,
            kind=KIND,
            scope=SCOPE,
            floor=floor.revision,
            seen=floor.digest,
            now=max(self._clock.wall(), self._state.time_floor()),
            limit=MAX_DOCUMENT_BYTES,
        )
        return _known(envelope, verified)


def _known(envelope: bytes, verified: Verified) -> _Known:
    try:
        files = msgspec.json.decode(verified.document.body, type=Catalog).files
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Malformed(f"catalogue: {error}") from error
    for digest, size in files.items():
        check_digest(digest)
        if not 0 < size <= MAX_FILE_BYTES:
            raise Malformed(f"catalogue: {digest} has {size} bytes, 1 to {MAX_FILE_BYTES} are accepted")
    return _Known(envelope, files, verified)
