"""What is put in is on the disk when `put` returns; what the hub has is removed; what is lost is counted, and the disk's
failures end nothing."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sync import outbox as outbox_module
from sync.errors import Malformed, StoreFailed
from sync.events import MAX_BODY_BYTES, Ack, Event, decode_ack, unpack, unpack_event
from sync.messages import encode
from sync.outbox import Outbox
from sync.outbox_policy import MAX_KINDS, KindPolicy, OutboxPolicy, Quota
from sync.outbox_sender import Sender
from sync.outbox_store import Change, Damaged, Entry, OutboxStore, read_ledger
from sync.testing import FakeClock, MemoryBroker, MemoryLink
from sync.topics import up

NODE = "acme.edge-1"
TOPIC = up(NODE, "event")


class Site:
    """An outbox in a folder, a broker, and a hub played by the test."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "outbox.db"
        self.clock, self.broker = FakeClock(), MemoryBroker()
        self.policy = OutboxPolicy()

    @asynccontextmanager
    async def outbox(self) -> AsyncIterator[Outbox]:
        async with Outbox(self.path, clock=self.clock, policy=self.policy, uniform=lambda low, high: low) as outbox:
            yield outbox

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[tuple[Outbox, MemoryLink, Sender]]:
        async with self.outbox() as outbox, MemoryLink(self.broker) as link:
            sender = Sender(outbox, link, NODE, self.clock, uniform=lambda low, high: low)
            task = asyncio.create_task(sender.run())
            yield outbox, link, sender
            task.cancel()
            await asyncio.wait({task})

    def sent(self) -> list[Event]:
        return [unpack_event(raw) for data in self.broker.payloads(TOPIC) for raw in unpack(data).events]

    def bodies(self) -> list[bytes]:
        return [event.body for event in self.sent()]

    async def when(self, ready: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not ready():
                await asyncio.sleep(0.001)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def acked(*events: Event) -> bytes:
    return encode(Ack(ids=tuple(event.id for event in events)))


async def test_what_was_put_is_on_the_disk_when_put_returns(site: Site) -> None:
    async with site.outbox() as outbox:
        await outbox.put("app.door", b"open")
        assert read_ledger(site.path).streams["app.door"].pending == 1  # seen by another connection


async def test_many_puts_share_one_transaction(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = 0
    apply = OutboxStore.apply

    def counted(self: OutboxStore, *args: object, **kwargs: object) -> object:
        nonlocal commits
        commits += 1
        return apply(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(OutboxStore, "apply", counted)
    async with site.outbox() as outbox:
        ids = await asyncio.gather(*(outbox.put("app.x", b"%d" % number) for number in range(300)))
    assert len(set(ids)) == 300
    assert commits <= 3


async def test_events_go_up_by_priority_and_in_order_within_one_and_leave_the_disk_on_acknowledgement(
    site: Site,
) -> None:
    async with site.sending() as (outbox, link, _):
        link.drop()
        for number in range(3):
            for priority in (2, 7):
                await outbox.put("app.x", b"%d.%d" % (priority, number), priority=priority)
        link.heal()
        await site.when(lambda: len(site.sent()) == 6)
        assert site.bodies() == [b"7.0", b"7.1", b"7.2", b"2.0", b"2.1", b"2.2"]
        outbox.acknowledge(acked(*site.sent()[:4]))
        await site.when(lambda: outbox.pending == 2)
        assert outbox.ledger().streams["app.x"].delivered == 4
        assert not outbox.ledger().imbalance


async def test_no_more_than_a_window_is_under_way(site: Site) -> None:
    async with site.sending() as (outbox, _, _):
        await asyncio.gather(*(outbox.put("app.x", b"%d" % number) for number in range(100)))
        await site.when(lambda: len(site.sent()) == 64)
        outbox.acknowledge(acked(*site.sent()[:10]))
        await site.when(lambda: len(site.sent()) == 74)
        assert outbox.resent == 0


async def test_what_is_not_acknowledged_is_sent_again_after_four_seconds_and_then_more_seldom(site: Site) -> None:
    async with site.sending() as (outbox, _, _):
        await outbox.put("app.x", b"1")
        await site.when(lambda: len(site.sent()) == 1 and site.clock.sleepers > 0)
        for wait, expected in ((3.9, 1), (0.2, 2), (7.8, 2), (0.3, 3)):
            site.clock.advance(wait)
            await site.when(lambda expected=expected: len(site.sent()) == expected and site.clock.sleepers > 0)  # type: ignore[misc]
        assert outbox.resent == 2


async def test_an_acknowledged_event_is_never_sent_again(site: Site) -> None:
    async with site.sending() as (outbox, _, _):
        await outbox.put("app.x", b"1")
        await site.when(lambda: len(site.sent()) == 1)
        outbox.acknowledge(acked(*site.sent()))
        await site.when(lambda: outbox.pending == 0)
        site.clock.advance(1_000)
        await outbox.put("app.x", b"2")
        await site.when(lambda: len(site.sent()) == 2)
        assert site.bodies() == [b"1", b"2"]


async def test_a_hub_that_starts_again_is_told_at_once_what_it_missed(site: Site) -> None:
    async with site.sending() as (outbox, _, sender):
        await outbox.put("app.x", b"1")
        await site.when(lambda: len(site.sent()) == 1 and site.clock.sleepers > 0)
        for wait in (4.1, 8.1, 16.1, 32.1):
            before = len(site.sent())
            site.clock.advance(wait)
            await site.when(lambda before=before: len(site.sent()) > before and site.clock.sleepers > 0)  # type: ignore[misc]
        sender.hub_started()
        await asyncio.sleep(0.01)
        site.clock.advance(4.1)
        await site.when(lambda: len(site.sent()) == 6)


async def test_what_waits_survives_a_restart_and_keeps_its_id(site: Site) -> None:
    async with site.outbox() as outbox:
        id_ = await outbox.put("app.x", b"1")
    async with site.sending() as (outbox, _, _):
        await site.when(lambda: len(site.sent()) == 1)
        assert site.sent()[0].id == id_
        packet = unpack(site.broker.payloads(TOPIC)[0])
        assert (packet.starts, packet.low) == (2, 1)


async def test_low_says_below_which_number_nothing_waits_any_more(site: Site) -> None:
    async with site.sending() as (outbox, _, _):
        for number in range(3):
            await outbox.put("app.x", b"%d" % number)
        await site.when(lambda: len(site.sent()) == 3)
        outbox.acknowledge(acked(*site.sent()[:2]))
        await site.when(lambda: outbox.pending == 1)
        await outbox.put("app.x", b"3")
        await site.when(lambda: len(site.sent()) == 4)
        assert unpack(site.broker.payloads(TOPIC)[-1]).low == 3


async def test_an_event_past_its_time_is_expired_not_sent(site: Site) -> None:
    async with site.sending() as (outbox, link, _):
        link.drop()
        await outbox.put("app.x", b"stale", ttl=30)
        await outbox.put("app.x", b"fresh")
        site.clock.advance(31)
        link.heal()
        await site.when(lambda: site.bodies() == [b"fresh"] and site.clock.sleepers > 0)
        site.clock.advance(60)
        await site.when(lambda: outbox.ledger().streams["app.x"].expired == 1)
        assert not outbox.ledger().imbalance


async def test_an_event_past_its_time_is_not_repeated_and_makes_room_for_others(site: Site) -> None:
    site.policy = OutboxPolicy(window=1)
    async with site.sending() as (outbox, _, _):
        await outbox.put("app.x", b"stale", ttl=10)
        await site.when(lambda: site.bodies() == [b"stale"])
        await outbox.put("app.x", b"fresh")
        await site.when(lambda: site.clock.sleepers > 0)
        for _ in range(3):
            site.clock.advance(11)
            await asyncio.sleep(0.01)
        await site.when(lambda: b"fresh" in site.bodies())
        assert site.bodies().count(b"stale") == 1
        outbox.sweep()
        await site.when(lambda: outbox.totals()["expired"] == 1)
        assert not outbox.ledger().imbalance


async def test_a_backlog_goes_out_no_faster_than_a_hub_takes_it(site: Site) -> None:
    async with site.sending() as (outbox, _, _):
        await asyncio.gather(*(outbox.put("app.x", bytes(40_000)) for _ in range(40)))
        await site.when(lambda: len(site.sent()) == 40)
        outbox.acknowledge(acked(*site.sent()))
        await site.when(lambda: outbox.pending == 0)
        await outbox.put("app.x", b"later")
        await site.when(lambda: outbox.pending == 1 and site.clock.sleepers > 0)
        assert len(site.sent()) == 40
        site.clock.advance(3)
        await site.when(lambda: len(site.sent()) == 41)


@pytest.mark.parametrize(
    "walls", [[10.0], [1_400_000_000.0], [1_800_000_000.0, 10.0], [1_800_000_000.0, 1_790_000_000.0]]
)
def test_a_machine_without_a_battery_for_its_clock_expires_nothing_when_the_clock_is_set(
    tmp_path: Path, walls: list[float]
) -> None:
    """`walls`: of the clock at each start; at the last of them the event is put in, then the clock is set."""
    event = Entry("A" * 26, "app.x", b"1", 5, False, walls[-1], 3600.0)
    for number, wall in enumerate((*walls, 1_800_000_060.0), 1):
        store = OutboxStore(tmp_path / "outbox.db", Quota(), wall=wall, monotonic=0.0)
        store.apply(Change([event] if number == len(walls) else []), wall=wall + 1, monotonic=1.0)
        assert store.rows == (number >= len(walls))
        store.close()


async def test_a_clock_that_is_set_expires_nothing(site: Site) -> None:
    async with site.outbox() as outbox:
        await outbox.put("app.x", b"1", ttl=60)
        site.clock._wall += 400 * 86_400
        await outbox.put("app.x", b"2", ttl=60)
        assert outbox.ledger().streams["app.x"].expired == 0


async def test_time_that_passed_while_the_node_was_off_counts(site: Site) -> None:
    async with site.outbox() as outbox:
        await outbox.put("app.x", b"1", ttl=60)
    site.clock.advance(61)
    async with site.outbox() as outbox:
        await outbox.put("app.x", b"2")
        assert outbox.ledger().streams["app.x"].expired == 1


async def test_above_the_quota_the_oldest_of_the_lowest_priority_go_and_protected_kinds_last(site: Site) -> None:
    site.policy = OutboxPolicy(Quota(rows=4), {"alarm": KindPolicy(0, None, last=True)})
    async with site.outbox() as outbox:
        await outbox.put("alarm", b"a")
        for number in range(3):
            await outbox.put("app.low", b"%d" % number, priority=1)
        await outbox.put("app.high", b"h", priority=9)
        streams = outbox.ledger().streams
        assert (streams["app.low"].dropped, streams["app.low"].pending) == ({"quota": 1}, 2)
        assert streams["alarm"].pending == 1
        found = await outbox.fetch(10)
        assert [event.body for event in found.events] == [b"h", b"1", b"2", b"a"]
        with pytest.raises(StoreFailed, match="worth more"):
            await outbox.put("app.low", b"least", priority=0)
        assert not outbox.ledger().imbalance


async def test_the_quota_in_bytes_holds_too(site: Site) -> None:
    site.policy = OutboxPolicy(Quota(bytes=10_000))
    async with site.outbox() as outbox:
        for _ in range(30):
            await outbox.put("app.x", bytes(1_000))
        assert outbox.size <= 10_000
        assert outbox.pending == 8


async def test_what_is_under_way_is_dropped_last_because_the_hub_may_have_it(site: Site) -> None:
    site.policy = OutboxPolicy(Quota(rows=3), window=2)
    async with site.sending() as (outbox, _, _):
        for number in range(3):
            await outbox.put("app.x", b"%d" % number)
        await site.when(lambda: len(site.sent()) == 2)
        await outbox.put("app.x", b"3")
        outbox.acknowledge(acked(*site.sent()))
        await site.when(lambda: outbox.ledger().streams["app.x"].delivered == 2)
        assert outbox.ledger().streams["app.x"].dropped == {"quota": 1}


async def test_what_the_hub_refuses_for_good_is_dropped_and_counted(site: Site) -> None:
    async with site.outbox() as outbox:
        id_ = await outbox.put("app.x", b"1")
        outbox.acknowledge(encode(Ack(refused={id_: "malformed"})))
        await site.when(lambda: outbox.pending == 0)
        assert outbox.ledger().streams["app.x"].dropped == {"refused": 1}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"kind": "App X"}, "kind"),
        ({"body": bytes(MAX_BODY_BYTES + 1)}, "body"),
        ({"priority": 10}, "priority"),
        ({"ttl": 0.0}, "ttl"),
    ],
)
async def test_bad_input_names_the_field_and_enqueues_nothing(
    site: Site, arguments: dict[str, object], names: str
) -> None:
    async with site.outbox() as outbox:
        with pytest.raises(Malformed, match=names):
            await outbox.put(**{"kind": "app.x", "body": b"", **arguments})  # type: ignore[arg-type]
        await outbox.put("app.x", bytes(MAX_BODY_BYTES))
        assert outbox.ledger().total().enqueued == 1


