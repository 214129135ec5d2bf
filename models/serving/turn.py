"""Runs inside the event loop, gathered turn by turn: whatever arrived in one turn of the loop is run together.

Never a wait on an empty queue: a batch is what one turn has read. While requests come one at a time they are run at once; the
first turn that brings two of them switches to gathering, and sixteen lonely turns switch back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from models.errors import DeadlineExceeded, NotReady
from models.serving.engine_pool import STOPPING, Landed, run_together
from models.serving.loaded import Loaded
from models.serving.loop_watch import LoopWatch
from models.serving.ticket import Ticket

TURN_SECONDS = 0.0005
"""Longest that one turn of the loop runs models: what is left waits for the next turn, after whatever else has arrived."""
CHEAP_SECONDS = 0.00003
"""A model below this (30 us) that does not batch runs at once: gathering it would cost a tenth of that and gain nothing."""
LONELY_TURNS = 16
"""After so many turns with one request each, the next one is no longer held back for others that may come."""

_Group = tuple[Loaded, Sequence[str], object]


class Turn:
    """`landed` is told how gathered runs ended."""

    def __init__(self, landed: Landed, clock: Callable[[], float], watch: LoopWatch) -> None:
        self._landed = landed
        self._watch = watch
        self._clock = clock
        self._pending: dict[_Group, list[Ticket]] = {}
        self._number = 0
        self._ending = False

    def at_once(self, loaded: Loaded, rows: int) -> bool:
        """Whether a request of `rows` rows may run now, instead of with what else this turn brings."""
        if loaded.seconds <= CHEAP_SECONDS and rows >= loaded.batching.rows:
            return True
        self._end_soon()
        if loaded.turn == self._number:
            loaded.alone = 0
            return False
        loaded.turn = self._number
        return loaded.alone >= LONELY_TURNS

    def gather(self, ticket: Ticket) -> None:
        """Run `ticket` at the end of this turn of the loop."""
        if not self._ending:
            self._end_soon()
        group = (ticket.loaded, ticket.names, ticket.key)
        waiting = self._pending.get(group)
        if waiting is None:
            self._pending[group] = [ticket]
        else:
            waiting.append(ticket)

    def close(self) -> None:
        """Refuse what was gathered."""
        pending, self._pending = self._pending, {}
        for tickets in pending.values():
            self._landed(tickets, NotReady(STOPPING))

    def _end_soon(self) -> None:
        if not self._ending:
            self._ending = True
            asyncio.get_running_loop().call_soon(self._end)

    def _end(self) -> None:
        """Everything that this turn of the loop has read is here: run it."""
        self._ending = False
        self._number += 1
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        ends = self._clock() + TURN_SECONDS
        over = False
        for group, tickets in pending.items():
            if over:
                self._put_back(group, tickets)
                continue
            loaded = group[0]
            if len(tickets) == 1:
                loaded.alone += 1
            else:
                loaded.alone = 0
                tickets.sort(key=_deadline)
            left = self._run(loaded, tickets, ends)
            if left:
                self._put_back(group, left)
            over = self._clock() > ends
        if self._pending and not self._ending:
            self._end_soon()

    def _put_back(self, group: _Group, tickets: list[Ticket]) -> None:
        # An answer may have made its receiver ask again: those have waited less.
        self._pending[group] = tickets + self._pending.get(group, [])

    def _run(self, loaded: Loaded, tickets: list[Ticket], ends: float) -> list[Ticket]:
        """Run these, batch by batch, until the turn's time is used up; returns those left."""
        most = loaded.batching.rows
        if loaded.row_elements:
            most = min(most, loaded.inline_elements // loaded.row_elements)
        start = 0
        while start < len(tickets):
            now = self._clock()
            if start and now > ends:
                return tickets[start:]
            stop, rows = start + 1, tickets[start].rows
            while stop < len(tickets) and rows + tickets[stop].rows <= most:
                rows += tickets[stop].rows
                stop += 1
            self._run_batch(tickets[start:stop], now)
            start = stop
        return []

    def _run_batch(self, tickets: list[Ticket], now: float) -> None:
        # Sorted: when the first is in time, all are.
        if tickets[0].deadline < now or any(ticket.parked.done() for ticket in tickets):
            late = [ticket for ticket in tickets if ticket.deadline < now or ticket.parked.done()]
            error = DeadlineExceeded(f"'{tickets[0].loaded.identity}' was not reached within the deadline")
            self._landed(late, error)
            tickets = [ticket for ticket in tickets if ticket not in late]
        if tickets:
            self._watch.begin()
            self._watch.running = tickets[0].loaded, now
            outcome = run_together(tickets, self._clock)
            self._watch.running = None
            self._landed(tickets, outcome)


def _deadline(ticket: Ticket) -> float:
    return ticket.deadline
