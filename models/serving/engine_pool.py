"""The threads that run long models, each taking the next run from one queue.

One thread more than asked for takes only short runs, so that a model slow enough to hold all others cannot hold up a quick
one. Where fewer cores may be used than there are threads, fewer runs are made at once. Engine
threads give way to the event loop's thread (a higher nice value): it answers the fast models.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from models.errors import DeadlineExceeded, EngineFailure, NotReady, TierlineError
from models.serving.cores import give_way, usable_cores
from models.serving.loaded import Loaded
from models.serving.queue import RunQueue
from models.serving.ticket import Run, Ticket
from models.tensor import Array

log = logging.getLogger("tierline.engine")

EXPRESS_SECONDS = 0.005
"""Longest run, by its estimate, that the extra thread takes."""
COUNT_SECONDS = 0.1
"""How often the cores are counted that this process may use: supervisors change that while it runs."""
WAIT_SECONDS = 1.0
"""A thread looks up this often although nobody woke it."""
STOP_SECONDS = 2.0
"""How long a run that was stopped may take to end before its thread is given up."""
MAX_LOST = 4
"""Threads that may be lost to runs which cannot be stopped; after that their models are refused and nothing is replaced."""
STOPPING = "this node is stopping"

Landed = Callable[[Sequence[Ticket], "Run | TierlineError | Sequence[Run | TierlineError]"], None]
"""Told in the loop how the runs of some tickets ended: one run for all of them, one error for all, or one of either each."""

_Ended = tuple[list[Ticket], "Run | TierlineError | list[Run | TierlineError]"]


class EnginePool:
    """`threads` for runs of any length and one for short ones. `places`: runs that may wait; see `RunQueue`.

    `threads` None = one for each core that this process may use; when it may use fewer later on, as many runs at once.
    """

    def __init__(
        self, threads: int | None, places: int, landed: Landed, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._adapts = threads is None
        self._threads = self._most_at_once = threads or usable_cores()
        self._count_due = 0.0
        self._queue = RunQueue(places, self._threads, lambda ticket: ticket.loaded.pace * ticket.rows)
        self._landed = landed
        self._clock = clock
        self._lock = threading.Lock()
        self._started = False
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: deque[_Ended] = deque()
        self._telling = False
        self._workers: list[_Worker] = []  # the express one last
        self._lost = 0
        self._watch: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Runs that wait."""
        return len(self._queue)

    @property
    def backlog(self) -> float:
        """Seconds of engine time that wait."""
        return self._queue.backlog

    def submit(self, ticket: Ticket) -> None:
        """In the loop. Raises Overloaded, or NotReady once closed."""
        if not self._started:
            self._start()
        with self._lock:
            if self._closed:
                raise NotReady(STOPPING)
            now = self._clock()
            if self._adapts and now >= self._count_due:
                self._count_due = now + COUNT_SECONDS
                self._most_at_once = min(self._threads, usable_cores())
            self._queue.admit(ticket, now)
            short, (room_for_short, room_for_long) = _is_short(ticket), self._room()
            if room_for_short if short else room_for_long:
                self._wake_one(short)
        if self._watch is None and self._loop is not None:
            self._watch = self._loop.call_later(WAIT_SECONDS, self._look_after)

    def _wake_one(self, short: bool) -> None:
        """Under the lock: let one idle thread look for work, if any may take it. Waking all costs more than a small run."""
        for worker in self._workers:
            if worker.idle and (short or not worker.express):
                worker.wake()
                return

    def drop(self, ticket: Ticket) -> bool:
        """Nobody waits for this run any more. Whether it was taken back: it will not be made, and nobody will be told."""
        with self._lock:
            return self._queue.gone(ticket)

    def close(self) -> None:
        """Refuse what waits; runs under way end by themselves."""
        with self._lock:
            self._closed = True
            waiting = list(self._queue.drain())
            for worker in self._workers:
                if worker.idle:
                    worker.wake()
        if self._watch is not None:
            self._watch.cancel()
        for ticket in waiting:
            self._landed([ticket], NotReady(STOPPING))

    def stop_running(self) -> None:
        """End the runs under way, where the engine can."""
        for worker in tuple(self._workers):
            loaded = worker.running
            if loaded is not None:
                worker.stopped = True
                loaded.stops += 1
                loaded.session.stop()

    # --- the threads -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._started = True
        self._loop = asyncio.get_running_loop()
        for _ in range(self._threads):
            self._hire(express=False)
        self._hire(express=True)

    def _hire(self, *, express: bool) -> None:
        worker = _Worker(express)
        thread = threading.Thread(target=self._work, args=(worker,), name="tierline-engine", daemon=True)
        self._workers.append(worker)
        self._workers.sort(key=lambda each: each.express)
        thread.start()

    def _work(self, worker: _Worker) -> None:
        give_way()
        ended: list[_Ended] = []
        while True:
            tickets = self._next(worker, ended)
            while tickets is None:
                if worker.over:
                    return
                worker.wait()
                tickets = self._next(worker, ())
            ended = self._run(worker, tickets)

    def _run(self, worker: _Worker, tickets: list[Ticket]) -> list[_Ended]:
        first = tickets[0]
        due = worker.since + first.cost
        late = [ticket for ticket in tickets if ticket.gone or ticket.deadline < due]
        ended: list[_Ended] = []
        if late:
            tickets = [ticket for ticket in tickets if ticket not in late]
            ended.append((late, DeadlineExceeded(f"'{first.loaded.identity}' was not reached within the deadline")))
        if tickets:
            ended.append((tickets, run_together(tickets, self._clock, worker)))
        return ended

    def _next(self, worker: _Worker, ended: Sequence[_Ended]) -> list[Ticket] | None:
        """Hand over what has ended and take the next run: the lock once for both, the loop woken last, so that this thread is
        back in an engine, or asleep, when the loop needs the interpreter. None = there is nothing to do now."""
        tell = False
        with self._lock:
            if ended:
                tell = not self._telling
                self._telling = True
                self._ended.extend(ended)
                self._end(worker)
            worker.over = worker.over or self._closed
            tickets = None if worker.over else self._take(worker)
            worker.idle = tickets is None
            if ended and len(self._queue):
                # What waits may be more than this thread may take, or than it will.
                short, long = self._room()
                if short or long:
                    self._wake_one(short=not long)
        if tell:
            self._tell()
        return tickets

    def _end(self, worker: _Worker) -> None:
        first, worker.first = worker.first, None
        assert first is not None
        worker.running = None
        self._queue.ended(first, self._clock() - worker.since)
        if worker.lost:
            # It came back after all.
            worker.lost = first.loaded.stuck = False
        if worker.replaced:
            worker.over = True
            self._workers.remove(worker)
            self._lost -= 1

    def _take(self, worker: _Worker) -> list[Ticket] | None:
        short, long = self._room()
        long = long and not worker.express
        if not (short or long):
            return None
        ticket = self._queue.pop(_always if short and long else _is_short if short else _is_long)
        if ticket is None:
            return None
        tickets = [ticket]
        if ticket.loaded.batching.rows > 1:
            tickets += self._queue.also(ticket, ticket.loaded.batching.rows)
        worker.first, worker.running, worker.since, worker.stopped = ticket, ticket.loaded, self._clock(), False
        return tickets

    def _room(self) -> tuple[bool, bool]:
        """Whether a short and a long run may begin.

        On one core more runs than one only take turns: each would end later, and none sooner. On several one more keeps them
        busy while another's outcome is handed over. One short run may always: it must not wait for long ones.
        """
        short = long = 0
        for worker in self._workers:
            if worker.first is not None and not worker.lost:
                if _is_short(worker.first):
                    short += 1
                else:
                    long += 1
        most = self._most_at_once
        if most == 1:
            return not short, not short and not long
        return short < max(1, most - long + 1), long < most

    def _tell(self) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._land)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    # --- in the loop -----------------------------------------------------------------------------------------------------

    def _land(self) -> None:
        with self._lock:
            self._telling = False
            ended, self._ended = self._ended, deque()
        for tickets, outcome in ended:
            self._landed(tickets, outcome)

    def _look_after(self) -> None:
        """Once a second while runs are made: stop those that take too long."""
        self._watch = None
        now = self._clock()
        busy = False
        for worker in tuple(self._workers):
            loaded = worker.running
            if loaded is None or worker.lost:
                continue
            busy = True
            over = now - worker.since - loaded.max_run_seconds
            if over > 0 and not worker.stopped:
                worker.stopped = True
                loaded.stops += 1
                stopped = loaded.session.stop()
                log.warning("%s ran for more than %g s: %s", loaded.identity, loaded.max_run_seconds,
                            "stopped" if stopped else "it cannot be stopped")  # fmt: skip
            elif over > STOP_SECONDS:
                self._give_up(worker, loaded)
        if (busy or len(self._queue)) and not self._closed and self._loop is not None:
            self._watch = self._loop.call_later(WAIT_SECONDS, self._look_after)

    def _give_up(self, worker: _Worker, loaded: Loaded) -> None:
        worker.lost = True
        loaded.stuck = True
        if self._lost < MAX_LOST:
            self._lost += 1
            worker.replaced = True
            log.error("%s is stuck: it is refused from here on, its thread is replaced", loaded.identity)
            self._hire(express=worker.express)


