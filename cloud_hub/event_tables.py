"""The tables of the inbox: events, what recognises their repetitions, counts, dead letters, alarms."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Index, Integer, LargeBinary, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from cloud_hub.tables import Table

NUMBERED = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite numbers rows by itself only for a key of exactly this type."""


class EventRow(Table):
    """An event of a node. `position`: the order of arrival, for pages. `seq`: its number in the node's outbox. `at`: by the
    node's clock. An event past its time whose repetition may still come keeps its row without its `body`."""

    __tablename__ = "events"
    position: Mapped[int] = mapped_column(NUMBERED, primary_key=True, autoincrement=True)
    node: Mapped[str]
    id: Mapped[str]
    kind: Mapped[str]
    priority: Mapped[int]
    seq: Mapped[int]
    at: Mapped[float]
    received: Mapped[float]
    body: Mapped[bytes] = mapped_column(LargeBinary)
    __table_args__ = (
        UniqueConstraint("node", "id", name="uq_events_node"),
        Index("ix_events_kind", "kind", "position"),
        Index("ix_events_received", "received"),
    )


class EventStreamRow(Table):
    """Where a node's outbox stands; see `cloud_hub.watermark`."""

    __tablename__ = "event_streams"
    node: Mapped[str] = mapped_column(primary_key=True)
    boot: Mapped[str]
    starts: Mapped[int]
    low: Mapped[int]
    past: Mapped[list[str]] = mapped_column(JSON)


class EventCountRow(Table):
    """Of one node and kind: events received, repetitions of them, and what could not be taken as an event."""

    __tablename__ = "event_counts"
    node: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    received: Mapped[int] = mapped_column(default=0)
    duplicates: Mapped[int] = mapped_column(default=0)
    dead_letters: Mapped[int] = mapped_column(default=0)


class DeadLetterRow(Table):
    """What a node sent that is no event. `head`: its first bytes."""

    __tablename__ = "dead_letters"
    position: Mapped[int] = mapped_column(NUMBERED, primary_key=True, autoincrement=True)
    node: Mapped[str]
    at: Mapped[float]
    reason: Mapped[str]
    head: Mapped[bytes] = mapped_column(LargeBinary)
    __table_args__ = (Index("ix_dead_letters_node", "node", "position"),)


class AlarmRow(Table):
    """The newest that a node said about one of its alarms. `since`: by the node's clock."""

    __tablename__ = "alarms"
    node: Mapped[str] = mapped_column(primary_key=True)
    alarm: Mapped[str] = mapped_column(primary_key=True)
    raised: Mapped[bool]
    text: Mapped[str]
    since: Mapped[float]
    seq: Mapped[int]
