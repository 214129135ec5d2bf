"""What each fault makes of bytes: time and randomness are arguments here."""

from __future__ import annotations

from random import Random

import pytest

from sync.chaos import Answer503, Corrupt, Drip, Fault, HalfOpen, Lag, LinkCut, NeverFired, SlowBody
from sync.chaos.faults import Direction, Flow, Piece

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


def flow(direction: Direction = "up", seed: int = 1) -> Flow:
    return Flow(1, direction, Random(seed), {})


def pieces(fault: Fault, given: Flow, *chunks: bytes, now: float = 10.0) -> list[Piece]:
    found: list[Piece] = []
    for chunk in chunks:
        for piece in fault.shape(given, chunk, now):
            given.last_due = piece.due
            found.append(piece)
    return found


@pytest.mark.parametrize("fault", [LinkCut(), Lag(), Drip(), HalfOpen(), Corrupt(), Answer503(), SlowBody()])
def test_a_fault_that_nothing_met_says_so(fault: Fault) -> None:
    with pytest.raises(NeverFired, match=fault.name):
        fault.insist()


def test_lag_keeps_the_order_whatever_the_jitter() -> None:
    fault, given = Lag(0.1, 0.5), flow()
    dues = [piece.due for piece in pieces(fault, given, *[b"x"] * 50)]
    assert dues == sorted(dues)
    assert all(10.1 <= due <= 10.6 for due in dues)
    assert fault.fired


def test_a_drip_keeps_every_byte_and_its_rate() -> None:
    found = pieces(Drip(100.0), flow(), bytes(range(250)))
    assert b"".join(piece.data for piece in found) == bytes(range(250))
    assert found[-1].due == pytest.approx(12.5)
    assert max(len(piece.data) for piece in found) == 5


def test_half_open_swallows_one_direction_and_leaves_the_other() -> None:
    fault = HalfOpen("down")
    down = flow("down")
    assert pieces(fault, down, b"answer") == []
    assert down.spoiled
    assert pieces(fault, flow("up"), b"question") == [Piece(10.0, b"question")]


def test_corruption_is_the_same_for_the_same_seed_and_changes_about_its_share() -> None:
    data = bytes(100_000)
    one, two = (b"".join(piece.data for piece in pieces(Corrupt(1_000), flow(seed=7), data)) for _ in range(2))
    assert one == two
    assert 50 < sum(a != b for a, b in zip(one, data, strict=True)) < 200


def test_503_is_answered_once_per_request_and_the_server_sees_none() -> None:
    fault, given = Answer503(retry_after=7), flow()
    body = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nab"
    assert pieces(fault, given, body) == []
    assert given.spoiled, "the rest of a request that was half swallowed must not reach the server"
    (answer,) = pieces(fault, given, b"cd")
    assert answer.back
    assert answer.data.startswith(b"HTTP/1.1 503")
    assert b"Retry-After: 7\r\n" in answer.data
    assert not given.spoiled
    assert fault.tally.requests == 1


def test_503_hits_about_its_share_and_leaves_the_rest_untouched() -> None:
    fault, given = Answer503(share=0.25), flow()
    found = [piece for _ in range(400) for piece in pieces(fault, given, GET)]
    assert 60 < sum(piece.back for piece in found) < 140
    assert all(piece.data == GET for piece in found if not piece.back)


def test_503_leaves_what_is_no_http_alone() -> None:
    fault = Answer503()
    assert pieces(fault, flow(), b"\x10\x0c\x00\x04MQTT") == [Piece(10.0, b"\x10\x0c\x00\x04MQTT")]
    assert not fault.fired


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_slow_body_begins_exactly_behind_the_head_wherever_a_chunk_ends(cut: int) -> None:
    fault, notes = SlowBody(10.0), {}
    up, down = (Flow(1, direction, Random(1), notes) for direction in ("up", "down"))
    answer = b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n" + b"0123456789" * 2
    pieces(fault, up, GET)
    found = pieces(fault, down, answer[:cut], answer[cut:])
    assert b"".join(piece.data for piece in found) == answer
    early = b"".join(piece.data for piece in found if piece.due == 10.0)
    assert early == answer[: answer.index(b"0123")]
    assert found[-1].due == pytest.approx(12.0)
