"""The client for an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from models.client.address import Address, PathText, parse_address
from models.client.answer import Answer, Metadata, ModelState, ModelStatistics
from models.client.asking import Known, check_connections, check_timeout, make_budget, make_calls, make_request
from models.client.calls import AsyncTransport, Call
from models.client.http_async import AsyncHttp
from models.client.retries import Retries
from models.client.tensors import Inputs, as_sent, as_wanted
from models.errors import DeadlineExceeded, NotFound, NotReady, TierlineError, Unreachable

T = TypeVar("T")


class AsyncClient:
    """As `Client`, with the same names, for one event loop; every call is a coroutine and may be cancelled.

    Options as those of `Client`.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 5.0,
        connect_timeout: float = 1.0,
        ca: PathText | None = None,
        certificate: PathText | None = None,
        key: PathText | None = None,
        max_connections: int = 16,
        retries: int | Retries = 0,
    ) -> None:
        address = parse_address(url, ca=ca, certificate=certificate, key=key)
        self._timeout = check_timeout(timeout)
        self._calls = make_calls(address, token)
        self._transport = _transport(address, check_connections(max_connections), connect_timeout, ca, certificate, key)
        self._budget = make_budget(retries)
        self._known = Known()

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str | None = None,
        outputs: Sequence[str] = (),
        timeout: float | None = None,
        min_confidence: float | None = None,
        priority: int = 0,
        id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        trace: str | None = None,
    ) -> Answer:
        """The model's answer, within `timeout` seconds. Arguments and errors as those of `Client.infer`."""
        deadline = self._deadline(timeout)
        arrays = as_sent(inputs)
        if arrays is not None:
            request = make_request(model, arrays, version, outputs, min_confidence, priority, id, parameters, trace)
            return await self._run(self._calls.infer(request), deadline)
        known = self._known.get(model, version)
        if known is None:
            known = self._known.put(model, version, await self._run(self._calls.metadata(model, version), deadline))
        arrays = as_wanted(inputs, known)
        request = make_request(model, arrays, version, outputs, min_confidence, priority, id, parameters, trace)
        try:
            return await self._run(self._calls.infer(request), deadline)
        except TierlineError as error:
            self._known.forget(model, version, error)
            raise

    async def live(self, *, timeout: float | None = None) -> bool:
        return await self._is_well(self._calls.live(), timeout)

    async def ready(
        self, model: str | None = None, *, version: str | None = None, timeout: float | None = None
    ) -> bool:
        return await self._is_well(self._calls.ready(model, version), timeout)

    async def metadata(self, model: str, *, version: str | None = None, timeout: float | None = None) -> Metadata:
        return await self._run(self._calls.metadata(model, version), self._deadline(timeout))

    async def models(self, *, timeout: float | None = None) -> list[str]:
        states = await self._run(self._calls.index(True), self._deadline(timeout))
        return sorted({state.name for state in states})

    async def index(self, *, ready_only: bool = False, timeout: float | None = None) -> list[ModelState]:
        return await self._run(self._calls.index(ready_only), self._deadline(timeout))

    async def load(self, model: str, *, timeout: float | None = None) -> None:
        await self._run(self._calls.load(model), self._deadline(timeout))

    async def unload(self, model: str, *, timeout: float | None = None) -> None:
        await self._run(self._calls.unload(model), self._deadline(timeout))

    async def config(
        self, model: str, *, version: str | None = None, timeout: float | None = None
    ) -> Mapping[str, Any]:
        return await self._run(self._calls.config(model, version), self._deadline(timeout))

    async def statistics(
        self, model: str | None = None, *, version: str | None = None, timeout: float | None = None
    ) -> Sequence[ModelStatistics]:
        return await self._run(self._calls.statistics(model, version), self._deadline(timeout))

    async def close(self) -> None:
        """Close every connection; calls under way and later ones fail with Unreachable."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self._timeout if timeout is None else check_timeout(timeout))

    async def _is_well(self, call: Call[bool], timeout: float | None) -> bool:
        try:
            return await self._transport.run(call, self._deadline(timeout))
        except (Unreachable, NotReady, DeadlineExceeded, NotFound):
            return False

    async def _run(self, call: Call[T], deadline: float) -> T:
        budget = self._budget
        if budget is None or not call.repeatable:
            return await self._transport.run(call, deadline)
        budget.begin()
        tried = 0
        while True:
            try:
                return await self._transport.run(call, deadline)
            except TierlineError as error:
                pause = budget.pause(tried, error, deadline - time.monotonic())
                if pause is None:
                    raise
            await asyncio.sleep(pause)
            tried += 1


def _transport(
    address: Address,
    size: int,
    connect_timeout: float,
    ca: PathText | None,
    certificate: PathText | None,
    key: PathText | None,
) -> AsyncTransport:
    if address.grpc:
        from models.client.grpc_async import AsyncGrpc

        return AsyncGrpc(address, ca=ca, certificate=certificate, key=key)
    return AsyncHttp(address.endpoint, size=size, connect_timeout=connect_timeout)
