"""What is sent when, and in how many packets."""

from __future__ import annotations

import pytest

from sync.channel import spread
from sync.errors import Malformed
from sync.events import MAX_BODY_BYTES, MAX_PACKET_BYTES, Event, new_id, unpack, unpack_event
from sync.messages import MAX_MESSAGE_BYTES
from sync.outbox_policy import MAX_RESEND_SECONDS, RESEND_SECONDS, Flight, packets, resend_delay


def event(seq: int, body: bytes = b"x") -> Event:
    return Event(id=new_id(1.0, seq.to_bytes(10, "big")), seq=seq, kind="app.x", body=body)


def least(low: float, high: float) -> float:
    return low


def most(low: float, high: float) -> float:
    return high


def test_a_repetition_never_comes_before_four_seconds_and_backs_off_to_a_ceiling() -> None:
    assert RESEND_SECONDS >= 4
    delays = [resend_delay(attempt, 1, least) for attempt in range(1, 40)]
    assert delays[:3] == [4.0, 8.0, 16.0]
    assert delays == sorted(delays)
    assert delays[-1] == MAX_RESEND_SECONDS


def test_repetitions_are_spread_over_the_fleet() -> None:
    assert resend_delay(1, 1, most) < 7
    assert resend_delay(1, 1_000, most) == pytest.approx(6.0 + 10.0)
    assert spread(10**9) == 120.0
    assert spread(-5) == spread(1)


def test_what_is_acknowledged_is_not_repeated_while_the_disk_is_told() -> None:
    flight = Flight(64, least)
    first, second = event(1), event(2)
    flight.sent([first, second], now=0.0)
    flight.settling([first.id])
    assert flight.due(now=100.0) == [2]
    flight.unsettled([first.id])
    assert flight.due(now=100.0) == [1, 2]
    flight.settled([first.id, second.id])
    assert (len(flight), flight.free, flight.next_due()) == (0, 64, None)


def test_a_hub_that_came_back_is_told_soon_whatever_the_back_off_had_grown_to() -> None:
    flight = Flight(64, least)
    for _ in range(8):
        flight.sent([event(1)], now=0.0)
    assert flight.next_due() == MAX_RESEND_SECONDS
    flight.hasten(now=10.0)
    assert flight.next_due() == 14.0
    assert flight.resent == 7


def test_packets_are_full_but_never_larger_than_a_message() -> None:
    events = [event(seq, b"x" * 1_000) for seq in range(1, 101)] + [event(101, b"y" * MAX_BODY_BYTES)]
    made = packets(events, lambda _: False, boot="0" * 16, starts=1, low=1)
    assert [item for _, group in made for item in group] == events
    assert all(len(payload) <= MAX_PACKET_BYTES < MAX_MESSAGE_BYTES for payload, _ in made)
    assert len(made) == 3
    assert [unpack_event(raw) for payload, _ in made for raw in unpack(payload).events] == events


def test_an_event_repeated_again_and_again_travels_alone() -> None:
    events = [event(seq) for seq in range(1, 6)]
    made = packets(events, lambda item: item.seq == 3, boot="0" * 16, starts=1, low=1)
    assert [[item.seq for item in group] for _, group in made] == [[1, 2], [3], [4, 5]]


@pytest.mark.parametrize("seq", [0, -1, 1 << 62])
def test_numbers_that_no_outbox_gives_are_refused(seq: int) -> None:
    payload, _ = packets([event(1)], lambda _: False, boot="0" * 16, starts=1, low=1)[0]
    assert unpack(payload).low == 1
    with pytest.raises(Malformed, match="low"):
        unpack(packets([event(1)], lambda _: False, boot="0" * 16, starts=1, low=seq)[0][0])
