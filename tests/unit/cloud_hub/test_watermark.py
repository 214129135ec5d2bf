"""Numbers tell repetitions from news, through restarts, late packets, damaged and restored files."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.watermark import MAX_PAST, Stream, heed
from sync.events import EventPacket

A, B, C = "a" * 16, "b" * 16, "c" * 16


def heard(stream: Stream | None, boot: str, starts: int, low: int) -> Stream:
    return heed(stream, EventPacket(boot=boot, starts=starts, low=low, events=()))


def test_within_one_opening_the_mark_only_rises() -> None:
    stream = heard(heard(None, A, 1, 10), A, 1, 4)
    assert stream == Stream(A, 1, 10)
    assert stream.is_late(9)
    assert not stream.is_late(10)


def test_a_restart_goes_on_from_the_same_numbers() -> None:
    assert heard(heard(None, A, 1, 10), B, 2, 12) == Stream(B, 2, 12, (A,))


def test_an_old_packet_moves_nothing() -> None:
    stream = heard(heard(None, A, 1, 10), B, 2, 12)
    assert heard(stream, A, 1, 11) == stream


def test_a_new_or_restored_file_is_believed_because_its_name_is_new() -> None:
    stream = heard(heard(None, A, 7, 900), B, 1, 1)
    assert (stream.low, stream.is_late(1)) == (1, False)
    assert heard(heard(None, A, 7, 900), C, 4, 300).low == 300


def test_a_late_packet_from_before_a_machine_was_restored_takes_no_event_of_the_restored_one_for_a_repetition() -> None:
    before, restored = (A, 20, 5_000), (B, 11, 100)
    stream = heard(heard(None, *before), *restored)
    for _ in range(2):
        stream = heard(stream, *before)
        assert not stream.is_late(101)
    assert heard(stream, *restored).low == 100


def test_names_are_bounded() -> None:
    stream = None
    for number in range(3 * MAX_PAST):
        stream = heard(stream, f"{number:016x}", number + 1, number + 1)
    assert stream is not None
    assert len(stream.past) == MAX_PAST


@given(st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=80), st.data())
def test_no_number_that_still_waits_is_ever_taken_for_a_repetition(
    steps: list[tuple[int, bool]], data: st.DataObject
) -> None:
    """An outbox that restarts now and then; packets arrive repeated and out of order."""
    low, starts, made = 1, 1, [(1, 1)]
    stream: Stream | None = None
    for more, restart in steps:
        low += more
        starts += restart
        made.append((starts, low))
        for at, mark in [made[data.draw(st.integers(max(len(made) - 5, 0), len(made) - 1))] for _ in range(2)]:
            stream = heard(stream, f"{at:016x}", at, mark)
            assert stream.low <= low  # whatever waits has a number of at least `low`
