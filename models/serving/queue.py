"""The order in which runs are made: earliest deadline first within a flow, fair shares between flows. Pure: no threads here.

A flow is one model version in one priority class. Between flows the one that has used least of its share goes first (stride
scheduling, Waldspurger and Weihl 1995): a slow model's backlog cannot hold up a fast model, and no class starves. Shares are
counted in seconds of engine time, not in requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from itertools import count
from typing import TYPE_CHECKING

from models.errors import Overloaded
from models.serving.ticket import Ticket

if TYPE_CHECKING:
    from models.serving.loaded import Loaded

WEIGHTS = (6.0, 3.0, 1.0)
"""Shares of engine time of the priority classes high, normal and low, while all of them have work."""
RESERVED_SHARE = 8
"""Each class may always have this part (an eighth) of the places in the queue, however many the others want."""
MIN_COST_SECONDS = 0.002
"""What a run of a model that was never measured is charged, so that it cannot pass for free."""
MIN_GONE = 64
"""Tickets whose callers have gone are swept out once there are this many and they are the larger half."""


def class_of(priority: int) -> int:
    """The class, 0 = high, of a request's priority: 0 is the default and means normal, 1 high, 2 normal, more is low."""
    return 0 if priority == 1 else 1 if priority in (0, 2) else 2


class Flow:
    """Waiting runs of one model version in one class. `running`: its runs under way; `limit`: most of them at once."""

    __slots__ = ("heap", "limit", "rank", "running", "used", "waiting", "weight")

    def __init__(self, rank: int, limit: int) -> None:
        self.rank = rank
        self.weight = WEIGHTS[rank]
        self.limit = limit
        self.heap: list[tuple[float, int, Ticket]] = []
        self.used = 0.0
        self.waiting = 0
        self.running = 0


