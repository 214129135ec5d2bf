"""Which slot is started: decided in values, kept in one file that is replaced whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from sync.errors import StoreFailed
from sync.slots import (
    MAX_BOOTS,
    MAX_GIVEN_UP,
    MAX_TRIES,
    Slot,
    Slots,
    SlotState,
    booted,
    confirmed,
    rolled_back,
    switched,
)

OLD, NEW = Slot("a", "1.0", "sha256:old"), Slot("b", "1.1", "sha256:new")
PROVED = SlotState(current=OLD)


def on_trial(state: SlotState = PROVED, slot: Slot = NEW) -> SlotState:
    return switched(state, slot, connected=True, served=True)


def test_a_version_that_keeps_ending_is_taken_back_and_not_tried_again() -> None:
    state = on_trial()
    for _ in range(MAX_BOOTS):
        state = booted(state)
        assert state.current == NEW
    state = booted(state)
    assert (state.current, state.confirmed) == (OLD, True)
    assert "ended 3 times" in state.given_up["sha256:new"]
    assert state.last.startswith("1.1: ")


def test_a_version_that_proved_itself_is_never_counted_out() -> None:
    state = confirmed(booted(on_trial()))
    for _ in range(10):
        state = booted(state)
    assert (state.current, state.given_up) == (NEW, {})


def test_without_a_slot_before_it_the_way_back_is_what_was_installed_by_hand() -> None:
    assert rolled_back(on_trial(SlotState()), "bad").current is None


def test_what_has_not_proved_itself_is_no_place_to_go_back_to() -> None:
    state = on_trial(on_trial(), Slot("b", "1.2", "sha256:newer"))
    assert rolled_back(state, "bad").current == OLD


def test_a_version_that_only_lacked_the_network_is_tried_a_few_times() -> None:
    state = PROVED
    for _ in range(MAX_TRIES - 1):
        state = rolled_back(on_trial(state), "no connection", passing=True)
        assert not state.given_up
    state = rolled_back(on_trial(state), "no connection", passing=True)
    assert state.given_up == {"sha256:new": "no connection"}
    assert state.tries == {}


def test_proving_itself_forgets_the_failed_tries() -> None:
    state = rolled_back(on_trial(), "no connection", passing=True)
    assert confirmed(on_trial(state)).tries == {}


def test_what_proved_itself_is_not_taken_back() -> None:
    assert rolled_back(PROVED, "late") == PROVED


def test_what_was_given_up_is_remembered_within_a_bound() -> None:
    state = PROVED
    for number in range(MAX_GIVEN_UP + 5):
        state = rolled_back(on_trial(state, Slot("b", "2", f"sha256:{number}")), "bad")
    assert len(state.given_up) == MAX_GIVEN_UP
    assert f"sha256:{MAX_GIVEN_UP + 4}" in state.given_up


def test_the_slot_that_is_built_anew_is_never_one_that_may_be_started(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    assert slots.free(SlotState()) == "a"
    assert slots.free(PROVED) == "b"
    assert slots.free(SlotState(current=NEW, previous=OLD)) == "a"
    with pytest.raises(StoreFailed, match="until the version on trial has proved itself"):
        slots.free(on_trial())


def test_the_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "new")
    assert slots.read() == SlotState()
    state = rolled_back(on_trial(), "bad")
    slots.write(state)
    assert slots.read() == state
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["slots.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"format":2,"current":{"place":"c"}}', "format 2, written by a later release; this one reads up to 1"),
        (b'{"current":{"name":"../x","version":"1","software":""}}', "is none of a, b"),
        (b"{", "slots.json"),
        (b"\xff", "slots.json"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "slots.json").write_bytes(text)
    with pytest.raises(StoreFailed, match=words):
        Slots(tmp_path).read()


def test_a_field_of_a_later_release_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "slots.json").write_bytes(b'{"boots":2,"confirmed":false,"later":1}')
    assert Slots(tmp_path).read().boots == 2
