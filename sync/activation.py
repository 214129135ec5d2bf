"""The document in force: put there, watched, taken back, started again. The half of the updater that needs no network."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sync.clock import Clock
from sync.deadline import within
from sync.errors import Rejected, StoreFailed, Unavailable
from sync.failpoints import reach
from sync.messages import Document
from sync.state import StateStore
from sync.states import DEADLINES
from sync.store import BlobStore
from sync.trust import Verified, unseal

MAX_STARTS = 3
"""Starts of one version that may end in the death of the process before it is given up."""
MAX_UNLUCKY = 5
"""Preparations in a row that may fail for a reason that passes (no memory, no time) before it counts as the version's own."""
GO_BACK_SECONDS = 60.0
"""Pause before going back to the previous version is tried again, when it could not be prepared."""

log = logging.getLogger(__name__)


class Activator(Protocol):
    """What a document's body means: met structurally by the model repository and by the routing policy."""

    def plan(self, body: bytes, capabilities: Mapping[str, object]) -> Sequence[str]:
        """Pure: which of the document's digests this node needs. `capabilities`: {"engines": [...]}."""
        ...

    async def prepare(self, body: bytes, blobs: Mapping[str, Path]) -> object:
        """Load and check beside what is running. `blobs`: digest -> read-only file, exactly the planned ones.

        An error refuses the document, unless it has a true attribute `transient`: then it is tried again.
        """
        ...

    async def commit(self, token: object) -> None:
        """Put what `prepare` returned in force by one assignment; requests under way finish on the old version."""
        ...

    async def discard(self, token: object) -> None:
        """Release what `prepare` returned and nobody will commit."""
        ...

    def verdict(self) -> str:
        """From live traffic since the last commit, each with what it rests on after a colon.

        `good`: proved, nothing more to look at. `good so far`: proved, and still watched. `undecided`. `bad`.
        """
        ...

    def settled(self) -> None:
        """The probation is over: what was kept for it may go."""
        ...


@dataclass(frozen=True, slots=True)
class Probation:
    """`seconds`: how long an undecided version stays on probation. `poll`: seconds between two looks at the verdict."""

    seconds: float = 30.0
    poll: float = 0.5


@dataclass(frozen=True, slots=True)
class Offer:
    """A verified document and the bytes it came in."""

    verified: Verified
    envelope: bytes

    @property
    def document(self) -> Document:
        return self.verified.document

    @property
    def body(self) -> bytes:
        return bytes(self.document.body)


def reopen(envelope: bytes) -> Offer:
    """A document that was verified before it was stored."""
    return Offer(unseal(envelope), envelope)


