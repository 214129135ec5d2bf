"""More models than memory: which loaded versions stay when a budget is set, and how one that left comes back.

A version that can be loaded again may be closed when another needs the room: the least recently used first, never one with
runs in flight. A request for it waits until it is loaded again, at most until its deadline; however many ask, it is loaded
once, in a thread. A version that was just loaded keeps its place for four times what its loading took, so that models which
do not fit together take turns at serving instead of loading all the time. Room is given first come, first served, but a large
version that waits for it does not hold up those that fit: they may pass it a bounded number of times.

All methods belong to one event loop; only loading leaves it, one version after the other, so that each can be measured.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from math import inf
from typing import NamedTuple

from models.errors import DeadlineExceeded, NotReady, Overloaded, PackageError
from models.serving.aside import loading_threads
from models.serving.drive import Parked
from models.serving.flight import Flight
from models.serving.loaded import Loaded
from models.serving.memory import resident_bytes
from models.serving.registered import Opener, Registered

log = logging.getLogger("tierline.residency")

LOAD_SECONDS = 600.0
"""Longest wait for one version to load, with those loading before it: minutes, for files of gigabytes on slow disks."""
MAX_WAITERS = 256
"""Requests that may wait for one version to come back: each holds its input tensors in memory."""
ROOM_SECONDS = 0.005
"""How often it is looked whether there is room for those that wait for it."""
HOLD_FACTOR = 4.0
"""A version keeps its place for this many times its loading time: at most a fifth of the time goes to loading."""
MIN_HOLD_SECONDS = 0.25
MAX_HOLD_SECONDS = 30.0
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0
"""How soon a version that could not be loaded again is tried once more; doubled each time, with half of it left to chance."""
MEGABYTE = 1_000_000
STOPPING = "this node is stopping"


class MemoryUse(NamedTuple):
    """Bytes, and counts since the start. `budget`: None = no bound. `used`: by versions that are loaded or loading."""

    budget: int | None
    used: int
    resident: int
    registered: int
    loads: int
    evictions: int


class Opened(NamedTuple):
    """`grown`: bytes by which the process grew; `seconds`: what loading and warming took."""

    loaded: Loaded
    grown: int
    seconds: float


class Residency:
    """`budget`: bytes that loaded versions may cost together, None = no bound. `retire`: takes a version out of use, and
    closes it when its last run is over."""

    def __init__(
        self,
        *,
        budget: int | None,
        retire: Callable[[Registered, Loaded], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = budget
        self._retire = retire
        self._clock = clock
        self._members: dict[Registered, None] = {}
        self._flights: dict[Registered, Flight] = {}
        self._waiting: dict[Registered, Flight] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._pool = loading_threads(1)
        self._reserved = 0
        self._closed = False
        self._loads = 0
        self._evictions = 0

    def use(self) -> MemoryUse:
        resident = sum(each.loaded is not None for each in self._members)
        return MemoryUse(self.budget, self._used(), resident, len(self._members), self._loads, self._evictions)

    # --- by an operator's word -----------------------------------------------------------------------------------------

    async def open(self, name: str, opener: Opener, *, floor: int, stated: int | None) -> Registered:
        """Load a version for the first time, whether or not others can make room: a swap holds both for a moment.

        `floor`: the least that it can cost, in bytes, whatever is measured; `stated`: what the operator says it costs.
        Raises what `opener` raises, NotReady after `LOAD_SECONDS`, or PackageError when it alone is above the budget.
        """
        need = stated or floor
        self._check_fits(need)
        self._make_room(need, self._clock(), held=False, enough=False)
        self._reserved += need
        try:
            opened = await self._load(opener, False)
        finally:
            self._reserved -= need
        registered = Registered(name, opened.loaded, opener=opener, cost=stated or max(floor, opened.grown))
        registered.arrived(opened.loaded, self._clock(), opened.seconds)
        try:
            self._check_fits(registered.cost)
        except PackageError:
            self.drop(registered)
            raise
        self._members[registered] = None
        self._make_room(0, self._clock(), held=False, enough=False, keep=registered)
        return registered

    def drop(self, registered: Registered) -> None:
        """It is served no more, under no name."""
        registered.gone = True
        self._members.pop(registered, None)
        if registered.loaded is not None:
            self._retire(registered, registered.loaded)

    def evict(self, registered: Registered) -> None:
        """Close it until it is asked for."""
        loaded = registered.left()
        if loaded is not None:
            self._evictions += 1
            self._retire(registered, loaded)

    async def close(self) -> None:
        """Load no more; those who wait get NotReady."""
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        flights = list(self._flights.values())
        tasks = [flight.task for flight in flights if flight.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- by a request --------------------------------------------------------------------------------------------------

    async def bring(self, registered: Registered, deadline: float) -> None:
        """Return when it is loaded, or no longer served. `deadline`: monotonic seconds.

        Raises DeadlineExceeded, Overloaded when too many wait, or NotReady when it cannot be loaded now.
        """
        now = self._clock()
        if deadline <= now:
            raise DeadlineExceeded(f"the deadline of this request for '{registered.name}' had passed before it was run")
        if self._closed:
            raise NotReady(STOPPING)
        if now < registered.retry_at:
            raise NotReady(registered.problem)
        flight = self._flights.get(registered) or self._take_off(registered)
        if len(flight.waiters) >= MAX_WAITERS:
            raise Overloaded(f"{MAX_WAITERS} requests wait for model '{registered.name}' to be loaded")
        loop = asyncio.get_running_loop()
        waiter: Parked[None] = Parked(loop)
        flight.waiters.add(waiter)
        timer = loop.call_later(deadline - now, lambda: waiter.fail(_late(registered, flight)))
        try:
            await waiter
        finally:
            timer.cancel()
            flight.waiters.discard(waiter)

    def _take_off(self, registered: Registered) -> Flight:
        flight = self._flights[registered] = Flight(self._clock())
        flight.task = asyncio.get_running_loop().create_task(self._fly(registered, flight))
        return flight

    async def _fly(self, registered: Registered, flight: Flight) -> None:
        reason = STOPPING
        try:
            reason = await self._reload(registered, flight)
        finally:
            del self._flights[registered]
            if registered.problem:
                pause = max(registered.retry_at - self._clock(), MIN_RETRY_SECONDS / 2)
                asyncio.get_running_loop().call_later(pause, self._retry, registered)
            flight.land(reason)

    def _retry(self, registered: Registered) -> None:
        """Unasked: whoever watches the health of a model that failed sends it no requests."""
        if registered.problem and not (self._closed or registered.gone or registered in self._flights):
            self._take_off(registered)

    async def _reload(self, registered: Registered, flight: Flight) -> str:
        """Why it could not be loaded, "" when it is or need not be any more."""
        self._waiting[registered] = flight
        self._give_room()
        try:
            if not await flight.room:
                return ""
            flight.loading = True
            opened = await self._load(registered.opener, True)
        except Exception as error:  # noqa: BLE001 - whatever a file or a framework does, those who wait must learn of it
            return self._failed(registered, error)
        finally:
            self._waiting.pop(registered, None)
            if flight.has_room:
                self._reserved -= registered.cost
        if registered.gone:
            self._retire(registered, opened.loaded)
        else:
            registered.arrived(opened.loaded, self._clock(), opened.seconds)
        return ""

    def _give_room(self) -> None:
        """To those that wait for it, first come, first served, except that what fits now may pass what does not, so often.

        Called when one begins to wait, and every `ROOM_SECONDS` while any does.
        """
        now = self._clock()
        passed: list[Flight] = []
        least, open_to_all = inf, True
        for registered, flight in list(self._waiting.items()):
            if flight.room.done():
                continue
            # What costs as much as one that found no room finds none either.
            if open_to_all and registered.cost < least and self._make_room(registered.cost, now, since=flight.since):
                del self._waiting[registered]
                self._reserved += registered.cost
                flight.room.set_result(True)
                for each in passed:
                    each.overtaken, each.overtaken_at = each.overtaken + 1, now
            elif registered.gone or not flight.waiters:
                del self._waiting[registered]
                flight.room.set_result(False)
            else:
                least = min(least, registered.cost)
                open_to_all = open_to_all and flight.may_be_overtaken(now)
                passed.append(flight)
        if self._waiting and self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(ROOM_SECONDS, self._look)

    def _look(self) -> None:
        self._looking = None
        self._give_room()

    def _failed(self, registered: Registered, error: Exception) -> str:
        registered.attempts += 1
        pause = min(MIN_RETRY_SECONDS * 2 ** (registered.attempts - 1), MAX_RETRY_SECONDS)
        problem = f"model '{registered.name}' ({registered.identity}) could not be loaded again: {error}"
        registered.retry_at = self._clock() + pause * random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries, no secret
        if problem != registered.problem:
            log.error("%s", problem)
        registered.problem = problem
        return problem

    # --- inside --------------------------------------------------------------------------------------------------------

    async def _load(self, opener: Opener, measured: bool) -> Opened:
        if self._closed:
            raise NotReady(STOPPING)
        work = asyncio.get_running_loop().run_in_executor(self._pool, open_measured, opener, measured)
        try:
            await asyncio.wait((work,), timeout=LOAD_SECONDS)
        finally:
            if not work.done():
                work.add_done_callback(_close_unwanted)
        if work.cancelled():
            raise NotReady(STOPPING)
        if not work.done():
            raise NotReady(f"it was not loaded within {LOAD_SECONDS:g} s")
        self._loads += 1
        return work.result()

    def _used(self) -> int:
        return self._reserved + sum(each.cost for each in self._members if each.loaded is not None)

    def _check_fits(self, cost: int) -> None:
        if self.budget is not None and cost > self.budget:
            have, want = self.budget / MEGABYTE, cost / MEGABYTE
            raise PackageError(f"it needs about {want:.1f} MB of memory, more than the whole budget of {have:.1f} MB")

    def _make_room(
        self,
        need: int,
        now: float,
        *,
        since: float = inf,
        held: bool = True,
        enough: bool = True,
        keep: Registered | None = None,
    ) -> bool:
        """Evict until `need` more bytes are within the budget; whether they are.

        `since`: when the one that needs them began to wait. `held`: leave those that were loaded a moment ago. `enough`:
        evict nothing unless it is enough.
        """
        if self.budget is None:
            return True
        over = self._used() + need - self.budget
        chosen = []
        for each in sorted(self._members, key=Registered.last_used):
            if over <= 0:
                break
            if each is not keep and each.is_idle and not (held and now < each.loaded_at + _hold(each, since)):
                chosen.append(each)
                over -= each.cost
        if over <= 0 or not enough:
            for each in chosen:
                self.evict(each)
        return over <= 0


def open_measured(opener: Opener, measured: bool) -> Opened:
    """In a thread: load and warm. Other work of the process is measured with it: hence `floor` and `stated`."""
    before, start = resident_bytes(), time.monotonic()
    loaded = opener(measured)
    return Opened(loaded, max(resident_bytes() - before, 0), time.monotonic() - start)


def _close_unwanted(work: asyncio.Future[Opened]) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().loaded.session.close()


def _hold(registered: Registered, since: float) -> float:
    """Seconds for which it keeps its place against one that waits since then; those that overtook it keep theirs least."""
    if registered.loaded_at > since:
        return MIN_HOLD_SECONDS
    return min(max(HOLD_FACTOR * registered.load_seconds, MIN_HOLD_SECONDS), MAX_HOLD_SECONDS)


def _late(registered: Registered, flight: Flight) -> DeadlineExceeded:
    doing = "was still being loaded" if flight.loading else "waited for room in the memory budget"
    return DeadlineExceeded(f"model '{registered.name}' {doing} at the deadline of this request")
