"""The order of runs: deadlines within a flow, fair shares between flows, bounded and honest about it."""

from __future__ import annotations

import asyncio
from math import inf
from typing import Any

import pytest
from session_fake import FakeSession, loaded

from models.errors import Overloaded
from models.serving.drive import Parked
from models.serving.loaded import Loaded
from models.serving.queue import MIN_GONE, RunQueue
from models.serving.ticket import Ticket

LOOP = asyncio.new_event_loop()


def model(seconds: float = 0.01, *, serial: bool = False) -> Loaded:
    session: Any = FakeSession()
    session.serial = serial
    made = loaded(session)
    made.pace = seconds
    return made


def ticket(of: Loaded, *, deadline: float = inf, priority: int = 0, rows: int = 1, key: object = None) -> Ticket:
    return Ticket(of, {}, (), rows, key, deadline, priority, Parked(LOOP))


def queue(places: int = 256, threads: int = 2) -> RunQueue:
    return RunQueue(places, threads, lambda each: each.loaded.pace * each.rows)


def always(_: Ticket) -> bool:
    return True


def take(runs: RunQueue) -> Ticket:
    taken = runs.pop(always)
    assert taken is not None
    return taken


def run(runs: RunQueue) -> Ticket:
    """The next run, made and over."""
    taken = take(runs)
    runs.ended(taken)
    return taken


def test_the_earliest_deadline_of_a_model_goes_first() -> None:
    runs, m = queue(), model()
    for deadline in (9.0, 5.0, inf, 7.0):
        runs.admit(ticket(m, deadline=deadline), 0.0)
    order = []
    while len(runs):
        order.append(run(runs).deadline)
    assert order == [5.0, 7.0, 9.0, inf]


def test_classes_share_engine_time_six_to_three_to_one_and_none_starves() -> None:
    runs, m = queue(places=1000), model()
    for priority in (1, 2, 3):
        for _ in range(100):
            runs.admit(ticket(m, priority=priority), 0.0)
    taken = [run(runs).priority for _ in range(100)]
    runs_of = {priority: taken.count(priority) for priority in (1, 2, 3)}
    assert 58 <= runs_of[1] <= 62
    assert 28 <= runs_of[2] <= 32
    assert 8 <= runs_of[3] <= 12


def test_a_slow_models_backlog_does_not_hold_up_a_quick_model() -> None:
    runs, slow, quick = queue(), model(0.1), model(0.001)
    for _ in range(50):
        runs.admit(ticket(slow), 0.0)
    take(runs)
    take(runs)
    for _ in range(20):
        runs.admit(ticket(quick), 0.0)
        assert run(runs).loaded is quick


def test_a_flow_that_was_idle_is_owed_nothing() -> None:
    runs, first, second = queue(), model(), model()
    for _ in range(40):
        runs.admit(ticket(first), 0.0)
    for _ in range(20):
        run(runs)
    for _ in range(20):
        runs.admit(ticket(second), 0.0)
    taken = [run(runs).loaded for _ in range(10)]
    assert 4 <= taken.count(first) <= 6


def test_what_would_be_late_is_refused_at_once_with_the_time_to_come_back() -> None:
    runs, m = queue(threads=1), model(0.010)
    for _ in range(10):
        runs.admit(ticket(m), 0.0)
    with pytest.raises(Overloaded, match="100 ms of work wait") as refused:
        runs.admit(ticket(m, deadline=0.05), 0.0)
    assert refused.value.retry_after == pytest.approx(0.1)
    runs.admit(ticket(m, deadline=0.2), 0.0)


def test_a_full_queue_still_has_a_reserved_place_for_every_class() -> None:
    runs, m = queue(places=80), model()
    for _ in range(60):
        runs.admit(ticket(m, priority=3), 0.0)
    with pytest.raises(Overloaded, match="60 requests are waiting"):
        runs.admit(ticket(m, priority=3), 0.0)
    for priority in (1, 2):
        for _ in range(10):
            runs.admit(ticket(m, priority=priority), 0.0)
        with pytest.raises(Overloaded):
            runs.admit(ticket(m, priority=priority), 0.0)
    assert len(runs) == 80


def test_a_caller_that_has_gone_frees_its_place_and_in_time_its_memory() -> None:
    runs, m = queue(places=8), model()
    for _ in range(10 * MIN_GONE):
        asked = ticket(m)
        runs.admit(asked, 0.0)
        assert runs.gone(asked)
        assert not runs.gone(asked)
    assert len(runs) == 0
    assert runs.backlog == pytest.approx(0.0, abs=1e-9)
    assert runs.pop(always) is None
    assert sum(len(flow.heap) for flow in runs._flows.values()) <= 2 * MIN_GONE


def test_a_run_that_was_taken_is_not_taken_back() -> None:
    runs, m = queue(), model()
    runs.admit(ticket(m), 0.0)
    assert not runs.gone(take(runs))


def test_runs_of_a_session_that_takes_turns_are_not_given_to_two_threads() -> None:
    runs, m = queue(), model(serial=True)
    for _ in range(2):
        runs.admit(ticket(m), 0.0)
    first = take(runs)
    assert runs.pop(always) is None
    runs.ended(first)
    assert runs.pop(always) is not None


def test_only_equal_shapes_and_only_so_many_rows_are_put_together() -> None:
    runs, m = queue(), model()
    for rows, key in ((1, "a"), (2, "a"), (3, "a"), (1, "b")):
        runs.admit(ticket(m, rows=rows, key=key, deadline=10.0 + rows), 0.0)
    first = take(runs)
    assert (first.rows, first.key) == (1, "a")
    more = runs.also(first, 4)
    assert [each.rows for each in more] in ([2], [])
    assert all(each.key == "a" for each in more)


def test_flows_do_not_pile_up() -> None:
    runs = queue()
    for _ in range(100):
        runs.admit(ticket(model()), 0.0)
        run(runs)
    assert not runs._flows


def test_what_waits_is_handed_back_when_the_tier_stops() -> None:
    runs, m = queue(), model()
    for _ in range(3):
        runs.admit(ticket(m), 0.0)
    assert len(list(runs.drain())) == 3
    assert len(runs) == 0


def test_a_model_that_was_never_measured_is_charged_what_it_takes() -> None:
    runs, unknown, known = queue(threads=1), model(0.0), model(0.01)
    for _ in range(60):
        runs.admit(ticket(unknown), 0.0)
    runs.ended(take(runs), 0.05)
    runs.admit(ticket(known), 0.0)
    assert known in [run(runs).loaded for _ in range(2)]


def test_a_flow_whose_callers_have_all_gone_is_forgotten() -> None:
    runs = queue()
    for _ in range(20):
        asked = ticket(model())
        runs.admit(asked, 0.0)
        runs.gone(asked)
    assert not runs._flows