class RunQueue:
    """Bounded by `places`. `estimate(ticket)`: seconds that its run will take. Not safe for threads: callers lock."""

    def __init__(self, places: int, threads: int, estimate: Callable[[Ticket], float]) -> None:
        self._places = places
        self._threads = threads
        self._estimate = estimate
        self._flows: dict[tuple[Loaded, int], Flow] = {}
        self._numbers = count()
        self._used = 0.0  # of the flow that was served last: where a flow that wakes up begins
        self._gone = 0
        self._waiting = [0] * len(WEIGHTS)
        self.backlog = 0.0  # seconds of engine time that wait

    def __len__(self) -> int:
        return sum(self._waiting)

    def admit(self, ticket: Ticket, now: float) -> None:
        """Add a run. Raises Overloaded when its class has no place left, or it would not be made in time."""
        rank = class_of(ticket.priority)
        self._check_place(rank)
        key = (ticket.loaded, rank)
        flow = self._flows.get(key)
        seconds = self._estimate(ticket)
        ahead = self._ahead(flow)
        if now + ahead + seconds > ticket.deadline:
            raise Overloaded(
                f"{ahead * 1e3:.0f} ms of work wait before this request, which has {(ticket.deadline - now) * 1e3:.0f} ms left",
                retry_after=max(ahead, 0.01),
            )
        if flow is None:
            flow = self._flows[key] = Flow(rank, 1 if ticket.loaded.serial else self._threads + 1)
        if flow.waiting == 0:
            # What a flow did not use while it had nothing to do is not owed to it.
            flow.used = max(flow.used, self._used)
        heapq.heappush(flow.heap, (ticket.deadline, next(self._numbers), ticket))
        flow.waiting += 1
        self._waiting[rank] += 1
        ticket.cost = seconds
        self.backlog += seconds

    def _check_place(self, rank: int) -> None:
        reserve = self._places // RESERVED_SHARE
        kept = sum(max(reserve - waiting, 0) for other, waiting in enumerate(self._waiting) if other != rank)
        waiting = len(self)
        if waiting >= self._places - kept and self._waiting[rank] >= reserve:
            raise Overloaded(
                f"{waiting} requests are waiting, no more are accepted",
                retry_after=max(self.backlog / self._threads, 0.05),
            )

    def _ahead(self, flow: Flow | None) -> float:
        """Seconds until a new run of this flow is likely to begin."""
        total = self.backlog / self._threads
        if flow is None or not flow.waiting:
            return 0.0
        own = sum(ticket.cost for _, _, ticket in flow.heap[:1]) * flow.waiting
        rivals = sum(each.weight for each in self._flows.values() if each.waiting) / flow.weight
        return min(total, own * rivals / min(self._threads, flow.limit))

    def pop(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        """The run to make next among the flows whose next run `fits`; its flow counts as running it until `ended`."""
        chosen = None
        for flow in tuple(self._flows.values()):
            self._skip_gone(flow)
            if not flow.heap or flow.running >= flow.limit or not fits(flow.heap[0][2]):
                continue
            if chosen is None or flow.used < chosen.used:
                chosen = flow
        if chosen is None:
            return None
        ticket = heapq.heappop(chosen.heap)[2]
        ticket.taken = True
        self._left(chosen, ticket)
        chosen.running += 1
        self._used = chosen.used
        chosen.used += max(ticket.cost, MIN_COST_SECONDS) / chosen.weight
        return ticket

    def also(self, first: Ticket, rows: int) -> list[Ticket]:
        """Further runs that can be made together with `first`, up to `rows` rows in all, by deadline."""
        flow = self._flows[first.loaded, class_of(first.priority)]
        taken: list[Ticket] = []
        total = first.rows
        while flow.heap and total < rows:
            self._skip_gone(flow)
            if not flow.heap:
                break
            ticket = flow.heap[0][2]
            if ticket.key != first.key or ticket.names != first.names or total + ticket.rows > rows:
                break
            heapq.heappop(flow.heap)
            ticket.taken = True
            self._left(flow, ticket)
            taken.append(ticket)
            total += ticket.rows
        return taken

    def ended(self, ticket: Ticket, seconds: float | None = None) -> None:
        """The run that `pop` gave is over. `seconds`: what it took, charged instead of the estimate."""
        key = (ticket.loaded, class_of(ticket.priority))
        flow = self._flows[key]
        flow.running -= 1
        if seconds is not None:
            flow.used += (seconds - max(ticket.cost, MIN_COST_SECONDS)) / flow.weight
        self._forget_idle(key, flow)

    def _forget_idle(self, key: tuple[Loaded, int], flow: Flow) -> None:
        # Its share is forgotten with it; it begins where the others are when it comes again.
        if not flow.running and not flow.waiting:
            self._flows.pop(key, None)

    def gone(self, ticket: Ticket) -> bool:
        """The caller of a run has gone: if it still waits its place is free at once, and it will not be made (True)."""
        if ticket.gone or ticket.taken:
            ticket.gone = True
            return False
        ticket.gone = True
        ticket.inputs = {}
        key = (ticket.loaded, class_of(ticket.priority))
        flow = self._flows[key]
        self._left(flow, ticket)
        self._gone += 1
        self._forget_idle(key, flow)
        if not self._flows:
            self._gone = 0
        if self._gone > MIN_GONE and self._gone > len(self):
            for each in self._flows.values():
                each.heap = [entry for entry in each.heap if not entry[2].gone]
                heapq.heapify(each.heap)
            self._gone = 0
        return True

    def drain(self) -> Iterable[Ticket]:
        """Take out all that waits."""
        for flow in self._flows.values():
            for _, _, ticket in flow.heap:
                if not ticket.gone:
                    ticket.taken = True
                    self._left(flow, ticket)
                    yield ticket
            flow.heap = []

    def _skip_gone(self, flow: Flow) -> None:
        while flow.heap and flow.heap[0][2].gone:
            heapq.heappop(flow.heap)
            self._gone = max(self._gone - 1, 0)

    def _left(self, flow: Flow, ticket: Ticket) -> None:
        flow.waiting -= 1
        self._waiting[flow.rank] -= 1
        self.backlog = max(self.backlog - ticket.cost, 0.0)
