"""pytest fixtures: `pytest_plugins = ["sync.chaos.fixtures"]` in your conftest.py.

They are loaded by that line alone and not through an entry point, which would put them into every pytest run of every
environment Tierline is installed in. Each fixture is a factory; when the test ends, every fault that was made by it and did
not fire fails the test.

    def test_the_edge_answers_while_the_cloud_is_gone(chaos_proxy, chaos_fault):
        cloud = chaos_proxy("127.0.0.1:8000")
        with cloud.suffering(chaos_fault("black-hole")):
            ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import pytest

from sync.chaos import processes
from sync.chaos.faults import BlackHole, Corrupt, Drip, Fault, HalfOpen, Lag, LinkCut, Reset
from sync.chaos.http_faults import Answer503, SlowBody
from sync.chaos.threaded import ThreadedProxy

FAULTS: dict[str, Callable[..., Fault]] = {
    fault.name: fault for fault in (LinkCut, Lag, Drip, HalfOpen, BlackHole, Reset, Corrupt, Answer503, SlowBody)
}


class MakeProxy(Protocol):
    def __call__(self, to: str, *, seed: int = 0) -> ThreadedProxy: ...


class MakeFault(Protocol):
    def __call__(self, name: str, **parameters: object) -> Fault: ...


@pytest.fixture
def chaos_proxy() -> Iterator[MakeProxy]:
    """`chaos_proxy("host:port" or URL, seed=0)`: an open proxy, closed after the test."""
    with ExitStack() as proxies:

        def make(to: str, *, seed: int = 0) -> ThreadedProxy:
            return proxies.enter_context(ThreadedProxy(to, seed=seed))

        yield make


@pytest.fixture
def chaos_fault() -> Iterator[MakeFault]:
    """`chaos_fault("lag", delay=0.2)`: a fault by the name `tierline chaos` has for it, with the class's parameters."""
    made: list[Fault] = []

    def make(name: str, **parameters: object) -> Fault:
        if name not in FAULTS:
            raise ValueError(f"no fault {name!r}; there are {', '.join(sorted(FAULTS))}")
        made.append(FAULTS[name](**parameters))
        return made[-1]

    yield make
    for fault in made:
        fault.insist()


@pytest.fixture
def chaos_pause() -> Callable[[int], AbstractContextManager[None]]:
    """`with chaos_pause(pid):` the process stands still; NeverFired when it did not."""
    return processes.paused


@pytest.fixture
def chaos_kill() -> Callable[[int], None]:
    """`chaos_kill(pid)`: kill -9; NeverFired when it was dead before."""
    return processes.kill
