"""Which files are approved, and whose signature counts: what the node asks of the update repository (TUF).

The metadata is verified in a short-lived child (`sync.tuf_process`); the transfers, the credentials and what must outlive
the cache stay here. A source is trusted for nothing: the next one is asked when an answer is refused, stale or lacks a file.
Expired metadata stops updates and raises an alarm; it never stops inference.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

from sync.clock import Clock
from sync.daemon import in_daemon
from sync.deadline import within
from sync.errors import (
    Absent,
    BadSignature,
    DigestMismatch,
    Expired,
    Malformed,
    NotListed,
    Refused,
    Replayed,
    StoreFailed,
    SyncError,
    Unavailable,
)
from sync.fetch import Fetcher, Source
from sync.state import Approval, StateStore
from sync.transfers import SOURCE_SECONDS, Transfers
from sync.trust import CLOCK_LEEWAY, MAX_KEYRING_BYTES, Keyring, check_digest, decode_keyring, digest_of
from sync.tuf_messages import Answer, Ask, Listed
from sync.tuf_process import TufProcess

KEYRING = "keys/documents.json"
"""The target that holds the keys of desired documents, policies and settings."""
REFRESH_GAP = 1.0
"""Seconds in which no more than `REFRESH_BURST` refreshes begin: documents that name unknown files cannot make a node hammer
its sources."""
REFRESH_BURST = 2
"""The first document of a node needs one for the keyring and one for its files."""
UNKNOWN_KEY_GAP = 10.0
"""Seconds after a refresh in which an unknown key is no reason for another: anybody may send one."""
KEY_SECONDS = 5.0
"""How long a document waits for the refresh that might bring its key: what watches the version in force waits with it."""
RECHECK_SECONDS = 60.0
"""Age at which what a file's listing said is asked again before an update: it may have been withdrawn since."""
FRESH_SECONDS = 86_400.0
"""A timestamp signed longer ago is stale: the next source is asked, and without a better one an alarm is raised."""
POLL_SECONDS = 3_600.0
"""How often a node that is asked nothing looks for itself; half to one and a half times that."""
WANTED_SECONDS = 60.0
"""How soon it looks when somebody had to be sent away for want of a keyring; doubled each time, jittered as the other."""
MAX_NAMES = 4_096
"""Listings remembered, and looked up at once."""

log = logging.getLogger(__name__)

T = TypeVar("T")

_ERRORS: dict[str, type[SyncError]] = {
    error.code: error
    for error in (BadSignature, DigestMismatch, Expired, Malformed, Replayed, StoreFailed, Unavailable)
}


class Client(Protocol):
    """What `TufProcess` is: a blocking answer to one question."""

    def ask(self, ask: Ask, get: Callable[[str, int], bytes]) -> Answer: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PackagesStatus:
    """`fresh_until`, `last_refresh`: Unix seconds, 0 = never. `version`: of the snapshot. `alarm`: empty when all is well.
    `now`: Unix seconds as they are counted here, never before what is known to have passed."""

    fresh_until: float
    version: int
    last_refresh: float
    alarm: str
    now: float


