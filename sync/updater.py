"""How a signed document becomes what a node runs - and how that is undone. One updater per kind of document.

    offer -> verify -> approve -> plan -> [floor and candidate on the disk] -> fetch -> prepare -> [active on the disk]
          -> commit -> probation -> applied

Starting up and rolling back are preparing a stored document again, without any network. The stored state is changed before
the running one, so a power cut at any step leaves the old version or the new one, and both were verified. What the body
means is the activator's business: trust looks at signature, scope, revision and digests only.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

from sync.activation import Activator, InForce, Offer, Probation, reopen
from sync.clock import Clock
from sync.errors import Refused, Rejected, Replayed, StoreFailed, SyncError
from sync.failpoints import reach
from sync.fetch import Fetcher
from sync.messages import DocumentReport
from sync.packages import Packages
from sync.state import StateStore
from sync.store import BlobStore
from sync.trust import Keyring, Verified, unseal, verify

STATES: dict[str, tuple[str, ...]] = {
    "idle": ("verifying", "preparing", "refused", "rolled_back", "failed"),
    "verifying": ("verifying", "fetching", "preparing", "refused", "failed"),
    "fetching": ("verifying", "preparing", "refused", "failed", "rolled_back"),
    "preparing": ("verifying", "committing", "refused", "failed", "rolled_back"),
    "committing": ("probation", "rolled_back", "failed"),
    "probation": ("verifying", "applied", "rolled_back", "failed"),
    "applied": ("verifying", "applied", "refused", "rolled_back", "failed"),
    "refused": ("verifying", "applied", "refused", "rolled_back", "failed"),
    "failed": ("verifying", "applied", "refused", "rolled_back", "failed"),
    "rolled_back": ("verifying", "applied", "refused", "rolled_back", "failed"),
}
"""State of the newest document -> states it may turn to. `failed` is tried again, `refused` and `rolled_back` are not."""
_UNDER_WAY = ("verifying", "fetching", "preparing", "committing", "probation")

CLOSE_SECONDS = 10.0
"""How long `close` waits for the worker, which may be inside an activator."""
RETRY_SECONDS = 1.0
"""Pause before a failed update is tried again; doubled each time, jittered, without end: the document stays wanted."""
MAX_RETRY_SECONDS = 60.0
MAX_ERROR_TEXT = 1_000
"""Characters of a reason that travel in a report: an engine's message may quote a whole model."""
MAX_OFFERS = 8
"""Offers that may wait to be verified; more arrive only from a broken or hostile sender, and the oldest go first."""

log = logging.getLogger(__name__)

__all__ = ["STATES", "Activator", "Offer", "Probation", "Updater"]