class InForce:
    """What one kind of document makes this node run now. `tell(event, error, offer, detail)` hears of every step.

    `probation` and `deadline(state)` are asked anew each time: settings change. `no_return`: held while what is in force
    changes; whoever calls `put` or `judge` holds it.
    """

    def __init__(
        self,
        kind: str,
        scope: str,
        activator: Activator,
        *,
        state: StateStore,
        store: BlobStore,
        clock: Clock,
        capabilities: Mapping[str, object],
        probation: Callable[[], Probation],
        tell: Callable[[str, str | None, Offer, str | None], Awaitable[None]],
        deadline: Callable[[str], float] = DEADLINES.__getitem__,
        no_return: asyncio.Lock,
    ) -> None:
        self.current: Offer | None = None
        self.demoted = ""
        """Digest of what was in force before this process and does not start for a reason that passes."""
        self.watching = False
        self.on_probation = False
        self.judge_at = 0.0
        self._name = (kind, scope)
        self._activator = activator
        self._disk = state
        self._store = store
        self._clock = clock
        self._capabilities = capabilities
        self._probation = probation
        self._tell = tell
        self._deadline = deadline
        self._no_return = no_return
        self._proved = False
        self._condemned = ""
        self._committed_at = 0.0
        self._unlucky = 0
        self._late: set[asyncio.Future[None]] = set()

    def plan(self, offer: Offer) -> Sequence[str]:
        """The digests this node needs. Raises Rejected."""
        try:
            planned = self._activator.plan(offer.body, self._capabilities)
        except Exception as error:
            raise Rejected(str(error)) from error
        undeclared = set(planned) - set(offer.document.digests)
        if undeclared:
            raise Rejected(f"the body needs {min(undeclared)}, which the document does not declare")
        return planned

    async def prepare(self, offer: Offer, blobs: Mapping[str, Path], *, seconds: float | None = None) -> object:
        """What `put` takes. Raises Rejected with the activator's reason. `seconds`: None = the usual ones at least."""
        if seconds is None:
            # What was in force, and settings that may mend the deadlines.
            seconds = max(self._deadline("preparing"), DEADLINES["preparing"])
        work = self._prepared(offer, blobs)
        try:
            return await within(self._clock, seconds, "preparing", work, late=self._discard_late)
        except Unavailable as error:
            raise Rejected(str(error)) from _Passing()

    async def _prepared(self, offer: Offer, blobs: Mapping[str, Path]) -> object:
        try:
            return await self._activator.prepare(offer.body, blobs)
        except Exception as error:
            raise Rejected(str(error)) from error

    def _discard_late(self, token: object) -> None:
        task = asyncio.ensure_future(self._activator.discard(token))
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def prepare_candidate(self, offer: Offer, blobs: Mapping[str, Path]) -> object:
        """Prepare, counted on the disk: a version that kills the process while it loads is not tried for ever."""
        starts = await asyncio.to_thread(self._disk.begin_start, *self._name, "candidate")
        if starts > MAX_STARTS:
            reason = f"it ended this process {MAX_STARTS} times while it was prepared"
            digest = offer.verified.digest
            await asyncio.to_thread(self._disk.condemn_candidate, *self._name, digest, f"rejected: {reason}")
            raise Rejected(reason)
        try:
            token = await self.prepare(offer, blobs, seconds=self._deadline("preparing"))
        except Rejected as error:
            await self._end_start("candidate", confirmed=False)
            if self._may_pass(error, offer):
                raise Unavailable(str(error)) from error
            raise
        except BaseException:
            await asyncio.shield(self._end_start("candidate", confirmed=False))
            raise
        try:
            await self._end_start("candidate", confirmed=False)
        except BaseException:
            await asyncio.shield(self.discard(token))
            raise
        return token

    def _may_pass(self, error: Rejected, offer: Offer) -> bool:
        if offer.verified.digest == self.demoted and _passes(error):
            return True  # it worked in an earlier process, and nothing better is known
        self._unlucky = self._unlucky + 1 if _passes(error) else 0
        self._unlucky %= MAX_UNLUCKY
        return self._unlucky > 0

    async def discard(self, token: object) -> None:
        await self._activator.discard(token)

    async def put(self, offer: Offer, token: object, *, event: str = "committed", proved: bool = False) -> None:
        """Commit and go on probation, unless it `proved` itself before. The disk already says that the offer is active.

        `event`: what is told then, "" = nothing.
        """
        await within(self._clock, self._deadline("committing"), "committing", self._committed(offer, token))
        self._committed_at = self.judge_at = self._clock.monotonic()
        self.watching, self.on_probation, self._proved, self._condemned = True, not proved, proved, ""
        if proved:
            self._activator.settled()
        if event:
            await self._tell(event, None, offer, None)
            if proved:
                await self._tell("good", None, offer, None)

    async def _committed(self, offer: Offer, token: object) -> None:
        await self._activator.commit(token)
        self.current = offer

    @property
    def unquestioned(self) -> bool:
        """Whether nothing is to be found out about what is in force: so it is always for policies and settings."""
        return self._activator.verdict() == "good"

    async def judge(self) -> None:
        """Look at the verdict of live traffic, while it is open: confirm, keep watching, or condemn: then `go_back`."""
        if not self.watching:
            return
        verdict = self._activator.verdict()
        if verdict.startswith("bad"):
            self._condemned = verdict
            return
        probation = self._probation()
        self.judge_at = self._clock.monotonic() + probation.poll
        is_good = verdict.startswith("good")
        if is_good and not verdict.startswith("good so far"):
            self.watching = False
        old_enough = self._clock.monotonic() - self._committed_at >= probation.seconds
        over = self.on_probation and (is_good or old_enough)
        if self.current is not None and (over or (is_good and not self._proved)):
            self.on_probation, self._proved = False, is_good
            # First what rolling back and crash counting go by, then what is reported.
            await self._end_start("active", confirmed=True, proved=is_good)
            if over:
                await self._tell("good", None, self.current, None if verdict == "good" else verdict)
                self._activator.settled()

    async def go_back(self) -> None:
        """After `judge`, without `no_return`: loading may take long, and meanwhile a newer document or the end may come."""
        reason, self._condemned = self._condemned, ""
        if reason:
            self.watching = self.on_probation = False
            if await self._roll_back(reason):
                self._activator.settled()

    async def leave(self) -> None:
        """Stopping in good order is no crash of the version."""
        if self.current is not None and not self._activator.verdict().startswith("bad"):
            await self._end_start("active", confirmed=False)

    # --- starting up and going back -----------------------------------------------------------------------------

    async def start(self) -> None:
        """The stored document, or the previous one when it crashed the process too often or does not load."""
        slots = await asyncio.to_thread(self._disk.slots, *self._name)
        if slots.active is None:
            return
        active = reopen(slots.active)
        # A version that did its work is not what ends the process: power cuts and kills do. One that was only never asked may.
        crashing = await self._count_start() > MAX_STARTS and not slots.proved
        if crashing and not (slots.confirmed and slots.previous is None):
            reason = f"it ended this process {MAX_STARTS} times"
            if slots.previous is None:
                await self._start_previous(active, None, f"rejected: {reason}")
                return
            self.current = active
            if await self._roll_back(reason):
                return
            self.current = None
        try:
            token = await self.prepare(active, self._stored_blobs(active))
        except Rejected as error:
            log.warning("the stored %s document does not start: %s", self._name[0], error)
            self.demoted = active.verified.digest if _passes(error) else ""
            await self._start_previous(active, slots.previous, f"{error.code}: {error}")
            return
        async with self._no_return:
            await self.put(active, token, event="started", proved=slots.proved)
            await self.judge()
        await self.go_back()

    async def _start_previous(self, broken: Offer, previous: bytes | None, why: str) -> None:
        """Serve the previous version, if there is one; the active one becomes a candidate, which may fetch what it misses."""
        try:
            await asyncio.to_thread(self._disk.demote, *self._name)
            if previous is not None:
                offer = reopen(previous)
                await self._activator.commit(await self.prepare(offer, self._stored_blobs(offer)))
                self.current = offer
                self._activator.settled()
        except (Rejected, StoreFailed) as error:
            why = f"{why}; nor does the previous one: {error}"
        await self._tell("failed", why, broken, None)

    async def _roll_back(self, reason: str) -> bool:
        """Prepare the previous stored document again. Without one, the bad version stays: some answer beats none."""
        bad, previous = self.current, (await asyncio.to_thread(self._disk.slots, *self._name)).previous
        if bad is None:
            return False
        if previous is None:
            why = f"rejected: {reason}; there is no previous version to go back to"
            await self._tell("failed", why, bad, None)
            return False
        offer = reopen(previous)
        try:
            token = await self.prepare(offer, self._stored_blobs(offer))
        except Rejected as error:
            await self._try_again_later(bad, reason, error)
            return False
        taken = False
        try:
            async with self._no_return:
                if self.current is not bad:
                    return False  # a newer one was put in force meanwhile
                taken = await self._taken_back(bad, offer, token, f"rejected: {reason}")
        except StoreFailed as error:
            await self._try_again_later(bad, reason, error)
        finally:
            if not taken:
                await asyncio.shield(self.discard(token))
        return taken

    async def _taken_back(self, bad: Offer, previous: Offer, token: object, why: str) -> bool:
        reach("updater.rolling_back")
        await asyncio.to_thread(self._disk.roll_back, *self._name, bad.verified.digest, why)
        reach("updater.rolled_back")
        await self._activator.commit(token)
        self.current = previous
        log.warning("%s revision %d rolled back: %s", self._name[0], bad.document.revision, why)
        await self._tell("bad", why, bad, None)
        return True

    async def _try_again_later(self, bad: Offer, reason: str, error: Exception) -> None:
        """Not given up: a disk gets room, memory gets free."""
        if self.current is bad:
            self.watching, self.judge_at = True, self._clock.monotonic() + GO_BACK_SECONDS
            await self._tell("failed", f"rejected: {reason}; going back failed: {error}", bad, None)

    async def _count_start(self) -> int:
        try:
            return await asyncio.to_thread(self._disk.begin_start, *self._name, "active")
        except StoreFailed as error:
            log.warning("starting without counting it: %s", error)
            return 0

    async def _end_start(self, slot: str, *, confirmed: bool, proved: bool = False) -> None:
        try:
            await asyncio.to_thread(self._disk.end_start, *self._name, slot, confirmed=confirmed, proved=proved)
        except StoreFailed as error:
            log.warning("a start stays unconfirmed: %s", error)

    def _stored_blobs(self, offer: Offer) -> dict[str, Path]:
        planned = self.plan(offer)
        missing = [digest for digest in planned if not self._store.has(digest)]
        if missing:
            raise Rejected(f"{len(missing)} files of the stored document are gone, the first is {missing[0]}")
        return {digest: self._store.path(digest) for digest in planned}


def _passes(error: Rejected) -> bool:
    return bool(getattr(error.__cause__, "transient", False))


class _Passing(Exception):
    """Time ran out: to be tried again, a few times."""

    transient = True
