"""A device has its share of the mirror and no more; a slot is free again however its download ended."""

from __future__ import annotations

import gc

import pytest

from edge_node import shares
from edge_node.shares import MirrorSettings, Shares
from models.errors import Overloaded
from models.serving.caller import Peer

ONE, TWO = Peer("10.0.0.1"), Peer("10.0.0.2")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_slot_is_free_again_when_nobody_holds_the_download() -> None:
    desk = Shares(MirrorSettings(slots=3, device_slots=2))
    held = [desk.take(ONE), desk.take(ONE)]
    with pytest.raises(Overloaded, match="this device"):
        desk.take(ONE)
    held.append(desk.take(TWO))
    with pytest.raises(Overloaded, match="3 downloads"):
        desk.take(Peer("10.0.0.3"))
    held.clear()
    gc.collect()
    assert desk.running == 0
    assert desk.take(ONE) is not None
    assert desk.refused == {"device_slots": 1, "slots": 1}


def test_a_device_that_had_its_bytes_is_told_when_to_come_back_and_others_are_not_concerned() -> None:
    clock = Clock()
    desk = Shares(MirrorSettings(window_bytes=1000, window_seconds=100), clock)
    desk.take(ONE).sent(1000)
    with pytest.raises(Overloaded) as refused:
        desk.take(ONE)
    assert refused.value.retry_after == pytest.approx(10)
    desk.take(TWO)
    clock.now = 10.1
    desk.take(ONE)
    assert (desk.sent, desk.refused) == (1000, {"bytes": 1})


def test_a_certificate_names_a_device_wherever_it_calls_from() -> None:
    desk = Shares(MirrorSettings(device_slots=1))
    held = desk.take(Peer("10.0.0.1", certificate="acme.d1", encrypted=True))
    desk.take(Peer("10.0.0.1", certificate="acme.d2", encrypted=True))
    with pytest.raises(Overloaded):
        desk.take(Peer("10.0.0.9", certificate="acme.d1", encrypted=True))
    del held


def test_strangers_without_number_do_not_grow_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "MAX_DEVICES", 20)
    desk = Shares(MirrorSettings())
    for number in range(200):
        desk.charge(Peer(f"10.0.1.{number}"), number)
    assert len(desk._devices) <= 20


@pytest.mark.parametrize("field", ["slots", "device_slots", "window_bytes", "window_seconds"])
def test_a_setting_that_serves_nobody_is_refused_naming_it(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        MirrorSettings(**{field: 0})
