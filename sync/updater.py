"""How a signed document becomes what a node runs - and how that is undone. One updater per kind of document.

    offer -> verify -> approve -> plan -> [floor and candidate on the disk] -> fetch -> wait for holds and windows -> prepare
          -> [active on the disk] -> commit -> probation -> applied

`sync.states` is the table of what may follow what. Each state is on the disk before it is entered, so a node that was killed
goes on in it; a document that names no files takes all its steps at once, recorded once. Starting up and rolling back are
preparing a stored document again, without any network. The stored state is changed before the running one, so a power cut at
any step leaves the old version or the new one, and both were verified. What the body means is the activator's business: trust
looks at signature, scope, revision and digests only. What arrives is in `sync.admission`, what is told in `sync.journal`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sync.activation import Activator, InForce, Offer, Probation, reopen
from sync.admission import Admission
from sync.clock import Clock
from sync.deadline import within
from sync.errors import Refused, Rejected, StoreFailed, SyncError
from sync.failpoints import reach
from sync.fetch import Fetcher
from sync.gate import Gate, Obstacle
from sync.journal import Journal
from sync.messages import DocumentReport
from sync.packages import Packages
from sync.settings import Settings
from sync.state import Progress, StateStore
from sync.states import DEADLINES, RESUMED, STATES, UNDER_WAY
from sync.store import BlobStore
from sync.trust import unseal

CLOSE_SECONDS = 10.0
"""How long `close` waits for the worker, which may be inside an activator."""
RETRY_SECONDS = 1.0
"""Pause before a failed update is tried again; doubled each time, jittered, without end: the document stays wanted."""
MAX_RETRY_SECONDS = 60.0

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
        clock: Clock,
        capabilities: Mapping[str, object],
        on_report: Callable[[str, DocumentReport], None],
        probation: Probation | None = None,
        settings: Callable[[], Settings] = Settings,
        gate: Gate | None = None,
    ) -> None:
        self.kind = kind
        self.scope = scope
        self._disk = state
        self._packages = packages
        self._fetcher = fetcher
        self._store = store
        self._clock = clock
        self._fixed_probation = probation
        self._settings = settings
        self._gate = gate
        self._point_of_no_return = asyncio.Lock()
        self._journal = Journal(
            kind,
            scope,
            state=state,
            clock=clock,
            on_report=on_report,
            current=lambda: self._in_force.current,
        )
        self._in_force = InForce(
            kind,
            scope,
            activator,
            state=state,
            store=store,
            clock=clock,
            capabilities=capabilities,
            probation=self._probation,
            tell=self._journal.heard,
            deadline=self._deadline,
            no_return=self._point_of_no_return,
        )
        self._admission = Admission(kind, scope, packages=packages, state=state, clock=clock)
        self.refusals = self._admission.refusals
        self._rejected = ("", "")
        self._resume: Offer | None = None
        self._running: Offer | None = None
        self._worker: asyncio.Task[None] | None = None

    @property
    def report(self) -> DocumentReport:
        return self._journal.report

    def needed(self) -> frozenset[str]:
        """Every digest that a stored document names: what must stay in the store."""
        slots = self._disk.slots(self.kind, self.scope)
        stored = [unseal(item) for item in (slots.active, slots.previous, slots.candidate) if item is not None]
        return frozenset(digest for item in stored for digest in item.document.digests)

    def offer(self, envelope: bytes) -> None:
        """Hand over bytes from the network. Never raises, never blocks; the newest good one wins."""
        self._admission.offer(envelope)

    async def start(self) -> None:
        """Put the stored document in force, without network, then begin to work on offers."""
        await self._journal.pick_up()
        await self._in_force.start()
        candidate = (await asyncio.to_thread(self._disk.slots, self.kind, self.scope)).candidate
        self._resume = None if candidate is None else reopen(candidate)
        if self._resume is not None and self._is_current(self._resume.verified.digest):
            self._resume = None
        if self._journal.progress.state != "idle":
            self._journal.say()
        self._packages.watch(self._admission.look_again)
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
                    offer = await self._admit(await self._next_offer())
                else:
                    offer = await self._carry_out(offer)
            except Exception as error:
                # Last resort: the worker outlives every mistake of ours.
                log.exception("the %s updater failed", self.kind)
                await self._journal.mistake(error)
                offer = None

    async def _next_offer(self) -> bytes:
        await self._watch()
        while (envelope := self._admission.pop()) is None:
            await self._wait()
            await self._watch()
        return envelope

    async def _carry_out(self, offer: Offer) -> Offer | None:
        """Update until done, or until a newer document takes its place, which is returned."""
        self._running = offer
        update = asyncio.create_task(self._update(offer))
        newer: Offer | None = None
        try:
            while not update.done() and newer is None:
                await self._wait(update)
                await self._watch()
                if (envelope := self._admission.pop()) is not None:
                    newer = await self._admit(envelope)
        finally:
            async with self._point_of_no_return:
                update.cancel()
            await asyncio.wait({update}, timeout=CLOSE_SECONDS)
            if not update.done():
                log.error("the update to revision %d does not end and is left alone", offer.document.revision)
            if self._journal.progress.state == "committing":
                # It failed, and was taken off before it could say so.
                why = f"unavailable: revision {offer.document.revision} could not be put in force"
                await self._journal.enter("failed", why)
            self._running = None
        return newer

    async def _wait(self, *others: asyncio.Task[None]) -> None:
        """Until an offer comes, one of `others` ends, or the verdict is to be looked at."""
        if self._admission.waits:
            return
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._admission.arrival())]
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
            await self._in_force.go_back()

    @property
    def _busy(self) -> bool:
        """The report tells of something under way, which an offer that is refused must not hide."""
        state = self._journal.progress.state
        return state in UNDER_WAY or (state == "failed" and self._running is not None)

    # --- deciding about an offer --------------------------------------------------------------------------------

    async def _admit(self, envelope: bytes) -> Offer | None:
        """The offer, when there is something to do about it."""
        under_way = None if self._running is None else self._running.verified
        try:
            offer = Offer(await self._admission.verify(envelope, under_way), envelope)
        except SyncError as error:
            self._admission.count(error)
            # Bytes that nobody vouches for are told of, and never make this node write to its disk.
            self._journal.put_aside(None if self._busy else f"{error.code}: {error}")
            return None
        digest = offer.verified.digest
        if self._running is not None and self._busy and digest == self._running.verified.digest:
            self._journal.say()
        elif self._is_current(digest):
            await self._again(offer)
        elif digest == self._disk.condemned(self.kind, self.scope)[0]:
            reason = self._disk.condemned(self.kind, self.scope)[1]
            await self._journal.enter("bad", reason, offer)
        elif digest == self._rejected[0]:
            await self._journal.enter("refused", self._rejected[1], offer)
        else:
            return offer
        return None

    def _is_current(self, digest: str) -> bool:
        current = self._in_force.current
        return current is not None and current.verified.digest == digest

    async def _again(self, offer: Offer) -> None:
        """What is in force was offered once more."""
        if self._journal.progress.digest == offer.verified.digest:
            self._journal.put_aside(None)
        else:
            await self._journal.enter("watched" if self._in_force.on_probation else "good", None, offer)

    # --- carrying it out ----------------------------------------------------------------------------------------

    async def _update(self, offer: Offer) -> None:
        """Try until it is in force, rejected, or cancelled by a newer one.

        Only the activator's word is final: a catalogue or a file that is wrong today may come right from its source tomorrow.
        """
        resumed = offer is self._resume and self._can_go_on(offer)
        while True:
            try:
                await self._try(offer, resumed=resumed)
                return reach("updater.reported")
            except Rejected as error:
                self._rejected = (offer.verified.digest, f"{error.code}: {error}")
                return await self._give_up(offer, error)
            except SyncError as error:
                if isinstance(error, Refused):
                    self._admission.count(error)
                await self._journal.enter("failed", f"{error.code}: {error}", offer)
            except Exception as error:
                log.exception("the update of %s failed", self.kind)
                await self._journal.mistake(error)
            resumed = False
            attempt = max(self._journal.progress.attempts - 1, 0)
            pause = min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2.0 ** min(attempt, 10))
            await self._clock.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311

    def _can_go_on(self, offer: Offer) -> bool:
        """Whether a candidate is taken up in the state in which the last process left it."""
        state = self._journal.progress.state
        if self._journal.progress.digest != offer.verified.digest or state not in RESUMED:
            return False
        return state == "fetching" or all(self._store.has(digest) for digest in self._planned(offer))

    def _planned(self, offer: Offer) -> Sequence[str]:
        try:
            return self._in_force.plan(offer)
        except Rejected:
            return offer.document.digests  # said when it is tried

    async def _give_up(self, offer: Offer, error: Rejected) -> None:
        if offer.document.digests:
            try:
                await asyncio.to_thread(self._disk.forget_candidate, self.kind, self.scope)
            except StoreFailed as failure:
                log.warning("the refused candidate stays on the disk: %s", failure)
        self._admission.count(error)
        await self._journal.enter("refused", f"{error.code}: {error}", offer)

    async def _try(self, offer: Offer, *, resumed: bool) -> None:
        if not offer.document.digests and await self._at_once(offer):
            return
        if not resumed:
            await self._journal.enter("offered", None, offer)
        reach("updater.verified")
        document = offer.document
        if document.digests:
            planned = self._in_force.plan(offer)
            approved = resumed or self._was_in_force(offer)
            if not (approved and all(self._store.has(digest) for digest in planned)):
                await self._bring(offer, planned, resumed=resumed)
            reach("updater.fetched")
            await self._pass_gate(offer, "go")
            reach("updater.preparing")
            blobs = {digest: self._store.path(digest) for digest in planned}
            token = await self._in_force.prepare_candidate(offer, blobs)
        else:
            self._in_force.plan(offer)
            await self._pass_gate(offer, "go")
            reach("updater.preparing")
            token = await self._in_force.prepare(offer, {})
        reach("updater.prepared")
        await self._put(offer, token)

    async def _at_once(self, offer: Offer) -> bool:
        """Put a document in force that names no files; False when it must wait, or there may be something to judge.

        Nothing is fetched and nothing can crash while it loads, so one transaction is enough: of its states only the last is
        recorded, together with what makes it active. Until then the node was in the state before it.
        """
        if self._obstacle(offer) is not None or not self._in_force.unquestioned:
            return False
        reach("updater.verified")
        self._in_force.plan(offer)
        reach("updater.preparing")
        token = await self._in_force.prepare(offer, {})
        reach("updater.prepared")
        taken = False

        async def put(applied: Progress) -> None:
            nonlocal taken
            reach("updater.committing")
            await asyncio.to_thread(
                self._disk.activate, offer.verified, offer.envelope, self._clock.wall(), proved=applied
            )
            reach("updater.recorded")
            await self._in_force.put(offer, token, event="", proved=True)
            taken = True

        try:
            async with self._point_of_no_return:
                if self._obstacle(offer) is None:
                    await self._journal.at_once(offer, put)
                    reach("updater.committed")
                    await self._in_force.judge()
        finally:
            if not taken:
                await asyncio.shield(self._in_force.discard(token))
        return taken

    async def _bring(self, offer: Offer, planned: Sequence[str], *, resumed: bool) -> None:
        """Floor and candidate on the disk, every planned file in the store."""
        work = self._packages.require(offer.document.digests)
        sizes = await within(self._clock, self._deadline("verifying"), "verifying", work)
        if self._journal.progress.state == "verifying":
            await asyncio.to_thread(self._disk.accept, offer.verified, offer.envelope, self._clock.wall())
            reach("updater.floor")
            await self._journal.enter("listed", None, offer)
        fetching = self._fetch(planned, sizes)
        await within(self._clock, self._deadline("fetching"), "fetching", fetching)

    async def _fetch(self, planned: Sequence[str], sizes: Mapping[str, int]) -> None:
        for digest in planned:
            await self._fetcher.fetch(digest, sizes[digest])

    async def _put(self, offer: Offer, token: object) -> None:
        """Commit as soon as nothing is in the way; whoever takes its place meanwhile finds nothing left of it."""
        taken = False
        try:
            while not taken:
                await self._pass_gate(offer)
                async with self._point_of_no_return:
                    if self._obstacle(offer) is None:
                        taken = await self._commit(offer, token)
        except BaseException:
            if not taken:
                await asyncio.shield(self._in_force.discard(token))
            raise

    async def _commit(self, offer: Offer, token: object) -> bool:
        """The point of no return: newer offers and `close` wait until it is passed, at most for its deadline."""
        await self._journal.enter("commit", None, offer)
        reach("updater.committing")
        now = self._clock.wall()
        await asyncio.to_thread(self._disk.activate, offer.verified, offer.envelope, now)
        reach("updater.recorded")
        await self._in_force.put(offer, token)
        reach("updater.committed")
        await self._in_force.judge()
        return True

    # --- waiting ------------------------------------------------------------------------------------------------

    async def settled(self) -> None:
        """Return when no commit is under way: a hold that was there before is heeded from here on."""
        async with self._point_of_no_return:
            return

    def _was_in_force(self, offer: Offer) -> bool:
        """In an earlier process, with these very files; only something that passes kept it from starting in this one."""
        return offer.verified.digest == self._in_force.demoted

    def _obstacle(self, offer: Offer) -> Obstacle | None:
        if self._gate is None or (self._in_force.current is None and self._was_in_force(offer)):
            return None
        return self._gate.obstacle(offer.document.revision, self._journal.held)

    async def _pass_gate(self, offer: Offer, event: str | None = None) -> None:
        """Wait until nothing is in the way; then take the step `event`, if one is given and it is not taken yet."""
        try:
            while (obstacle := self._obstacle(offer)) is not None:
                assert self._gate is not None
                self._journal.count_hold(obstacle.event == "hold")
                await self._journal.enter(obstacle.event, None, offer, detail=obstacle.reason)
                reach("updater.waiting")
                await self._gate.changed(obstacle)
        finally:
            self._journal.count_hold(False)
        if event is not None and not (event == "go" and self._journal.progress.state == "preparing"):
            await self._journal.enter(event, None, offer)

    def _deadline(self, state: str) -> float:
        return self._settings().deadlines.get(state, DEADLINES[state])

    def _probation(self) -> Probation:
        return self._fixed_probation or Probation(seconds=self._settings().probation_seconds)
