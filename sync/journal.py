"""How far the newest verified document of one kind has got: on the disk first, then here, then in the report."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from sync.activation import Offer, reopen
from sync.clock import Clock
from sync.errors import StoreFailed
from sync.messages import DocumentReport
from sync.state import Progress, StateStore
from sync.states import step

MAX_ERROR_TEXT = 1_000
"""Characters of a reason that travel in a report: an engine's message may quote a whole model."""
REPEATED = ("hold", "window", "started")
"""Events that change nothing when they come again with the same reason."""

log = logging.getLogger(__name__)


class Journal:
    """`on_report(kind, report)` is called at every change. `current()`: what is in force, None = nothing."""

    def __init__(
        self,
        kind: str,
        scope: str,
        *,
        state: StateStore,
        clock: Clock,
        on_report: Callable[[str, DocumentReport], None],
        current: Callable[[], Offer | None],
    ) -> None:
        self.progress = state.progress(kind, scope) or Progress("idle")
        self._name = (kind, scope)
        self._disk = state
        self._clock = clock
        self._on_report = on_report
        self._current = current
        self._seen = state.floor(kind, scope).revision
        self._aside: str | None = None
        self._held_since: float | None = None
        self._entering = asyncio.Lock()

    @property
    def report(self) -> DocumentReport:
        progress, active = self.progress, self._current()
        return DocumentReport(
            revision=max(self._seen, progress.revision),
            applied=0 if active is None else active.document.revision,
            state=progress.state if self._aside is None else "refused",
            digest="" if active is None else active.verified.digest,
            error=progress.error if self._aside is None else self._aside[:MAX_ERROR_TEXT],
            at=progress.since,
            detail=progress.detail,
            attempts=progress.attempts,
        )

    def say(self) -> None:
        self._on_report(self._name[0], self.report)

    def put_aside(self, refusal: str | None) -> None:
        """Tell of bytes that nobody vouches for, without writing; None = tell of the document again."""
        self._aside = refusal
        self.say()

    # --- steps --------------------------------------------------------------------------------------------------

    async def enter(
        self, event: str, error: str | None = None, offer: Offer | None = None, *, detail: str | None = None
    ) -> None:
        """Take one step of the table: on the disk, then here, then in the report. Raises ImpossibleStep, StoreFailed."""
        async with self._entering:  # the version in force and the next one take theirs side by side
            await self._take(event, error, offer, detail)

    async def heard(self, event: str, error: str | None, offer: Offer, detail: str | None) -> None:
        """A step of the version in force: of the newest document, or else only the report is refreshed."""
        async with self._entering:
            if offer.verified.digest == self.progress.digest:
                await self._take(event, error, offer, detail)
            else:
                # It must not hide how far the next one has got.
                self.say()

    async def at_once(self, offer: Offer, put: Callable[[Progress], Awaitable[None]]) -> None:
        """All steps of a document in one: `put` records the last one together with what makes the document active."""
        async with self._entering:
            digest = offer.verified.digest
            attempts = self.progress.attempts if digest == self.progress.digest else 0
            applied = Progress("applied", offer.document.revision, digest, self._clock.wall(), attempts)
            await put(applied)
            self._is_now(applied)

    async def mistake(self, error: Exception) -> None:
        """Never raises: what calls it is the last resort."""
        try:
            await self.enter("failed", f"error: {error}")
        except Exception:
            log.exception("the %s updater could not even say that it failed", self._name[0])

    async def pick_up(self) -> None:
        """Make what the disk says of the newest document agree with what it says of the stored ones."""
        slots = await asyncio.to_thread(self._disk.slots, *self._name)
        condemned, reason = self._disk.condemned(*self._name)
        progress = self.progress
        if progress.digest and progress.digest == condemned and progress.state != "rolled_back":
            await self.enter("bad", reason)
        if slots.active is None:
            active = None
        else:
            active = reopen(slots.active)
            if progress.state == "idle":
                self.progress = replace(progress, digest=active.verified.digest, revision=active.document.revision)
        in_force = active is not None and active.verified.digest == progress.digest
        if progress.state == "committing" and not in_force:
            await self.enter("resumed")
        if progress.state == "held":
            # Holding went on while nobody counted.
            held = progress.held + max(0.0, self._clock.wall() - progress.since)
            self.progress = replace(progress, held=held)

    async def _take(self, event: str, error: str | None, offer: Offer | None, detail: str | None) -> None:
        old = self.progress
        state = step(old.state, event)
        if (state, error, detail) == (old.state, old.error, old.detail) and event in REPEATED:
            self.say()
            return
        digest, revision = (
            (old.digest, old.revision) if offer is None else (offer.verified.digest, offer.document.revision)
        )
        same = digest == old.digest
        new = Progress(
            state,
            revision,
            digest,
            old.since if same and state == old.state and event != "hold" else self._clock.wall(),
            (old.attempts if same else 0) + (event == "failed"),
            old.held if same else 0.0,
            None if error is None else error[:MAX_ERROR_TEXT],
            None if detail is None else detail[:MAX_ERROR_TEXT],
        )
        if new != old:  # what is sent again and again wears no disk
            await self._record(new)
        self._is_now(new)

    def _is_now(self, progress: Progress) -> None:
        self.progress, self._aside = progress, None
        self._seen = max(self._seen, progress.revision)
        self.say()

    async def _record(self, progress: Progress) -> None:
        """A disk that refuses stops what would begin; what is over is over."""
        writing = asyncio.ensure_future(asyncio.to_thread(self._disk.record, *self._name, progress))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # A write that comes late would overwrite what whoever takes our place has written.
            await asyncio.wait({writing})
            raise
        except StoreFailed as error:
            if progress.state in ("verifying", "fetching", "preparing", "committing"):
                raise
            log.warning("state %s of %s could not be recorded: %s", progress.state, self._name[0], error)

    # --- holds --------------------------------------------------------------------------------------------------

    @property
    def held(self) -> float:
        """Seconds that holds have delayed the document, with the one that counts just now."""
        since = self._held_since
        return self.progress.held + (0.0 if since is None else self._clock.monotonic() - since)

    def count_hold(self, holding: bool) -> None:
        """From now on a hold counts, or none does."""
        self.progress = replace(self.progress, held=self.held)
        self._held_since = self._clock.monotonic() if holding else None
