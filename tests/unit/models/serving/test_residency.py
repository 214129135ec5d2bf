from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from session_fake import FakeSession, loaded

from models.errors import ContractBreach, DeadlineExceeded, NotFound, NotReady, Overloaded, PackageError
from models.serving import flight
from models.serving import residency as rooms
from models.serving.drive import drive
from models.serving.loaded import Loaded
from models.serving.memory import resident_bytes
from models.serving.model_settings import ModelSettings
from models.serving.registered import Registered
from models.serving.repository import NotResident, Repository

COST = 100


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class File:
    """What loads one version: counts, waits while `gate` is clear, fails while `error` is set."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value
        self.sessions: list[FakeSession] = []
        self.measured: list[bool] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def open(self, measured: bool) -> Loaded:
        self.measured.append(measured)
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.sessions.append(FakeSession(self.value))
        return loaded(self.sessions[-1], inline=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def repository(clock: Clock) -> AsyncIterator[Repository]:
    made = Repository(engines=(), memory_budget=2 * COST, clock=clock)
    yield made
    await made.close()


async def register(repository: Repository, name: str, file: File | None = None, cost: int = COST) -> Registered:
    file = file or File()
    registered = await repository.residency.open(name, file.open, floor=0, stated=cost)
    repository.put(name, {"1": registered}, ModelSettings())
    return registered


def in_memory(repository: Repository) -> list[str]:
    return [name for name in repository.names() if repository.registered(name, None).loaded is not None]


async def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


async def three(repository: Repository, clock: Clock, files: dict[str, File] | None = None) -> None:
    """`a`, `b` and `c` in a budget for two: `a` is left outside, and nobody is held in any more."""
    for name in "abc":
        await register(repository, name, (files or {}).get(name))
        clock.now += 1
    assert in_memory(repository) == ["b", "c"]


# --- who leaves ----------------------------------------------------------------------------------------------------


async def test_the_least_recently_used_version_leaves_and_is_closed(repository: Repository, clock: Clock) -> None:
    files = {name: File() for name in "abc"}
    for name in "ab":
        await register(repository, name, files[name])
        clock.now += 1
    repository.lookup("a", None).used = clock.now
    await register(repository, "c", files["c"])
    assert in_memory(repository) == ["a", "c"]
    await eventually(files["b"].sessions[0].closed.is_set)
    use = repository.residency.use()
    assert (use.used, use.resident, use.registered, use.evictions) == (2 * COST, 2, 3, 1)


async def test_a_version_with_runs_in_flight_never_leaves(repository: Repository, clock: Clock) -> None:
    busy = await register(repository, "a")
    await register(repository, "b")
    clock.now += 1
    repository.lookup("a", None).acquire()
    await register(repository, "c")
    assert in_memory(repository) == ["a", "c"]
    assert busy.loaded is not None
    busy.loaded.release()


async def test_an_operators_load_may_exceed_the_budget_for_as_long_as_all_others_run(
    repository: Repository, clock: Clock
) -> None:
    for name in "ab":
        await register(repository, name)
        repository.lookup(name, None).acquire()
    await register(repository, "c")
    assert in_memory(repository) == ["a", "b", "c"]
    for name in "ab":
        repository.lookup(name, None).release()
    clock.now += 1
    await register(repository, "d")
    assert in_memory(repository) == ["c", "d"]


async def test_without_a_budget_nothing_leaves() -> None:
    repository = Repository(engines=())
    for name in "abcdef":
        await register(repository, name, cost=1 << 40)
    assert len(in_memory(repository)) == 6
    await repository.close()


async def test_what_an_operator_installs_for_good_stays(repository: Repository, clock: Clock) -> None:
    repository.install({"kept": {"1": loaded(FakeSession())}})
    for name in "abc":
        await register(repository, name)
    assert "kept" in in_memory(repository)


async def test_a_version_above_the_whole_budget_is_refused_with_both_numbers(repository: Repository) -> None:
    await register(repository, "a")
    with pytest.raises(PackageError, match=r"3\.0 MB of memory, more than the whole budget of 0\.0 MB"):
        await register(repository, "b", cost=3_000_000)
    assert in_memory(repository) == ["a"]


async def test_a_version_costs_what_loading_it_took_and_at_least_its_floor() -> None:
    repository = Repository(engines=())
    kept: list[bytearray] = []

    def grow(measured: bool) -> Loaded:
        kept.append(bytearray(b"x") * 40_000_000)
        return loaded(FakeSession())

    if resident_bytes():
        large = await repository.residency.open("large", grow, floor=1000, stated=None)
        assert 35e6 < large.cost < 80e6
    small = await repository.residency.open("small", File().open, floor=1 << 40, stated=None)
    assert small.cost == 1 << 40
    await repository.close()


# --- how one comes back --------------------------------------------------------------------------------------------


async def test_one_that_left_is_still_described_and_ready(repository: Repository, clock: Clock) -> None:
    await three(repository, clock)
    with pytest.raises(NotResident):
        repository.lookup("a", None)
    assert repository.describe("a", None).platform == "fake"
    assert repository.is_ready("a", "1")
    assert repository.running()["a"] == "fake/1"
    assert repository.threshold("a") == 0.0


async def test_however_many_ask_it_is_loaded_once(repository: Repository, clock: Clock) -> None:
    files = {"a": File()}
    await three(repository, clock, files)
    files["a"].gate.clear()
    asking = [asyncio.create_task(repository.resident("a", None, None)) for _ in range(20)]
    asking[0].cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking[1].cancel()
    files["a"].gate.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(each) for each in answers[:2]] == [asyncio.CancelledError] * 2
    assert set(answers[2:]) == {repository.lookup("a", None)}
    assert files["a"].measured == [False, True]
    assert in_memory(repository) == ["a", "c"]


async def test_a_request_driven_outside_a_task_is_served_too(repository: Repository, clock: Clock) -> None:
    await three(repository, clock)
    done: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()

    def deliver(result: Loaded | None, error: BaseException | None) -> None:
        if result is not None:
            done.set_result(result)

    asyncio.get_running_loop().call_soon(
        lambda: drive(repository.resident("a", None, None), deliver, asyncio.get_running_loop())
    )
    assert await asyncio.wait_for(done, 5) is repository.lookup("a", None)


async def test_the_wait_ends_at_the_deadline_and_the_load_goes_on(repository: Repository, clock: Clock) -> None:
    files = {"a": File()}
    await three(repository, clock, files)
    files["a"].gate.clear()
    with pytest.raises(DeadlineExceeded, match="'a' was still being loaded"):
        await repository.resident("a", None, clock.now + 0.02)
    files["a"].gate.set()
    await eventually(lambda: "a" in in_memory(repository))
    with pytest.raises(DeadlineExceeded, match="had passed"):
        await repository.resident("b", None, clock.now)


async def test_a_version_just_loaded_keeps_its_place_for_a_while(repository: Repository, clock: Clock) -> None:
    await three(repository, clock)
    for name in "bc":
        repository.registered(name, None).loaded_at = clock.now
    with pytest.raises(DeadlineExceeded, match="'a' waited for room in the memory budget"):
        await repository.resident("a", None, clock.now + 0.02)
    assert in_memory(repository) == ["b", "c"]
    waiting = asyncio.create_task(repository.resident("a", None, clock.now + 30))
    await asyncio.sleep(0)
    clock.now += rooms.MIN_HOLD_SECONDS
    await asyncio.wait_for(waiting, 5)
    assert in_memory(repository) == ["a", "c"]


async def test_the_hold_grows_with_the_time_that_loading_takes(repository: Repository, clock: Clock) -> None:
    await three(repository, clock)
    slow = repository.registered("b", None)
    slow.loaded_at, slow.load_seconds = clock.now - 3.9, 1.0
    repository.lookup("c", None).acquire()
    with pytest.raises(DeadlineExceeded, match="waited for room"):
        await repository.resident("a", None, clock.now + 0.02)
    clock.now += 0.2
    await repository.resident("a", None, clock.now + 30)
    assert in_memory(repository) == ["a", "c"]
    repository.lookup("c", None).release()


async def test_what_the_first_load_measured_and_traffic_taught_holds_for_the_next(
    repository: Repository, clock: Clock
) -> None:
    files = {"a": File()}
    first = await register(repository, "a", files["a"])
    assert first.loaded is not None
    batching = first.loaded.batching
    first.loaded.inline_elements = 7
    repository.residency.evict(first)
    again = await repository.resident("a", None, None)
    assert (again.batching, again.inline_elements) == (batching, 7)


async def test_a_failed_load_is_told_not_repeated_at_once_and_heals_by_itself(
    repository: Repository, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"a": File()}
    await three(repository, clock, files)
    monkeypatch.setattr(rooms, "MIN_RETRY_SECONDS", 0.02)
    files["a"].error = ContractBreach("it is torn")
    for _ in range(3):
        with pytest.raises(NotReady, match=r"'a' \(fake/1\) could not be loaded again: it is torn"):
            await repository.resident("a", None, None)
    assert files["a"].measured == [False, True]
    assert not repository.is_ready("a", None)
    files["a"].error = None
    await eventually(lambda: repository.is_ready("a", None))
    assert "a" in in_memory(repository)


async def test_a_model_unloaded_while_it_comes_back_is_not_found_and_its_session_is_closed(
    repository: Repository, clock: Clock
) -> None:
    files = {"a": File()}
    await three(repository, clock, files)
    files["a"].gate.clear()
    waiting = asyncio.create_task(repository.resident("a", None, None))
    await eventually(lambda: len(files["a"].measured) == 2)
    repository.put("a", {}, ModelSettings())
    files["a"].gate.set()
    with pytest.raises(NotFound):
        await waiting
    await eventually(files["a"].sessions[-1].closed.is_set)


async def test_only_so_many_may_wait(repository: Repository, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MAX_WAITERS", 2)
    files = {"a": File()}
    await three(repository, clock, files)
    files["a"].gate.clear()
    waiting = [asyncio.create_task(repository.resident("a", None, None)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 requests wait for model 'a'"):
        await repository.resident("a", None, None)
    files["a"].gate.set()
    await asyncio.gather(*waiting)


async def test_closing_lets_go_of_those_who_wait(repository: Repository, clock: Clock) -> None:
    files = {"a": File()}
    await three(repository, clock, files)
    files["a"].gate.clear()
    waiting = asyncio.create_task(repository.resident("a", None, None))
    await eventually(lambda: len(files["a"].measured) == 2)
    await repository.residency.close()
    files["a"].gate.set()
    with pytest.raises(NotReady, match="stopping"):
        await waiting
    with pytest.raises(NotReady, match="stopping"):
        await repository.resident("a", None, None)
    await eventually(lambda: len(files["a"].sessions) == 2 and files["a"].sessions[-1].closed.is_set())


async def test_models_that_do_not_fit_together_take_turns_and_all_answer(clock: Clock) -> None:
    repository = Repository(engines=(), memory_budget=COST)
    for name in "ab":
        await register(repository, name, File(float(ord(name))))

    async def ask(name: str) -> None:
        for _ in range(3):
            made = await repository.resident(name, None, time.monotonic() + 10)
            assert isinstance(made.session, FakeSession)
            assert made.session.value == float(ord(name))
            await asyncio.sleep(0.001)

    start = time.monotonic()
    await asyncio.gather(*(ask(name) for name in "abab"))
    assert repository.residency.use().loads <= 4 + (time.monotonic() - start) / rooms.MIN_HOLD_SECONDS
    assert repository.residency.use().used <= COST
    await repository.close()


async def outside(repository: Repository, clock: Clock, **costs: int) -> None:
    """Versions that were loaded once and are out of memory now."""
    for name, cost in costs.items():
        await register(repository, name, cost=cost)
        repository.residency.evict(repository.registered(name, None))
        clock.now += 1


async def looks() -> None:
    """Until whoever waits for room has been looked at several times more."""
    await asyncio.sleep(4 * rooms.ROOM_SECONDS)


async def test_one_that_waits_for_room_does_not_hold_up_what_fits(repository: Repository, clock: Clock) -> None:
    await outside(repository, clock, large=150, small=COST // 2)
    busy = await register(repository, "busy", cost=COST)
    assert busy.loaded is not None
    busy.loaded.acquire()
    waiting = asyncio.create_task(repository.resident("large", None, clock.now + 50))
    await looks()
    await asyncio.wait_for(repository.resident("small", None, clock.now + 50), 5)
    assert (in_memory(repository), waiting.done()) == (["busy", "small"], False)
    clock.now += rooms.MIN_HOLD_SECONDS
    busy.loaded.release()
    await asyncio.wait_for(waiting, 5)
    assert "large" in in_memory(repository)


async def test_one_that_waits_is_overtaken_only_so_often_and_then_let_alone_for_a_while(
    repository: Repository, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "MAX_OVERTAKEN", 2)
    await outside(repository, clock, large=150, a=10, b=10, c=10, d=10)
    busy = await register(repository, "busy", cost=COST)
    assert busy.loaded is not None
    busy.loaded.acquire()
    waiting = [asyncio.create_task(repository.resident("large", None, clock.now + 50))]
    for name in "abcd":
        await looks()
        waiting.append(asyncio.create_task(repository.resident(name, None, clock.now + 50)))
    await looks()
    assert in_memory(repository) == ["a", "b", "busy"]
    clock.now += flight.ALONE_SECONDS
    await asyncio.wait_for(asyncio.gather(*waiting[3:]), 5)
    assert not waiting[0].done()
    waiting[0].cancel()
    busy.loaded.release()


async def test_those_that_overtook_one_keep_their_places_against_it_least(repository: Repository, clock: Clock) -> None:
    await outside(repository, clock, large=180, small=COST // 2)
    busy = await register(repository, "busy", cost=COST)
    assert busy.loaded is not None
    busy.loaded.acquire()
    waiting = asyncio.create_task(repository.resident("large", None, clock.now + 50))
    await looks()
    clock.now += 0.1
    await asyncio.wait_for(repository.resident("small", None, clock.now + 50), 5)
    repository.registered("small", None).load_seconds = 5.0
    clock.now += rooms.MIN_HOLD_SECONDS
    busy.loaded.release()
    await asyncio.wait_for(waiting, 5)
    assert in_memory(repository) == ["large"]


async def test_equals_that_wait_are_served_in_the_order_they_came(repository: Repository, clock: Clock) -> None:
    await outside(repository, clock, first=2 * COST, second=2 * COST)
    busy = await register(repository, "busy")
    assert busy.loaded is not None
    busy.loaded.acquire()
    came: list[str] = []

    async def ask(name: str) -> None:
        await repository.resident(name, None, clock.now + 50)
        came.append(name)
        clock.now += rooms.MIN_HOLD_SECONDS

    waiting = [asyncio.create_task(ask(name)) for name in ("first", "second")]
    await looks()
    clock.now += rooms.MIN_HOLD_SECONDS
    busy.loaded.release()
    await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert came == ["first", "second"]


async def test_room_that_nobody_waits_for_any_more_is_given_to_the_next(repository: Repository, clock: Clock) -> None:
    await outside(repository, clock, left=2 * COST, next=2 * COST)
    busy = await register(repository, "busy")
    assert busy.loaded is not None
    busy.loaded.acquire()
    leaving = asyncio.create_task(repository.resident("left", None, clock.now + 50))
    await looks()
    staying = asyncio.create_task(repository.resident("next", None, clock.now + 50))
    await looks()
    leaving.cancel()
    clock.now += rooms.MIN_HOLD_SECONDS
    await looks()
    busy.loaded.release()
    await asyncio.wait_for(staying, 5)
    assert in_memory(repository) == ["next"]
    assert repository.residency.use().used == 2 * COST


def test_memory_is_read_where_the_system_tells_it() -> None:
    assert (resident_bytes() > 0) == Path("/proc/self/statm").exists()
