"""The updater's table holds together, and the page that shows it shows this one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sync.fetch import BUSY_SECONDS
from sync.settings import decode_settings
from sync.slot_builder import PROBE_SECONDS
from sync.states import (
    DEADLINES,
    MIN_DEADLINES,
    RESUMED,
    STATES,
    UNDER_WAY,
    ImpossibleStep,
    deadlines_table,
    mermaid,
    step,
)
from sync.transfers import SOURCE_SECONDS

PAGE = Path(__file__).parents[3] / "docs" / "updates.md"


def test_every_state_a_row_leads_to_has_a_row() -> None:
    assert {state for row in STATES.values() for state in row.values()} <= set(STATES)
    assert set(UNDER_WAY) | set(RESUMED) | set(DEADLINES) <= set(STATES)


def test_every_state_can_be_reached_from_the_first() -> None:
    reached, ahead = {"idle"}, ["idle"]
    while ahead:
        for state in STATES[ahead.pop()].values():
            if state not in reached:
                reached.add(state)
                ahead.append(state)
    assert reached == set(STATES)


def test_what_is_not_in_the_table_cannot_happen() -> None:
    for state in STATES:
        for event in {name for row in STATES.values() for name in row} - set(STATES[state]):
            with pytest.raises(ImpossibleStep, match=event):
                step(state, event)


def test_a_newer_document_may_take_over_in_every_state_but_the_point_of_no_return() -> None:
    assert {state for state, row in STATES.items() if "offered" not in row} == {"committing"}


def test_nothing_is_put_in_force_without_having_been_prepared_or_held_after_that() -> None:
    assert {state for state, row in STATES.items() if "committing" in row.values()} == {"preparing", "held", "waiting"}


def test_every_state_in_which_work_is_done_has_a_deadline() -> None:
    assert set(DEADLINES) == {"verifying", "fetching", "preparing", "committing"}
    assert decode_settings(b'{"deadlines": {"fetching": 5}}').deadlines == {"fetching": 5.0}


def test_the_shortest_deadlines_leave_room_for_what_is_waited_for_inside() -> None:
    assert MIN_DEADLINES.keys() == DEADLINES.keys()
    assert all(MIN_DEADLINES[state] < DEADLINES[state] for state in DEADLINES)
    assert MIN_DEADLINES["verifying"] > SOURCE_SECONDS
    assert MIN_DEADLINES["fetching"] > BUSY_SECONDS
    assert MIN_DEADLINES["preparing"] >= PROBE_SECONDS


def test_the_diagram_in_the_pages_is_drawn_from_the_table() -> None:
    page = PAGE.read_text()
    (shown,) = re.findall(r"```mermaid\n(.*?)\n```", page, re.DOTALL)
    assert shown == mermaid(), "run: python -m sync.states docs/updates.md"
    assert deadlines_table() in page