class _Worker:
    """One thread: what it runs and since when. `idle`: it waits to be woken; `over`: it ends. `lost`: its run
    cannot be stopped; `replaced`: another thread was started for it."""

    __slots__ = ("_gate", "express", "first", "idle", "lost", "over", "replaced", "running", "since", "stopped")

    def __init__(self, express: bool) -> None:
        self.express = express
        self.first: Ticket | None = None
        self.running: Loaded | None = None
        self.since = 0.0
        self.stopped = self.lost = self.replaced = self.idle = self.over = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def wake(self) -> None:
        """Under the pool's lock, once for each time that it is idle."""
        self.idle = False
        # Open already when it was woken as its wait ran out: it will not wait then.
        if self._gate.locked():
            self._gate.release()

    def wait(self) -> None:
        """Until it is woken, or a second has passed."""
        self._gate.acquire(timeout=WAIT_SECONDS)


def run_together(
    tickets: list[Ticket], clock: Callable[[], float], worker: _Worker | None = None
) -> Run | TierlineError | list[Run | TierlineError]:
    """One run for all of them; one by one when that fails, so that a bad request never fails its neighbours.

    `worker`: whose thread this is, None = the event loop's.
    """
    first = tickets[0]
    if len(tickets) == 1:
        return run_one(first, clock, worker)
    try:
        start = clock()
        outputs = first.loaded.session.run(concatenated(tickets), first.names)
        return Run(outputs, start, clock(), sum(ticket.rows for ticket in tickets))
    except Exception as error:  # noqa: BLE001 - whatever it was, each alone will tell
        if worker is None and first.loaded.inline_elements == 0:
            # It was stopped because it held the loop: each alone would hold it again.
            return EngineFailure(f"the run was stopped: {error}")
        return [run_one(ticket, clock, worker) for ticket in tickets]


