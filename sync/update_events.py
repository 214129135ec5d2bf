"""The updaters' outcomes as events: what the retained report says now, these say once for each time it happened.

A start tells the last outcome once more, with the same `at`: a node that died before the outbox had it would else keep it to
itself.
"""

from __future__ import annotations

import logging
from typing import Protocol

import msgspec

from sync.errors import Malformed
from sync.events import UPDATE
from sync.messages import DocumentReport

OUTCOMES = ("applied", "refused", "rolled_back", "failed")
"""States worth an event. The ones in between say how far an update has got, which nobody asks for afterwards."""

log = logging.getLogger(__name__)


class Offers(Protocol):
    """An outbox, as far as it is needed here."""

    def offer(self, kind: str, body: bytes) -> None: ...


class UpdateEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Body of an event of kind `update`. The fields are those of `DocumentReport`; `document` is its kind."""

    document: str
    state: str
    revision: int
    applied: int
    digest: str
    error: str | None
    at: float


class UpdateEvents:
    """Call it as `on_report`. A failure that repeats itself, as one does while the network is gone, is one event."""

    def __init__(self, outbox: Offers) -> None:
        self._outbox = outbox
        self._last: dict[str, tuple[object, ...]] = {}

    def __call__(self, kind: str, report: DocumentReport) -> None:
        if report.state not in OUTCOMES:
            return
        key = (report.state, report.revision, report.digest, report.error)
        if self._last.get(kind) == key:
            return
        self._last[kind] = key
        body = UpdateEvent(
            document=kind,
            state=report.state,
            revision=report.revision,
            applied=report.applied,
            digest=report.digest,
            error=report.error,
            at=report.at,
        )
        try:
            self._outbox.offer(UPDATE, msgspec.json.encode(body))
        except Malformed:
            log.exception("an update event could not be made")
