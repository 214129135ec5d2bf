"""What waits to be sent is bounded, and a level is worth only its newest value."""

from __future__ import annotations

import pytest

from sync.channel import LinkOptions, address_of, reconnect_delay
from sync.errors import InvalidConfig
from sync.outgoing import Outgoing, Packet


def level(topic: str, payload: bytes) -> Packet:
    return Packet(topic, payload, 1, True)


def event(payload: bytes, qos: int = 1) -> Packet:
    return Packet("event", payload, qos, False)


def drain(queue: Outgoing) -> list[bytes]:
    found = []
    while (packet := queue.take()) is not None:
        found.append(packet.payload)
    return found


def test_only_the_newest_value_of_a_level_is_sent_and_every_event_in_order() -> None:
    queue = Outgoing(10)
    for packet in (level("a", b"old"), event(b"1"), level("b", b"b"), event(b"2"), level("a", b"new")):
        queue.put(packet)
    assert drain(queue) == [b"b", b"new", b"1", b"2"]
    assert queue.dropped == 0


def test_above_the_limit_the_oldest_events_go_and_the_levels_stay() -> None:
    queue = Outgoing(3)
    queue.put(level("a", b"a"))
    for number in range(5):
        queue.put(event(b"%d" % number))
    assert (queue.dropped, drain(queue)) == (3, [b"a", b"3", b"4"])
    for topic in "abcd":
        queue.put(level(topic, topic.encode()))
    assert drain(queue) == [b"b", b"c", b"d"]


def test_unacknowledged_packets_go_first_again_unless_they_are_out_of_date() -> None:
    queue = Outgoing(10)
    queue.put(level("a", b"new"))
    queue.put(event(b"3"))
    queue.give_back([level("a", b"old"), event(b"1"), level("b", b"b"), event(b"2"), event(b"fleeting", qos=0)])
    assert drain(queue) == [b"new", b"b", b"1", b"2", b"3"]
    assert queue.dropped == 1


@pytest.mark.parametrize(("fleet", "longest"), [(1, 30.01), (1_000, 40.0), (10_000, 130.0)])
def test_reconnects_are_spread_over_the_fleet_and_bounded(fleet: int, longest: float) -> None:
    options = LinkOptions(url="mqtt://x", client_id="x", fleet_size=fleet)
    late = [reconnect_delay(attempt, options, lambda low, high: high) for attempt in range(1, 2_000)]
    early = [reconnect_delay(attempt, options, lambda low, high: low) for attempt in range(1, 20)]
    assert max(late) == pytest.approx(longest)
    assert late[0] == pytest.approx(0.5 + fleet * 0.01)
    assert early[0] == pytest.approx(0.25)
    assert early == sorted(early)


@pytest.mark.parametrize("url", ["", "x", "http://x", "mqtt://", "mqtt://h:99999", "mqtt://h:x"])
def test_a_broker_that_is_no_mqtt_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidConfig):
        address_of(url)


def test_a_broker_without_a_port_is_on_the_usual_one() -> None:
    assert address_of("mqtt://127.0.0.1") == ("127.0.0.1", 1883)
    assert address_of("mqtt://[::1]:18") == ("::1", 18)
