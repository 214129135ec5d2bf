"""The proxy for code that is not asynchronous: it runs in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

from sync.chaos.faults import Fault
from sync.chaos.proxy import Proxy, Tell

CALL_SECONDS = 10.0

T = TypeVar("T")


class ThreadedProxy:
    """`with ThreadedProxy(url) as proxy:`, then `with proxy.suffering(Lag(0.2)): ...`. Arguments as of `Proxy`."""

    def __init__(self, to: str, *, listen: str = "127.0.0.1:0", seed: int = 0, tell: Tell = lambda event: None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="chaos proxy", daemon=True)
        self._proxy = Proxy(to, listen=listen, seed=seed, tell=tell)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._call(self._proxy.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._call(self._proxy.__aexit__(None, None, None))
        finally:
            self._stop()

    @property
    def address(self) -> tuple[str, int]:
        return self._proxy.address

    @property
    def accepted(self) -> int:
        """Connections so far."""
        return self._proxy.accepted

    @property
    def open_connections(self) -> int:
        return self._proxy.open_connections

    def url(self, scheme: str = "http") -> str:
        return self._proxy.url(scheme)

    @contextmanager
    def suffering(self, fault: Fault) -> Iterator[Fault]:
        """The fault is on inside the block. Raises NeverFired at its end when nothing came the fault's way."""
        self.begin(fault)
        try:
            yield fault
        finally:
            self.end()
        fault.insist()

    def begin(self, fault: Fault) -> None:
        self._call(self._proxy.begin(fault))

    def end(self) -> Fault:
        return self._call(self._proxy.end())

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_SECONDS)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_SECONDS)
        self._loop.close()
