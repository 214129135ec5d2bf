"""The inbox's queries within one open transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec
from sqlalchemy import ColumnElement, Integer, delete, func, select, update
from sqlalchemy.orm import Session

from cloud_hub.event_tables import AlarmRow, DeadLetterRow, EventCountRow, EventRow, EventStreamRow
from cloud_hub.watermark import Stream
from sync.errors import Malformed
from sync.events import Event

MAX_DEAD_LETTERS = 100
"""Kept of one node, the newest; the count goes on."""
HEAD_BYTES = 512
MAX_KINDS = 128
"""Kinds counted one by one for each node; an outbox has at most 64. Those beyond are counted together."""
OTHER = "(other)"
MAX_ALARMS = 256
"""Names of alarms of one node."""
WEIGHT_BYTES = 4 * 1024
"""An event counts once for each of these that its body begins: what is kept is bounded in bytes too."""
MAX_IDS = 200_000
"""Events of one node that are remembered at all: twice what its outbox holds. A node may claim that everything still waits."""

_WEIGHT = 1 + func.length(EventRow.body, type_=Integer) // WEIGHT_BYTES


class Arrived(msgspec.Struct, frozen=True):
    """An event as the hub has it. `received`: Unix seconds by the hub's clock, `at` by the node's."""

    position: int
    node: str
    id: str
    kind: str
    priority: int
    at: float
    received: float
    body: bytes


class Counts(msgspec.Struct, frozen=True):
    received: int = 0
    duplicates: int = 0
    dead_letters: int = 0


class DeadLetter(msgspec.Struct, frozen=True):
    at: float
    reason: str
    head: bytes


class Alarm(msgspec.Struct, frozen=True):
    node: str
    alarm: str
    raised: bool
    text: str
    since: float


class EventRecords:
    def __init__(self, session: Session) -> None:
        self._session = session

    # --- taking in ---

    def stream(self, node: str) -> Stream | None:
        row = self._session.get(EventStreamRow, node)
        return Stream(row.boot, row.starts, row.low, tuple(row.past)) if row else None

    def put_stream(self, node: str, stream: Stream) -> None:
        self._session.merge(
            EventStreamRow(node=node, boot=stream.boot, starts=stream.starts, low=stream.low, past=list(stream.past))
        )

    def known(self, node: str, ids: Collection[str]) -> set[str]:
        """Those of `ids` that are here already."""
        query = select(EventRow.id).where(EventRow.node == node, EventRow.id.in_(ids))
        return set(self._session.scalars(query))

    def add(self, node: str, event: Event, received: float) -> None:
        self._session.add(
            EventRow(
                node=node,
                id=event.id,
                kind=event.kind,
                priority=event.priority,
                seq=event.seq,
                at=event.at,
                received=received,
                body=event.body,
            )
        )

    def count(self, counts: Mapping[tuple[str, str, str], int]) -> None:
        """`counts`: (node, kind, what) -> how many more; `what`: received, duplicates or dead_letters."""
        for (node, kind, what), count in counts.items():
            row = self._count_row(node, kind)
            setattr(row, what, getattr(row, what) + count)
            self._session.flush()

    def _count_row(self, node: str, kind: str) -> EventCountRow:
        row = self._session.get(EventCountRow, (node, kind))
        if row is None and kind != OTHER:
            rows = select(func.count()).select_from(EventCountRow).where(EventCountRow.node == node)
            if (self._session.scalar(rows) or 0) >= MAX_KINDS:
                return self._count_row(node, OTHER)
        if row is None:
            row = EventCountRow(node=node, kind=kind, received=0, duplicates=0, dead_letters=0)
            self._session.add(row)
        return row

    def add_dead_letter(self, node: str, at: float, reason: str, content: bytes) -> None:
        self._session.add(DeadLetterRow(node=node, at=at, reason=reason[:200], head=content[:HEAD_BYTES]))
        self._session.flush()
        newest = (
            select(DeadLetterRow.position)
            .where(DeadLetterRow.node == node)
            .order_by(DeadLetterRow.position.desc())
            .limit(1)
            .offset(MAX_DEAD_LETTERS)
        )
        self._session.execute(
            delete(DeadLetterRow).where(DeadLetterRow.node == node, DeadLetterRow.position <= newest.scalar_subquery())
        )

    def set_alarm(self, node: str, alarm: str, raised: bool, text: str, event: Event) -> None:
        """Unless something newer is known: repetitions may overtake each other. Raises Malformed when there are too many."""
        row = self._session.get(AlarmRow, (node, alarm))
        if row is not None and event.seq < row.seq and event.at <= row.since:
            return
        if row is None:
            rows = select(func.count()).select_from(AlarmRow).where(AlarmRow.node == node)
            if (self._session.scalar(rows) or 0) >= MAX_ALARMS:
                raise Malformed(f"alarm: the node has {MAX_ALARMS} alarms already")
        self._session.merge(AlarmRow(node=node, alarm=alarm, raised=raised, text=text, since=event.at, seq=event.seq))
        self._session.flush()

    # --- reading ---

    def page(self, limit: int, after: int = 0, node: str | None = None, kind: str | None = None) -> list[Arrived]:
        """In order of arrival, after position `after`."""
        query = select(EventRow).where(EventRow.position > after).order_by(EventRow.position).limit(limit)
        if node is not None:
            query = query.where(EventRow.node == node)
        if kind is not None:
            query = query.where(EventRow.kind == kind)
        return [
            Arrived(row.position, row.node, row.id, row.kind, row.priority, row.at, row.received, row.body)
            for row in self._session.scalars(query)
        ]

    def counts(self, node: str) -> dict[str, Counts]:
        """By kind; "" is what was too broken to have one."""
        query = select(EventCountRow).where(EventCountRow.node == node).order_by(EventCountRow.kind)
        return {
            row.kind: Counts(row.received, row.duplicates, row.dead_letters) for row in self._session.scalars(query)
        }

    def dead_letters(self, node: str) -> list[DeadLetter]:
        """Newest first."""
        query = select(DeadLetterRow).where(DeadLetterRow.node == node).order_by(DeadLetterRow.position.desc())
        return [DeadLetter(row.at, row.reason, row.head) for row in self._session.scalars(query)]

    def alarms(self, node: str | None = None) -> list[Alarm]:
        """Those that are raised."""
        query = select(AlarmRow).where(AlarmRow.raised).order_by(AlarmRow.node, AlarmRow.alarm)
        if node is not None:
            query = query.where(AlarmRow.node == node)
        return [Alarm(row.node, row.alarm, row.raised, row.text, row.since) for row in self._session.scalars(query)]

    # --- forgetting ---

    def crowded(self, most: int) -> dict[str, tuple[int, int]]:
        """Nodes with more than their share of `most` -> the positions up to which their events, and their ids, are too many."""
        query = select(EventRow.node, func.sum(_WEIGHT), func.count()).group_by(EventRow.node)
        found = {node: (int(weight), int(rows)) for node, weight, rows in self._session.execute(query)}
        share = fair_share([weight for weight, _ in found.values()], most)
        return {
            node: (
                0 if share is None or weight <= share else self._last_beyond(node, share),
                0 if rows <= MAX_IDS else self._last_id_beyond(node),
            )
            for node, (weight, rows) in found.items()
            if rows > MAX_IDS or (share is not None and weight > share)
        }

    def _last_beyond(self, node: str, share: int) -> int:
        newer = func.sum(_WEIGHT).over(order_by=EventRow.position.desc()).label("newer")
        mine = select(EventRow.position, newer).where(EventRow.node == node).subquery()
        return self._session.scalar(select(func.max(mine.c.position)).where(mine.c.newer > share)) or 0

    def _last_id_beyond(self, node: str) -> int:
        mine = select(EventRow.position).where(EventRow.node == node).order_by(EventRow.position.desc())
        return self._session.scalar(mine.limit(1).offset(MAX_IDS)) or 0

    def prune_received_before(self, before: float, limit: int) -> bool:
        """Forget events received before `before` (Unix seconds), `limit` at a time; whether there may be more.

        One whose repetition may still come loses its body and keeps its id: see `cloud_hub.watermark`.
        """
        return self._prune(EventRow.received < before, limit)

    def prune_node(self, node: str, last: int, last_id: int, limit: int) -> bool:
        """Forget a node's events up to position `last` likewise, and those up to `last_id` with their ids."""
        mine = EventRow.node == node
        ids = list(
            self._session.scalars(select(EventRow.position).where(mine, EventRow.position <= last_id).limit(limit))
        )
        self._session.execute(delete(EventRow).where(EventRow.position.in_(ids)))
        return self._prune(mine & (EventRow.position <= last), limit) or len(ids) == limit

    def _prune(self, old: ColumnElement[bool], limit: int) -> bool:
        settled = (
            select(EventRow.position)
            .join(EventStreamRow, EventStreamRow.node == EventRow.node)
            .where(old, EventRow.seq < EventStreamRow.low)
            .limit(limit)
        )
        gone = list(self._session.scalars(settled))
        self._session.execute(delete(EventRow).where(EventRow.position.in_(gone)))
        unsettled = list(self._session.scalars(select(EventRow.position).where(old, EventRow.body != b"").limit(limit)))
        self._session.execute(update(EventRow).where(EventRow.position.in_(unsettled)).values(body=b""))
        return limit in (len(gone), len(unsettled))


def fair_share(weights: Collection[int], most: int) -> int | None:
    """The largest share that all may have so that together they have at most `most`; None = everybody keeps everything."""
    left = most
    for index, weight in enumerate(sorted(weights)):
        takers = len(weights) - index
        if weight * takers > left:
            return left // takers
        left -= weight
    return None