class Updater:
    """Keeps one kind of document in force. Every error becomes a report; nothing but `close` ends it.

    `on_report(kind, report)` is called in the event loop at every change of state. `refusals` counts by error code.
    """

    def __init__(
        self,
        kind: str,
        scope: str,
        activator: Activator,
        *,
        state: StateStore,
        store: BlobStore,
        packages: Packages,
        fetcher: Fetcher,
        keyring: Keyring,
        clock: Clock,
        capabilities: Mapping[str, object],
        on_report: Callable[[str, DocumentReport], None],
        probation: Probation | None = None,
    ) -> None:
        self.kind = kind
        self.scope = scope
        self.refusals: Counter[str] = Counter()
        self._disk = state
        self._packages = packages
        self._fetcher = fetcher
        self._keyring = keyring
        self._clock = clock
        self._on_report = on_report
        self._probation = probation or Probation()
        self._in_force = InForce(
            kind,
            scope,
            activator,
            state=state,
            store=store,
            clock=clock,
            capabilities=capabilities,
            probation=self._probation,
            tell=self._set,
        )
        self._report = DocumentReport(revision=state.floor(kind, scope).revision, applied=0, state="idle")
        self._rejected = ("", "")
        self._last_refusal = ""
        self._point_of_no_return = asyncio.Lock()
        self._offers: deque[bytes] = deque(maxlen=MAX_OFFERS)
        self._offered = asyncio.Event()
        self._resume: Offer | None = None
        self._running: Offer | None = None
        self._worker: asyncio.Task[None] | None = None

    @property
    def report(self) -> DocumentReport:
        return self._report

    def needed(self) -> frozenset[str]:
        """Every digest that a stored document names: what must stay in the store."""
        slots = self._disk.slots(self.kind, self.scope)
        stored = [unseal(item) for item in (slots.active, slots.previous, slots.candidate) if item is not None]
        return frozenset(digest for item in stored for digest in item.document.digests)

    def offer(self, envelope: bytes) -> None:
        """Hand over bytes from the network. Never raises, never blocks; the newest good one wins."""
        self._offers.append(envelope)
        self._offered.set()

    async def start(self) -> None:
        """Put the stored document in force, without network, then begin to work on offers."""
        await self._in_force.start()
        candidate = (await asyncio.to_thread(self._disk.slots, self.kind, self.scope)).candidate
        self._resume = None if candidate is None else reopen(candidate)
        self._worker = asyncio.create_task(self._work(), name=f"updater {self.kind}")

    async def close(self) -> None:
        """Stop. A commit under way is finished first; leaving in good order is no crash of the version."""
        if self._worker is not None:
            async with self._point_of_no_return:
                self._worker.cancel()
            await asyncio.wait({self._worker}, timeout=CLOSE_SECONDS)
            await self._in_force.leave()

    # --- the worker ---------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        offer = self._resume
        while True:
            try:
                if offer is None:
                    offer = self._admit(await self._next_offer())
                else:
                    offer = await self._carry_out(offer)
            except Exception as error:
                # Last resort: the worker outlives every mistake of ours.
                log.exception("the %s updater failed", self.kind)
                self._set("failed", f"error: {error}")
                offer = None

    async def _next_offer(self) -> bytes:
        await self._watch()
        while not self._offers:
            await self._wait()
            await self._watch()
        return self._offers.popleft()

    async def _carry_out(self, offer: Offer) -> Offer | None:
        """Update until done, or until a newer document takes its place, which is returned."""
        self._running = offer
        update = asyncio.create_task(self._update(offer))
        newer: Offer | None = None
        try:
            while not update.done() and newer is None:
                await self._wait(update)
                await self._watch()
                if self._offers:
                    newer = self._admit(self._offers.popleft())
        finally:
            async with self._point_of_no_return:
                update.cancel()
            await asyncio.wait({update})
            self._running = None
        return newer

    async def _wait(self, *others: asyncio.Task[None]) -> None:
        """Until an offer comes, one of `others` ends, or the verdict is to be looked at."""
        if self._offers:
            return
        self._offered.clear()
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._offered.wait())]
        if self._in_force.watching:
            pause = max(0.0, self._in_force.judge_at - self._clock.monotonic())
            waits.append(asyncio.ensure_future(self._clock.sleep(pause)))
        try:
            await asyncio.wait([*waits, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _watch(self) -> None:
        """Judge when it is time, whatever arrives: a sender of garbage must not switch rolling back off."""
        if self._in_force.watching and self._clock.monotonic() >= self._in_force.judge_at:
            async with self._point_of_no_return:
                await self._in_force.judge()

    @property
    def _busy(self) -> bool:
        """The report tells of something under way, which an offer that is refused must not hide."""
        return self._report.state in _UNDER_WAY or (self._report.state == "failed" and self._running is not None)

    # --- deciding about an offer --------------------------------------------------------------------------------

    def _admit(self, envelope: bytes) -> Offer | None:
        """The offer, when there is something to do about it."""
        try:
            offer = Offer(self._verify(envelope), envelope)
        except Refused as error:
            self._refuse(error, quietly=self._busy)
            return None
        digest, active = offer.verified.digest, self._in_force.current
        if self._busy and self._running is not None and digest == self._running.verified.digest:
            self._set(self._report.state, self._report.error)
            return None
        if active is not None and digest == active.verified.digest:
            self._set("probation" if self._in_force.on_probation else "applied")
            return None
        condemned, reason = self._disk.condemned(self.kind, self.scope)
        if digest == condemned:
            self._set("rolled_back", reason, offer)
            return None
        if digest == self._rejected[0]:
            self._set("refused", self._rejected[1], offer)
            return None
        return offer

    def _verify(self, envelope: bytes) -> Verified:
        floor = self._disk.floor(self.kind, self.scope)
        running = self._running
        now = max(self._clock.wall(), self._disk.time_floor())
        verified = verify(
            envelope,
            self._keyring,
            kind=self.kind,
            scope=self.scope,
            floor=floor.revision,
            seen=floor.digest,
            now=now,
        )
        if running is not None and verified.digest != running.verified.digest:
            revision, current = verified.document.revision, running.document.revision
            if revision <= current:
                raise Replayed(f"revision {revision} is not above {current}, which is under way")
        return verified

    def _refuse(self, error: SyncError, *, offer: Offer | None = None, quietly: bool = False) -> None:
        self._count(error)
        if quietly:
            self._set(self._report.state, self._report.error)
        else:
            self._set("refused", f"{error.code}: {error}", offer)

    def _count(self, error: SyncError) -> None:
        self.refusals[error.code] += 1
        text = f"{error.code}: {error}"
        if text != self._last_refusal:
            log.warning("%s document for %s refused: %s", self.kind, self.scope, text)
        self._last_refusal = text

    # --- carrying it out ----------------------------------------------------------------------------------------

    async def _update(self, offer: Offer) -> None:
        """Try until it is in force, rejected, or cancelled by a newer one.

        Only the activator's word is final: a catalogue or a file that is wrong today may come right from its source tomorrow.
        """
        attempt = 0
        while True:
            try:
                self._set("verifying", None, offer)
                await self._try(offer)
                return reach("updater.reported")
            except Rejected as error:
                self._rejected = (offer.verified.digest, f"{error.code}: {error}")
                return await self._give_up(offer, error)
            except SyncError as error:
                if isinstance(error, Refused):
                    self._count(error)
                self._set("failed", f"{error.code}: {error}", offer)
            except Exception as error:
                log.exception("the update of %s failed", self.kind)
                self._set("failed", f"error: {error}", offer)
            pause = min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2.0 ** min(attempt, 10))
            attempt += 1
            await self._clock.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311

    async def _give_up(self, offer: Offer, error: Rejected) -> None:
        if offer.document.digests:
            try:
                await asyncio.to_thread(self._disk.forget_candidate, self.kind, self.scope)
            except StoreFailed as failure:
                log.warning("the refused candidate stays on the disk: %s", failure)
        self._refuse(error, offer=offer)

    async def _try(self, offer: Offer) -> None:
        reach("updater.verified")
        document = offer.document
        if document.digests:
            sizes = await self._packages.require(document.digests)
            planned = self._in_force.plan(offer)
            await asyncio.to_thread(self._disk.accept, offer.verified, offer.envelope)
            reach("updater.floor")
            self._set("fetching", None, offer)
            blobs = {digest: await self._fetcher.fetch(digest, sizes[digest]) for digest in planned}
            reach("updater.fetched")
            self._set("preparing", None, offer)
            token = await self._in_force.prepare_candidate(offer, blobs)
        else:
            # Nothing to fetch, nothing that can crash while it loads: one transaction, in `_commit`, is enough.
            self._in_force.plan(offer)
            self._set("preparing", None, offer)
            token = await self._in_force.prepare(offer, {})
        reach("updater.prepared")
        await self._commit(offer, token)

    async def _commit(self, offer: Offer, token: object) -> None:
        """The point of no return: newer offers and `close` wait until it is passed."""
        async with self._point_of_no_return:
            self._set("committing", None, offer)
            try:
                await asyncio.to_thread(self._disk.activate, offer.verified, offer.envelope)
            except StoreFailed:
                await self._in_force.discard(token)
                raise
            reach("updater.recorded")
            await self._in_force.put(offer, token)
            reach("updater.committed")
            await self._in_force.judge()

    # --- reporting ----------------------------------------------------------------------------------------------

    def _set(self, state: str, error: str | None = None, offer: Offer | None = None) -> None:
        """Enter a state and report it. An impossible step is a mistake of ours: said loudly, never fatal."""
        if offer is not None and self._running not in (None, offer):
            # What happens to the version in force must not hide how far the next one has got.
            state, error, offer = self._report.state, self._report.error, None
        old, active = self._report, self._in_force.current
        if state != old.state and state not in STATES[old.state]:
            log.error("the %s updater went from %s to %s", self.kind, old.state, state)
        self._report = DocumentReport(
            revision=max(old.revision, offer.document.revision if offer is not None else 0),
            applied=0 if active is None else active.document.revision,
            state=state,
            digest="" if active is None else active.verified.digest,
            error=None if error is None else error[:MAX_ERROR_TEXT],
            at=old.at if state == old.state else self._clock.wall(),
        )
        self._on_report(self.kind, self._report)