def run_one(ticket: Ticket, clock: Callable[[], float], worker: _Worker | None) -> Run | TierlineError:
    loaded = ticket.loaded
    stops = loaded.stops
    start = clock()
    try:
        try:
            return Run(loaded.session.run(ticket.inputs, ticket.names), start, clock())
        except EngineFailure as error:
            if loaded.stops == stops:
                loaded.refuse(error)
                return error
            if worker is None or worker.stopped:
                return EngineFailure(f"the run was stopped after {clock() - start:.1f} s")
        # Another run of this session was stopped, and this one with it: it has its time again.
        worker.since = clock()
        return Run(loaded.session.run(ticket.inputs, ticket.names), start, clock())
    except TierlineError as error:
        return error
    except Exception as error:
        # A thread must outlive what nobody expected, and its caller must hear of it.
        log.exception("%s failed unexpectedly", loaded.identity)
        failure = EngineFailure("the engine failed unexpectedly")
        failure.__cause__ = error
        return failure


def concatenated(tickets: Sequence[Ticket]) -> dict[str, Array]:
    return {name: np.concatenate([ticket.inputs[name] for ticket in tickets]) for name in tickets[0].inputs}


def _always(ticket: Ticket) -> bool:
    return True


def _is_short(ticket: Ticket) -> bool:
    return 0 < ticket.cost <= EXPRESS_SECONDS  # 0 = never measured


def _is_long(ticket: Ticket) -> bool:
    return not _is_short(ticket)