class Packages:
    """`root`: the pinned root metadata. `folder`: the metadata cache, which may be lost at any time."""

    def __init__(
        self,
        fetcher: Fetcher,
        state: StateStore,
        root: bytes,
        clock: Clock,
        folder: Path,
        *,
        client: Client | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.refreshes: Counter[str] = Counter()
        """By outcome: `good`, or the error code."""
        self._fetcher = fetcher
        self._state = state
        self._root = root
        self._clock = clock
        self._folder = folder
        self._client = client or TufProcess()
        self._uniform = uniform
        self._lock = asyncio.Lock()
        self._begun = self._ended = 0
        self._tries: deque[float] = deque(maxlen=REFRESH_BURST)
        self._good: float | None = None
        self._failure: SyncError | None = None
        self._asking: list[Collection[str]] = []
        self._files: dict[str, int] = {}
        self._alarm = ""
        self._background: set[asyncio.Future[None]] = set()
        self._wanted = asyncio.Event()
        self._patience = WANTED_SECONDS
        self._watchers: list[Callable[[], None]] = []
        self._approval = state.approval()
        self._keyring = None if self._approval is None else decode_keyring(self._approval.keyring)

    def close(self) -> None:
        """End the child. Calls under way fail."""
        for refreshing in self._background:
            refreshing.cancel()
        self._client.close()

    def watch(self, heard: Callable[[], None]) -> None:
        """Call `heard`, in the event loop, after every good refresh: a keyring that was missing may be here."""
        self._watchers.append(heard)

    async def run(self) -> None:
        """Look for news now and then, until cancelled: so a withdrawn key or file is known before it is used."""
        while True:
            await self._pause()
            try:
                await self.refresh()
            except SyncError as error:
                log.info("the update repository was not read: %s", error)
            except Exception:
                log.exception("the update repository could not be asked")

    async def _pause(self) -> None:
        """Until it is time to look; sooner when a keyring is wanted."""
        waits = (
            asyncio.ensure_future(self._clock.sleep(POLL_SECONDS * self._uniform(0.5, 1.5))),
            asyncio.ensure_future(self._wanted.wait()),
        )
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._wanted.is_set():
            await self._clock.sleep(self._patience * self._uniform(0.5, 1.5))
            self._patience = min(2 * self._patience, POLL_SECONDS)

    async def refresh(self) -> None:
        """Ask the sources now; calls that wait share one refresh. Raises a SyncError when no source gave a good answer."""
        asked = self._begun
        async with self._lock:
            if self._ended <= asked:
                await self._begin()
            if self._failure is not None:
                raise self._failure

    async def require(self, digests: Collection[str]) -> Mapping[str, int]:
        """The size of each digest, as verified and unexpired metadata has it.

        Raises Malformed for what is no digest, NotListed for one that is not approved, Expired, Unavailable when no source
        answered and what is here does not suffice, or the refusal of the only source that did.
        """
        for digest in digests:
            check_digest(digest)
        if len(digests) > MAX_NAMES:
            raise Malformed(f"digests: {len(digests)} given, at most {MAX_NAMES} are accepted")
        if not (self._aged(self._good) < RECHECK_SECONDS and self._lists(digests)):
            await self._look_up(digests)
        self._check_fresh()
        missing = [digest for digest in digests if digest not in self._files]
        if missing:
            raise NotListed(f"{len(missing)} of {len(digests)} files are not approved, the first is {missing[0]}")
        return {digest: self._files[digest] for digest in digests}

    async def keyring(self, kid: str | None = None) -> Keyring:
        """The keys whose documents count. One refresh when `kid` is not among them or they are out of date.

        Costs nothing otherwise. Raises Expired when no source has anything newer, or what a first refresh raises.
        """
        keyring = self._keyring
        if keyring is None or self._expired():
            self._wanted.set()  # until a refresh is good
        if keyring is None:
            try:
                await self._refresh_soon()
            except Unavailable:
                if self._keyring is None:  # it may have come just after we gave up
                    raise
        elif self._aged(self._tries[-1] if self._tries else None) >= UNKNOWN_KEY_GAP and (
            self._expired() or (kid is not None and keyring.find(kid) is None)
        ):
            await self._try_refresh()
        self._check_fresh()
        if self._keyring is None:
            raise Unavailable("no keyring came here yet")
        return self._keyring

    def status(self) -> PackagesStatus:
        """What doctor, metrics and reports show."""
        approval, mark = self._approval, self._state.tuf_floors().get("snapshot")
        return PackagesStatus(
            fresh_until=approval.expires if approval else 0.0,
            version=mark.version if mark else 0,
            last_refresh=approval.refreshed if approval else 0.0,
            alarm=self._judge(),
            now=self._now(),
        )

    # --- time ---------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return max(self._clock.wall(), self._state.time_floor())

    def _aged(self, then: float | None) -> float:
        return float("inf") if then is None else self._clock.monotonic() - then

    def _expired(self) -> bool:
        return self._approval is None or self._now() > self._approval.expires

    def _check_fresh(self) -> None:
        self._judge()
        if self._expired() and self._approval is not None:
            late = self._now() - self._approval.expires
            why = f"; {self._failure.code}: {self._failure}" if self._failure is not None else ""
            raise Expired(f"the update repository expired {late:.0f} s ago and no source has a newer one{why}")

    def _judge(self) -> str:
        """The alarm there is now; told to the log once when it comes and once when it goes."""
        alarm = ""
        if self._approval is not None and self._expired():
            alarm = "expired: the update repository is out of date, nothing new is accepted"
        elif self._approval is not None and self._now() - self._approval.refreshed > FRESH_SECONDS:
            alarm = "frozen: no source had a fresh timestamp for 24 h"
        if alarm != self._alarm:
            self._alarm = alarm
            if alarm:
                log.warning("%s", alarm)
            else:
                log.warning("the update repository is fresh again")
        return alarm

    # --- refreshing ---------------------------------------------------------------------------------------------

    def _lists(self, digests: Collection[str]) -> bool:
        return not self._expired() and all(digest in self._files for digest in digests)

    async def _look_up(self, digests: Collection[str]) -> None:
        self._asking.append(digests)
        try:
            await self.refresh()
        except Unavailable:
            # Without network: what is here was verified, and still counts until it expires.
            self._check_fresh()
            if not self._lists(digests) and not await self._from_cache(digests):
                raise
        finally:
            self._asking.remove(digests)

    async def _try_refresh(self) -> None:
        try:
            await self._refresh_soon()
        except SyncError as error:
            log.info("the update repository was not read: %s", error)

    async def _refresh_soon(self) -> None:
        """Wait for a refresh, but not for long: it goes on without us, and what waits here is sent again."""
        refreshing = asyncio.ensure_future(self.refresh())
        self._background.add(refreshing)
        refreshing.add_done_callback(self._over)

        async def wait() -> None:
            await asyncio.shield(refreshing)

        await within(self._clock, KEY_SECONDS, "the refresh of the keyring", wait())

    def _over(self, refreshing: asyncio.Future[None]) -> None:
        self._background.discard(refreshing)
        if not refreshing.cancelled():
            refreshing.exception()  # told by `_failure`; nobody may be waiting any more

    async def _begin(self) -> None:
        if len(self._tries) == REFRESH_BURST:
            await self._clock.sleep(self._tries[0] + REFRESH_GAP - self._clock.monotonic())
        self._tries.append(self._clock.monotonic())
        self._begun += 1
        self._failure = None
        try:
            await self._ask_sources()
            self._good = self._clock.monotonic()
        except SyncError as error:
            self._failure = error
        self.refreshes["good" if self._failure is None else self._failure.code] += 1
        self._judge()
        # One that is cancelled does not get here and answers nobody: the next call in line begins its own.
        self._ended = self._begun

    async def _ask_sources(self) -> None:
        wanted = frozenset(chain.from_iterable(self._asking))
        good, errors = False, []
        for source in self._fetcher.sources:
            try:
                answer = await self._ask_source(wanted, source)
            except SyncError as error:
                errors.append(error)
                continue
            good = True
            # A mirror may be behind: floors rise with every answer, so a later one is never older.
            if self._now() - answer.issued <= FRESH_SECONDS and wanted <= self._files.keys():
                break
        if not good:
            refusals = [error for error in errors if isinstance(error, Refused)]
            raise (refusals or errors or [Unavailable("no source is configured")])[-1]

    async def _ask_source(self, wanted: Collection[str], source: Source) -> Answer:
        transfers = Transfers(self._fetcher, source)
        # When it is over, in whatever way: nothing of this source is under way any more, and the child has its answer.
        end = asyncio.ensure_future(self._clock.sleep(SOURCE_SECONDS))
        end.add_done_callback(transfers.cut)
        try:
            answer = await self._ask(wanted, transfers.get)
            await self._take(answer, wanted, transfers)
            return answer
        finally:
            end.cancel()

    async def _from_cache(self, digests: Collection[str]) -> bool:
        """Look up in the metadata that is here, after a start without network."""
        kept = self._state.tuf_kept()

        def get(path: str, limit: int) -> bytes:
            if path == "timestamp.json" and "timestamp" in kept:
                return kept["timestamp"]
            if path.endswith(".root.json"):
                raise Absent(path)
            raise Unavailable(f"{path} is not here")

        try:
            answer = await self._ask(frozenset(digests), get)
        except SyncError:
            return False
        self._note(answer, digests)
        return self._lists(digests)

    async def _ask(self, wanted: Collection[str], get: Callable[[str, int], bytes]) -> Answer:
        names = (KEYRING, *(f"sha256/{digest.removeprefix('sha256:')}" for digest in sorted(wanted)))
        ask = Ask(
            root=self._root,
            folder=str(self._folder),
            now=self._now(),
            floors=self._state.tuf_floors(),
            kept=self._state.tuf_kept(),
            names=names,
        )
        answer = await in_daemon(lambda: self._client.ask(ask, get), "update metadata")
        if answer.code:
            await asyncio.to_thread(self._state.raise_tuf, answer.marks, answer.kept, 0.0)
            raise _ERRORS.get(answer.code, Malformed)(answer.text)
        return answer

    async def _take(self, answer: Answer, wanted: Collection[str], transfers: Transfers) -> None:
        """Floors first, then the keyring, then what the answer allows."""
        now = self._clock.wall()
        # Fresh metadata vouches that the clock is not ahead by more than its lifetime: only such readings are kept.
        seen = now if now <= answer.expires else 0.0
        if answer.issued <= now + CLOCK_LEEWAY:  # not of the floor: times ahead of the clock would add up
            seen = max(seen, answer.issued)
        await asyncio.to_thread(self._state.raise_tuf, answer.marks, answer.kept, seen)
        if KEYRING not in answer.files:
            raise NotListed("the update repository has no keyring for documents")
        keyring = await self._bring_keyring(answer.files[KEYRING], transfers)
        refreshed = answer.issued or now
        approval = Approval(answer.expires, refreshed, answer.files[KEYRING].digest, keyring)
        parsed = decode_keyring(keyring)
        if approval != self._approval:
            await asyncio.to_thread(self._state.approve, approval)
        self._approval, self._keyring = approval, parsed
        self._note(answer, wanted)
        self._wanted.clear()
        self._patience = WANTED_SECONDS
        for heard in self._watchers:
            heard()

    def _note(self, answer: Answer, wanted: Collection[str]) -> None:
        for digest in wanted:
            listed = answer.files.get(f"sha256/{digest.removeprefix('sha256:')}")
            if listed is None:
                self._files.pop(digest, None)
            else:
                self._files[digest] = listed.size
        while len(self._files) > MAX_NAMES:
            del self._files[next(iter(self._files))]

    async def _bring_keyring(self, listed: Listed, transfers: Transfers) -> bytes:
        if self._approval is not None and self._approval.digest == listed.digest:
            return self._approval.keyring
        if listed.size > MAX_KEYRING_BYTES:
            raise Malformed(f"keyring: {listed.size} bytes, at most {MAX_KEYRING_BYTES} are accepted")
        data = await transfers.bring(f"/blobs/{listed.digest}", listed.size)
        if digest_of(data) != listed.digest:
            raise DigestMismatch(f"{transfers.url} delivered another keyring than the one signed for")
        return data