async def test_an_application_with_many_kinds_leaves_room_for_alarms_and_updates(site: Site) -> None:
    async with site.outbox() as outbox:
        for number in range(MAX_KINDS):
            await outbox.put(f"app.{number}", b"")
        await outbox.put("alarm", b"")
        await outbox.put("update", b"")
        with pytest.raises(Malformed, match="at most"):
            outbox.offer("app.more", b"")


async def test_kinds_are_bounded(site: Site) -> None:
    async with site.outbox() as outbox:
        for number in range(MAX_KINDS):
            outbox.offer(f"app.{number}", b"")
        with pytest.raises(Malformed, match="at most"):
            outbox.offer("app.more", b"")


MANY = json.dumps({"ids": ["x"] * 2_000}).encode()


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff", b'{"ids":[1]}', MANY])
def test_a_senseless_acknowledgement_is_refused(payload: bytes) -> None:
    with pytest.raises(Malformed):
        decode_ack(payload)


def test_an_acknowledgement_of_a_later_release_is_read() -> None:
    assert decode_ack(b'{"v":9,"ids":["a"],"news":{"x":1}}').ids == ("a",)


class FullDisk:
    """Refuses every transaction while `full`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        apply = OutboxStore.apply

        def refusing(store: OutboxStore, *args: object, **kwargs: object) -> object:
            if self.full:
                raise StoreFailed("database or disk is full")
            return apply(store, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(OutboxStore, "apply", refusing)


async def test_a_full_disk_is_counted_told_once_and_recovered_from(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk(monkeypatch)
    async with site.sending() as (outbox, _, _):
        await outbox.put("app.x", b"before")
        await site.when(lambda: len(site.sent()) == 1)
        disk.full = True
        for _ in range(3):
            with pytest.raises(StoreFailed):
                await outbox.put("app.x", b"lost")
        outbox.offer("app.x", b"lost")
        outbox.acknowledge(acked(*site.sent()))
        await site.when(lambda: outbox.ledger().total().dropped == {"disk": 4})
        assert outbox.pending == 1  # the acknowledgement could not be written: it is asked for again
        disk.full = False
        await outbox.put("app.x", b"after")
        await site.when(lambda: b"after" in site.bodies())
        assert read_ledger(site.path).streams["app.x"].dropped == {"disk": 4}
        assert not read_ledger(site.path).imbalance
    assert [record.message for record in caplog.records if "dropped and counted" in record.message] != []
    assert len([record for record in caplog.records if "dropped and counted" in record.message]) == 1


async def test_a_disk_too_small_is_refused_by_sqlite_itself_and_the_rest_stays_readable(site: Site) -> None:
    async with site.outbox() as outbox:
        await outbox.put("app.x", bytes(1_000))
        assert outbox._store is not None
        pages = outbox._store._db.execute("PRAGMA page_count").fetchone()[0]
        outbox._store._db.execute(f"PRAGMA max_page_count={pages + 1}")
        with pytest.raises(StoreFailed, match="full"):
            await outbox.put("app.x", bytes(MAX_BODY_BYTES))
        outbox._store._db.execute("PRAGMA max_page_count=1000000")
        await outbox.put("app.x", bytes(MAX_BODY_BYTES))
        ledger = outbox.ledger()
        assert (ledger.total().pending, ledger.total().dropped) == (2, {"disk": 1})
        assert not ledger.imbalance


async def test_a_mistake_while_settling_leaves_the_event_to_be_sent_and_settled_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, mistakes = OutboxStore.apply, iter([MemoryError()])

    def failing(self: OutboxStore, *args: object, **kwargs: object) -> object:
        for mistake in mistakes:
            raise mistake
        return apply(self, *args, **kwargs)  # type: ignore[arg-type]

    async with site.sending() as (outbox, _, _):
        await outbox.put("app.x", b"1")
        await site.when(lambda: len(site.sent()) == 1)
        monkeypatch.setattr(OutboxStore, "apply", failing)
        outbox.acknowledge(acked(*site.sent()))
        await site.when(lambda: outbox._broken)
        site.clock.advance(5)
        await site.when(lambda: len(site.sent()) == 2)
        outbox.acknowledge(acked(*site.sent()))
        await site.when(lambda: outbox.pending == 0)


async def test_what_was_read_before_a_file_was_replaced_says_so(site: Site) -> None:
    async with site.outbox() as outbox:
        for _ in range(3):
            await outbox.put("app.x", b"1")
        found, before = await outbox.fetch(1), outbox.boot
        outbox._thread.submit(outbox._put_aside, Damaged("for the test")).result()
        await outbox.put("app.x", b"2")
        assert (found.boot, found.starts) == (before, 1)
        assert (await outbox.fetch(1)).boot == outbox.boot != before


@pytest.mark.parametrize("damage", [b"this is no database at all" * 200, b"SQLite format 3\0" + bytes(5_000)])
async def test_a_damaged_file_is_set_aside_said_loudly_and_counted(
    site: Site, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    site.path.write_bytes(damage)
    async with site.outbox() as outbox:
        await outbox.put("app.x", b"1")
        assert outbox.ledger().set_aside == 1
    assert site.path.with_name("outbox.db.damaged-1").read_bytes() == damage
    assert any("damaged" in record.message and record.levelname == "ERROR" for record in caplog.records)
    assert read_ledger(site.path).set_aside == 1


async def test_a_file_damaged_while_it_is_open_does_not_end_the_node(site: Site) -> None:
    async with site.sending() as (outbox, _, _):
        await outbox.put("app.x", bytes(20_000))
        await site.when(lambda: len(site.sent()) == 1)
        boot = outbox.boot
        assert outbox._store is not None
        outbox._store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with site.path.open("r+b") as file:
            for page in range(1, 8):
                file.seek(page * 4096)
                file.write(b"\xa5" * 4096)
        outbox._store._db.execute("PRAGMA shrink_memory")  # what it has in memory is still whole
        for _ in range(3):
            await outbox.put("app.x", b"after")
        assert outbox.boot != boot
        await site.when(lambda: site.bodies().count(b"after") >= 3)
        assert outbox.ledger().set_aside == 1


async def test_a_folder_that_cannot_be_written_drops_and_counts_until_it_can(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder is needed")
    async with Outbox(blocked / "outbox.db", clock=FakeClock()) as outbox:
        with pytest.raises(StoreFailed):
            await outbox.put("app.x", b"1")
        assert outbox.ledger().total().dropped == {"disk": 1}
        blocked.unlink()
        await outbox.put("app.x", b"2")
        assert outbox.ledger().total().pending == 1
        assert not outbox.ledger().imbalance


async def test_a_file_of_a_later_release_is_left_alone(site: Site) -> None:
    with sqlite3.connect(site.path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    async with site.outbox() as outbox:
        with pytest.raises(StoreFailed, match="newer release"):
            await outbox.put("app.x", b"1")
    assert list(site.path.parent.glob("*.damaged*")) == []


async def test_what_waits_in_memory_is_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_WAITING", 5)
    async with site.outbox() as outbox:
        for _ in range(9):
            outbox.offer("app.x", b"")
        await site.when(lambda: outbox.pending == 5)
        assert outbox.ledger().total().dropped == {"overrun": 4}
        assert not outbox.ledger().imbalance


async def test_closing_brings_what_waits_to_the_disk(site: Site) -> None:
    async with site.outbox() as outbox:
        for _ in range(50):
            outbox.offer("app.x", b"")
    assert read_ledger(site.path).streams["app.x"].pending == 50
