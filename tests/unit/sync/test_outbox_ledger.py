"""Whatever is put in, acknowledged, refused, expired, dropped or interrupted: the ledger balances and the order holds."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sync.ledger import Ledger, Stream, ledger_of
from sync.outbox_policy import Quota
from sync.outbox_store import Change, Entry, OutboxStore, read_ledger

KINDS = ("alarm", "app.a", "app.b")


class OutboxMachine(RuleBasedStateMachine):
    """The store beside a model of it: a list of what waits and counters made by the model's own reckoning."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.now = 1_800_000_000.0
        self.number = 0
        self.waiting: list[tuple[Entry, float | None]] = []
        self.counts: dict[str, int] = {}
        self.flying: dict[str, int] = {}

    @initialize(rows=st.integers(1, 12), size=st.integers(1_000, 6_000))
    def start(self, rows: int, size: int) -> None:
        self.quota = Quota(size, rows)
        self.store = self.opened()

    def opened(self) -> OutboxStore:
        return OutboxStore(self.folder / "outbox.db", self.quota, wall=self.now, monotonic=self.now)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def apply(self, change: Change) -> None:
        self.store.apply(change, wall=self.now, monotonic=self.now)

    def numbers(self) -> list[int]:
        return list(self.flying.values())

    def end(self, what: str, ids: set[str]) -> None:
        self.counts[what] = self.counts.get(what, 0) + sum(entry.id in ids for entry, _ in self.waiting)
        self.waiting = [(entry, expires) for entry, expires in self.waiting if entry.id not in ids]
        self.flying = {id_: seq for id_, seq in self.flying.items() if id_ not in ids}

    def expire_and_make_room(self) -> None:
        past = {entry.id for entry, expires in self.waiting if expires is not None and expires <= self.now}
        self.end("expired", past - set(self.flying))
        while self.waiting and self.quota.exceeded(sum(entry.size for entry, _ in self.waiting), len(self.waiting)):
            worth = sorted(
                (entry.id in self.flying, entry.last, entry.priority, place)
                for place, (entry, _) in enumerate(self.waiting)
            )
            self.end("dropped", {self.waiting[worth[0][3]][0].id})

    @rule(
        batch=st.lists(
            st.tuples(
                st.sampled_from(KINDS),
                st.integers(0, 9),
                st.integers(0, 900),
                st.one_of(st.none(), st.integers(1, 50)),
            ),
            max_size=6,
        ),
        lost=st.integers(0, 2),
    )
    def put(self, batch: list[tuple[str, int, int, int | None]], lost: int) -> None:
        entries = []
        for kind, priority, size, ttl in batch:
            self.number += 1
            last = kind == "alarm"
            entries.append(Entry(f"id{self.number}", kind, bytes(size), priority, last, self.now, ttl))
        self.apply(Change(entries, lost={("app.a", "disk"): lost} if lost else {}, flying=self.numbers()))
        self.waiting += [(entry, None if entry.ttl is None else self.now + entry.ttl) for entry in entries]
        self.counts["enqueued"] = self.counts.get("enqueued", 0) + len(entries) + lost
        self.counts["dropped"] = self.counts.get("dropped", 0) + lost
        self.expire_and_make_room()

    @rule(limit=st.integers(1, 8))
    def send(self, limit: int) -> None:
        events = self.store.waiting(limit, self.numbers(), self.now).events
        worth = sorted(
            (-entry.priority, place)
            for place, (entry, expires) in enumerate(self.waiting)
            if entry.id not in self.flying and (expires is None or expires > self.now)
        )
        assert [event.id for event in events] == [self.waiting[place][0].id for _, place in worth[:limit]]
        self.flying |= {event.id: event.seq for event in events}

    @rule(share=st.floats(0, 1), refuse=st.booleans(), twice=st.booleans())
    def acknowledge(self, share: float, refuse: bool, twice: bool) -> None:
        ids = sorted(self.flying)[: int(share * len(self.flying) + 0.5)]
        for _ in range(1 + twice):
            change = Change(refused=dict.fromkeys(ids, "x")) if refuse else Change(delivered=ids)
            self.apply(Change(delivered=change.delivered, refused=change.refused, flying=self.numbers()))
        self.end("dropped" if refuse else "delivered", set(ids))
        self.expire_and_make_room()

    @rule(seconds=st.integers(1, 40))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def restart(self) -> None:
        """As after kill -9: what was under way is not known any more."""
        self.store.close()
        self.flying.clear()
        self.store = self.opened()

    @rule()
    def failed_transaction(self) -> None:
        """Two events with one id cannot be: the whole transaction is undone, ledger included."""
        twin = Entry("twin", "app.a", b"", 5, False, self.now, None)
        gone = [entry.id for entry, _ in self.waiting]
        with pytest.raises(Exception, match="UNIQUE"):
            self.apply(Change([twin, twin], delivered=gone))

    @invariant()
    def balances(self) -> None:
        if not hasattr(self, "store"):
            return
        on_disk = read_ledger(self.folder / "outbox.db")
        counters, pending = self.store.snapshot()
        rows = [(*key, count) for key, count in counters.items()]
        assert on_disk == ledger_of(rows, pending)
        assert on_disk.imbalance == {}
        total = on_disk.total()
        assert total.pending == len(self.waiting) == self.store.rows
        assert self.store.size == sum(entry.size for entry, _ in self.waiting)
        found = {
            "enqueued": total.enqueued,
            "delivered": total.delivered,
            "expired": total.expired,
            "dropped": sum(total.dropped.values()),
        }
        assert found == {name: self.counts.get(name, 0) for name in found}


TestOutboxMachine = OutboxMachine.TestCase
TestOutboxMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_ledger_that_misses_an_event_says_how_many() -> None:
    ledger = Ledger({"app.a": Stream(10, 6, 1, {"quota": 1}, 1), "app.b": Stream(3, 3)})
    assert ledger.imbalance == {"app.a": 1}
    assert ledger.total() == Stream(13, 9, 1, {"quota": 1}, 1)
