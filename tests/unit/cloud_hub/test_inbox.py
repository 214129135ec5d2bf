"""An event is taken in once, with its effect, and acknowledged only then; what is no event is put aside, never repeated."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import msgspec
import pytest
from hub_in_memory import Bench

from cloud_hub import inbox as inbox_module
from cloud_hub.event_records import EventRecords
from cloud_hub.inbox import PACKET_BURST, RETENTION_SECONDS, Inbox
from models.errors import TryAgain
from sync import outbox_policy
from sync.events import MAX_BODY_BYTES, Ack, Event, EventPacket, decode_ack, new_id, pack, pack_event
from sync.topics import down, up

NODE = "acme.edge-1"
BOOT = "0123456789abcdef"


def event(seq: int, kind: str = "app.x", body: bytes = b'{"n":1}', **fields: object) -> Event:
    id_ = new_id(1_800_000_000.0, seq.to_bytes(10, "big"))
    return msgspec.structs.replace(Event(id=id_, seq=seq, kind=kind, body=body, at=1_800_000_000.0 + seq), **fields)


def packet(*events: Event | msgspec.Raw, boot: str = BOOT, starts: int = 1, low: int = 1) -> bytes:
    raws = tuple(item if isinstance(item, msgspec.Raw) else pack_event(item) for item in events)
    return pack(EventPacket(boot=boot, starts=starts, low=low, events=raws))


async def eventually(happened: Callable[[], bool]) -> None:
    """Commits take real time on a busy disk: bounded by it, not by turns of the loop."""
    async with asyncio.timeout(10):
        while not happened():
            await asyncio.sleep(0.002)


class Node:
    """Speaks for one node and reads what the hub answers."""

    def __init__(self, bench: Bench, node: str = NODE) -> None:
        self.bench, self.node = bench, node

    def sends(self, payload: bytes) -> None:
        self.bench.broker.publish(up(self.node, "event"), payload)

    def acks(self) -> list[Ack]:
        return [decode_ack(payload) for payload in self.bench.broker.payloads(down(self.node, "ack"))]

    def done(self) -> list[str]:
        return [id_ for ack in self.acks() for id_ in ack.ids]

    async def settled(self, payload: bytes) -> Ack:
        """Send and wait for the answer."""
        before = len(self.acks())
        self.sends(payload)
        await eventually(lambda: len(self.acks()) > before)
        return self.acks()[-1]

    async def ledger(self) -> dict[str, object]:
        return dict(await self.bench.call("GET", f"/api/v1/nodes/{self.node}/ledger", 200))


@pytest.fixture
async def node(bench: Bench) -> Node:
    await bench.add_node(NODE)
    return Node(bench)


async def stored(bench: Bench, **query: str) -> list[dict[str, object]]:
    return list((await bench.call("GET", "/api/v1/events", 200, params=query))["items"])


async def test_an_event_is_stored_then_acknowledged_and_readable(node: Node) -> None:
    ack = await node.settled(packet(event(1), event(2, body=b"\xff\x00")))
    assert ack.ids == (event(1).id, event(2).id)
    assert ack.fleet == 1
    first, second = await stored(node.bench)
    assert (first["node"], first["kind"], first["json"], first["base64"]) == (NODE, "app.x", {"n": 1}, None)
    assert base64.b64decode(str(second["base64"])) == b"\xff\x00"


async def test_a_repetition_is_acknowledged_again_and_stored_once(node: Node) -> None:
    for _ in range(3):
        await node.settled(packet(event(1)))
    assert len(await stored(node.bench)) == 1
    streams = (await node.ledger())["streams"]
    assert streams == {"app.x": {"received": 1, "duplicates": 2, "dead_letters": 0}}


async def test_a_repetition_within_one_transaction_is_recognised(node: Node) -> None:
    node.sends(packet(event(1), event(1)))
    node.sends(packet(event(1)))
    await eventually(lambda: node.bench.hub.inbox.counts["duplicates"] == 2)
    assert len(await stored(node.bench)) == 1


async def test_nothing_is_acknowledged_that_was_not_committed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = node.bench.hub.inbox
    transact, failures = Inbox._transact, iter([TryAgain("the disk is full")])

    def failing(self: Inbox, batch: object) -> object:
        for error in failures:
            raise error
        return transact(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Inbox, "_transact", failing)
    node.sends(packet(event(1)))
    await eventually(lambda: node.bench.clock.sleepers > 0)
    assert node.acks() == []
    assert await stored(node.bench) == []
    node.bench.clock.advance(2)
    await eventually(lambda: node.done() == [event(1).id])
    assert inbox.counts["received"] == 1


async def test_the_effect_and_the_event_are_one_transaction(node: Node) -> None:
    raised = json.dumps({"alarm": "disk", "state": "raised", "text": "95 %"}).encode()
    await node.settled(packet(event(1, "alarm", raised)))
    alarms = (await node.bench.call("GET", "/api/v1/alarms", 200))["items"]
    assert [(entry["node"], entry["alarm"], entry["text"]) for entry in alarms] == [(NODE, "disk", "95 %")]
    cleared = json.dumps({"alarm": "disk", "state": "cleared"}).encode()
    await node.settled(packet(event(2, "alarm", cleared)))
    await node.settled(packet(event(1, "alarm", raised)))
    assert (await node.bench.call("GET", "/api/v1/alarms", 200))["items"] == []


async def test_an_alarm_that_was_overtaken_by_its_end_stays_ended(node: Node) -> None:
    await node.settled(packet(event(2, "alarm", b'{"alarm":"disk","state":"cleared"}')))
    await node.settled(packet(event(1, "alarm", b'{"alarm":"disk","state":"raised"}')))
    assert (await node.bench.call("GET", "/api/v1/alarms", 200))["items"] == []


async def test_what_is_no_event_is_refused_by_name_put_aside_and_counted(node: Node) -> None:
    bad_priority = pack_event(event(1, priority=77))
    bad_kind = pack_event(event(2, kind="No Kind"))
    bad_alarm = event(3, "alarm", b"not json")
    ack = await node.settled(packet(bad_priority, bad_kind, bad_alarm, event(4)))
    assert ack.ids == (event(4).id,)
    assert set(ack.refused) == {event(1).id, event(2).id, event(3).id}
    assert "priority" in ack.refused[event(1).id]
    ledger = await node.ledger()
    assert len(ledger["dead_letters"]) == 3  # type: ignore[arg-type]
    assert len(await stored(node.bench)) == 1


async def test_a_packet_that_is_none_is_put_aside_and_hurts_nobody(node: Node) -> None:
    for payload in (
        b"",
        b"\xc1",
        b"{}",
        b"\x80",
        b"\x93\x01\x02\x03",
        packet(low=1, boot="x"),
        b"\xdf\xff\xff\xff\xff",
    ):
        node.sends(payload)
    await node.settled(packet(event(1)))
    assert node.bench.hub.inbox.counts["dead_letters"] == 7
    assert (await node.ledger())["streams"]["."[:0]] == {"received": 0, "duplicates": 0, "dead_letters": 7}  # type: ignore[index]


async def test_an_effect_that_fails_is_a_dead_letter_not_a_loop(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(records: EventRecords, name: str, item: Event) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(node.bench.hub.inbox, "_effects", {"app.x": fails})
    ack = await node.settled(packet(event(1), event(2, "app.y")))
    assert (ack.ids, list(ack.refused)) == ((event(2).id,), [event(1).id])


async def test_a_packet_that_breaks_the_database_is_found_and_put_aside_alone(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = EventRecords.add

    def choking(self: EventRecords, name: str, item: Event, received: float) -> None:
        if item.seq == 2:
            raise OverflowError("no such number")
        add(self, name, item, received)

    monkeypatch.setattr(EventRecords, "add", choking)
    for seq in (1, 2, 3):
        node.sends(packet(event(seq)))
    await eventually(lambda: set(node.done()) == {event(1).id, event(3).id})
    assert node.bench.hub.inbox.counts["dead_letters"] == 1


async def test_strangers_and_denied_nodes_are_not_heard(node: Node) -> None:
    stranger = Node(node.bench, "acme.stranger")
    stranger.sends(packet(event(1)))
    node.bench.hub.fleet.deny(NODE)
    node.sends(packet(event(1)))
    await eventually(lambda: node.bench.hub.fleet.counts["unknown"] == 2)
    node.bench.hub.fleet.admit(NODE)
    await node.settled(packet(event(2)))
    assert [entry["id"] for entry in await stored(node.bench)] == [event(2).id]
    assert stranger.acks() == []


async def test_a_node_that_floods_is_limited_and_loses_nothing_it_repeats(node: Node) -> None:
    for _ in range(int(PACKET_BURST) + 50):
        node.bench.hub.inbox.hear(NODE, packet(event(1)))
        await asyncio.sleep(0)
    assert node.bench.hub.inbox.counts["limited"] + node.bench.hub.inbox.counts["overflow"] >= 50
    node.bench.clock.advance(10)
    await eventually(lambda: node.bench.hub.inbox.counts["acks"] > 0 and not node.bench.hub.inbox._waiting)
    node.sends(packet(event(2)))
    await eventually(lambda: event(2).id in node.done())
    assert {entry["id"] for entry in await stored(node.bench)} == {event(1).id, event(2).id}


async def test_ids_outlive_any_age_until_the_node_says_that_they_are_settled(node: Node) -> None:
    bench = node.bench
    await node.settled(packet(event(1), event(2), low=1))
    for _ in range(2):
        bench.clock.advance(400 * 86_400)
        await node.settled(packet(event(3), low=1))
        await asyncio.to_thread(bench.hub.inbox._prune)
    # More than two years later the acknowledgement turns out to have been lost: still a repetition.
    await node.settled(packet(event(1), event(2), low=1))
    assert (await node.ledger())["streams"]["app.x"]["received"] == 3  # type: ignore[index]
    # Now the node says that all below 3 are settled: rows go, late copies are known by their number.
    await node.settled(packet(event(4), low=3))
    bench.clock.advance(RETENTION_SECONDS + 1)
    await asyncio.to_thread(bench.hub.inbox._prune)
    assert {entry["id"] for entry in await stored(bench)} == {event(3).id, event(4).id}
    await node.settled(packet(event(1), low=1))
    assert (await node.ledger())["streams"]["app.x"]["received"] == 4  # type: ignore[index]


def lives(bench: Bench) -> dict[str, tuple[int, int]]:
    """Node -> its rows, and how many of them have a body."""
    with bench.hub.storage.read() as records:
        found = records.events.page(1_000)
    rows = Counter(entry.node for entry in found)
    return {name: (rows[name], sum(bool(entry.body) for entry in found if entry.node == name)) for name in rows}


async def test_a_node_that_floods_pushes_out_its_own_events_and_nobody_else_s(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "MAX_EVENTS", 30)
    await node.bench.add_node("acme.edge-2")
    await node.settled(packet(*(event(seq) for seq in range(1, 11)), low=1))
    flood = Node(node.bench, "acme.edge-2")
    for start in (1, 51):
        await flood.settled(packet(*(event(seq) for seq in range(start, start + 50)), low=start))
    await flood.settled(packet(event(101), low=101))
    await asyncio.to_thread(node.bench.hub.inbox._prune)
    assert lives(node.bench) == {NODE: (10, 10), "acme.edge-2": (20, 20)}
    newest = [entry["id"] for entry in await stored(node.bench, node="acme.edge-2")]
    assert newest == [event(seq).id for seq in range(82, 102)]


async def test_large_bodies_count_for_more(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "MAX_EVENTS", 10)
    await node.settled(packet(*(event(seq, body=bytes(9_000)) for seq in range(1, 6))))
    await node.settled(packet(event(6, body=bytes(9_000)), low=6))
    await asyncio.to_thread(node.bench.hub.inbox._prune)
    assert lives(node.bench) == {NODE: (3, 3)}


async def test_bodies_past_their_time_all_go_and_ids_are_bounded_even_for_a_node_that_never_settles(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "PRUNE_BATCH", 2)
    await node.settled(packet(*(event(seq) for seq in range(1, 12)), low=1))
    node.bench.clock.advance(RETENTION_SECONDS + 1)
    while await asyncio.to_thread(node.bench.hub.inbox._prune):
        pass
    assert lives(node.bench) == {NODE: (11, 0)}
    monkeypatch.setattr("cloud_hub.event_records.MAX_IDS", 4)
    while await asyncio.to_thread(node.bench.hub.inbox._prune):
        pass
    assert lives(node.bench) == {NODE: (4, 0)}


async def test_a_hub_with_much_to_forget_takes_events_in_between(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "PRUNE_BATCH", 2)
    monkeypatch.setattr(inbox_module, "PRUNE_BATCHES", 2)
    await node.settled(packet(*(event(seq) for seq in range(1, 12))))
    node.bench.clock.advance(RETENTION_SECONDS + 1)
    await node.settled(packet(event(12), low=12))
    again = node.bench.clock.monotonic() + inbox_module.PRUNE_AGAIN_SECONDS
    await eventually(lambda: node.bench.hub.inbox._prune_at == again)
    assert lives(node.bench)[NODE][0] == 8
    node.bench.clock.advance(inbox_module.PRUNE_AGAIN_SECONDS)
    await node.settled(packet(event(13), low=13))
    await eventually(lambda: lives(node.bench)[NODE][0] < 9)


async def test_a_clock_that_jumps_ahead_makes_no_event_old(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.settled(packet(event(1)))
    await node.settled(packet(event(2), low=2))
    monkeypatch.setattr(node.bench.clock, "_wall", node.bench.clock.wall() + 400 * 86_400)
    await asyncio.to_thread(node.bench.hub.inbox._prune)
    assert lives(node.bench) == {NODE: (2, 2)}


async def test_a_replaced_outbox_begins_a_new_numbering_without_losing_an_event(node: Node) -> None:
    await node.settled(packet(event(500), low=400))
    fresh = event(1, id=new_id(1.0, b"\xff" * 10))
    await node.settled(packet(fresh, boot="f" * 16, starts=1, low=1))
    assert len(await stored(node.bench)) == 2
    # A copy from before the replacement, delivered late by the broker, moves nothing and is recognised by its id.
    await node.settled(packet(event(500), low=400))
    again = event(2, id=new_id(1.0, b"\xfe" * 10))
    await node.settled(packet(again, boot="f" * 16, starts=1, low=1))
    assert len(await stored(node.bench)) == 3


async def test_pages_of_events_follow_each_other_and_filter(node: Node) -> None:
    await node.settled(packet(*(event(seq, "app.x" if seq % 2 else "app.y") for seq in range(1, 8))))
    page = await node.bench.call("GET", "/api/v1/events", 200, params={"limit": 3})
    rest = await node.bench.call("GET", "/api/v1/events", 200, params={"after": page["next"]})
    assert len(page["items"]) + len(rest["items"]) == 7
    assert rest["next"] is None
    assert len(await stored(node.bench, kind="app.y")) == 3
    assert await stored(node.bench, node="acme.other") == []
    assert await node.bench.call("GET", "/api/v1/nodes/acme.nobody/ledger", 404)


@pytest.mark.parametrize("body", [b"[" * 300 + b"]" * 300, b'{"a":' * 900 + b"1" + b"}" * 900, b"[" * 20_000])
async def test_a_body_that_no_reader_could_nest_is_shown_as_bytes_and_hides_no_other_event(
    node: Node, body: bytes
) -> None:
    await node.settled(packet(event(1, body=body), event(2)))
    first, second = await stored(node.bench)
    assert (first["json"], base64.b64decode(str(first["base64"]))) == (None, body)
    assert second["json"] == {"n": 1}


async def test_bodies_are_shown_as_they_were_written(node: Node) -> None:
    bodies = [b"1" + b"0" * 400, b'"\\u0000"', b"null", b'{"a": [1, 2.50]}', b'{"a":1,"a":2}', b"[[[]]]"]
    await node.settled(packet(*(event(seq, body=body) for seq, body in enumerate(bodies, 1))))
    assert [entry["json"] for entry in await stored(node.bench)] == [json.loads(body) for body in bodies]


async def test_dead_letters_are_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud_hub.event_records.MAX_DEAD_LETTERS", 5)
    for _ in range(9):
        node.sends(b"\xc1")
    await eventually(lambda: node.bench.hub.inbox.counts["dead_letters"] == 9)
    assert len((await node.ledger())["dead_letters"]) == 5  # type: ignore[arg-type]


def test_the_named_limits_leave_room_for_a_whole_window() -> None:
    assert inbox_module.PACKET_BURST > 64
    assert inbox_module.BYTE_BURST > 64 * 60 * 1024


def test_a_node_keeps_below_what_the_hub_takes_of_it() -> None:
    assert outbox_policy.PACKETS_PER_SECOND < inbox_module.PACKETS_PER_SECOND
    assert outbox_policy.BYTES_PER_SECOND < inbox_module.BYTES_PER_SECOND
    assert outbox_policy.PACKET_BURST + outbox_policy.WINDOW < inbox_module.PACKET_BURST
    assert outbox_policy.BYTE_BURST + outbox_policy.WINDOW * MAX_BODY_BYTES < inbox_module.BYTE_BURST


@pytest.mark.parametrize(("count", "size"), [(10_000, 600), (400, 40_000)])
def test_a_backlog_drains_as_fast_as_the_hub_takes_it(count: int, size: int) -> None:
    """In virtual time, 20 ms to the hub and back: what it does not take would be backed off, up to minutes."""
    events = {seq: event(seq, body=bytes(size)) for seq in range(1, count + 1)}
    flight = outbox_policy.Flight(outbox_policy.WINDOW, lambda low, high: (low + high) / 2)
    ours, theirs, now, limited = outbox_policy.Allowance(0.0), inbox_module._Allowance(0.0), 0.0, 0
    fresh, answers = iter(events.values()), deque[tuple[float, Sequence[Event]]]()
    while True:
        while answers and answers[0][0] <= now:
            flight.settled(done.id for done in answers.popleft()[1])
        if ours.wait(now) == 0:
            for some in ([events[seq] for seq in flight.due(now)], list(islice(fresh, flight.free))):
                for payload, group in outbox_policy.packets(some, flight.lonely, boot=BOOT, starts=1, low=1):
                    ours.spend(len(payload))
                    flight.sent(group, now)
                    if theirs.take(now, len(payload)):
                        answers.append((now + 0.02, group))
                    else:
                        limited += 1
        if not len(flight):
            break
        soon = [at for at in (answers[0][0] if answers else None, flight.next_due()) if at is not None]
        now = max(now, min(soon), now + ours.wait(now)) if flight.free else max(now, min(soon))
    assert limited == 0
    assert now < 1.5 * count * (size + 150) / outbox_policy.BYTES_PER_SECOND


def test_the_node_s_token_does_not_reach_events(tmp_path: Path) -> None:
    from cloud_hub.auth import Role, roles_for

    assert roles_for("/api/v1/events") == frozenset({Role.ADMIN})
