"""The agent: models in the application's own process, the edge behind them, one call to ask.

    infer -> Router --+-- here: Local -> sessions in this process
                      +-- up:   Remote -> the edge node's data plane

It starts nothing that leaving the block does not stop, and answers from disk alone when the network is gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from device_agent.config import AgentConfig, load_agent_config
from models.engines import available_engines
from models.errors import InvalidRequest, NotFound, NotReady
from models.serving.local import Local
from models.serving.policy_book import PolicyBook
from models.serving.predictor import InferRequest, Predictor
from models.serving.quality_watch import QualityWatch
from models.serving.remote import Remote
from models.serving.repository import Repository
from models.serving.router import Router
from models.serving.watched import Watched
from models.tensor import DTYPES, Array, TensorSpec
from sync.doctor.remote import offer_doctor
from sync.errors import Malformed
from sync.events import ALARM, APPLICATION, encode_body
from sync.member import Member, join
from sync.messages import Capabilities
from sync.version import running_version

TIER = "device"
READY_POLL_SECONDS = 0.02


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What `infer` returns.

    `outputs`: name -> array. `tier`, `package`, `version`: what computed them. `confidence`: 0..1, None when the package
    does not say how to read one. `reason`: a code of `models.policy.Reason`. `latency_ms`: the whole call, as the caller
    saw it. `degraded`: a better tier was wanted and could not be used in time.
    """

    outputs: Mapping[str, Array]
    tier: str
    package: str
    version: str
    confidence: float | None
    reason: str
    latency_ms: float
    degraded: bool


class Agent:
    """Async context manager. Made from a configuration or from the path of its TOML file."""

    def __init__(self, config: AgentConfig | str | PathLike[str]) -> None:
        self._config = config if isinstance(config, AgentConfig) else load_agent_config(Path(config))
        self._stack = AsyncExitStack()
        self._predictor: Predictor | None = None
        self._repository: Repository | None = None
        self._member: Member | None = None

    async def __aenter__(self) -> Self:
        """Load from disk what was active, then join the control plane in the background. Needs no network to succeed."""
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._predictor = None
        await self._stack.aclose()

    async def _start(self, stack: AsyncExitStack) -> None:
        config = self._config
        engines = available_engines()
        quality = QualityWatch(config.node.data / "quality.json")
        repository = Repository(engines=engines, verdicts=config.node.data / "verdicts", quality=quality)
        stack.push_async_callback(repository.close)
        local = Local(repository, TIER, threads=config.threads)
        stack.push_async_callback(local.close)
        watched = Watched(local, quality, repository.replaced, busy=lambda: len(local.pool) > 0)
        stack.push_async_callback(watched.close)
        up = Remote(config.edge, tier="edge") if config.edge else None
        if up is not None:
            stack.push_async_callback(up.close)
        book = PolicyBook(TIER)
        router = Router(watched, up, models=repository, book=book)
        self._member = await stack.enter_async_context(
            join(
                config.node,
                activators={"desired": repository, "policy": book},
                capabilities=Capabilities(
                    tier=TIER, engines=engines, labels=config.node.labels, software=running_version()
                ),
                running=repository.running,
                settings=config.updates,
                on_settings=lambda settings: quality.configure(settings.quality),
                quota=config.store,
                blocks=config.blocks,
            )
        )
        offer_doctor(self._member, "device_agent.doctor", config, repository.running)
        await stack.enter_async_context(router.probing())
        self._repository, self._predictor = repository, router

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        deadline_ms: float | None = None,
        min_confidence: float | None = None,
        outputs: Sequence[str] = (),
        version: str | None = None,
    ) -> Answer:
        """Answer on this device, or from the tier above when confidence asks for it and the deadline allows it.

        `inputs`: name -> array or nested lists, as the model's metadata describes them. Lists for a model that is not on this
        device go up as FP32 when they hold fractions and as INT64 when not: arrays are safer there.
        `deadline_ms`: milliseconds from now, None = the routing policy's default.
        `min_confidence`: 0..1, answers below it are escalated; None = the
        policy's, else the package's threshold. `outputs`: names wanted, () = all.

        Raises InvalidRequest (naming the input), NotFound, DeadlineExceeded, Unreachable: see `models.errors`.
        """
        start = time.monotonic()
        if self._predictor is None:
            raise NotReady("the agent is not running: use it inside 'async with Agent(...)'")
        request = InferRequest(
            model=model,
            inputs={name: self._array(model, name, value) for name, value in inputs.items()},
            version=version,
            outputs=tuple(outputs),
            deadline=None if deadline_ms is None else start + _positive("deadline_ms", deadline_ms) / 1e3,
            min_confidence=_share("min_confidence", min_confidence),
        )
        answer = await self._predictor.infer(request)
        return Answer(
            outputs=answer.outputs,
            tier=answer.tier,
            package=answer.package,
            version=answer.version,
            confidence=answer.confidence,
            reason=str(answer.reason),
            latency_ms=(time.monotonic() - start) * 1e3,
            degraded=answer.degraded,
        )

    @asynccontextmanager
    async def hold(self, reason: str, timeout: float | None = None) -> AsyncIterator[None]:
        """While inside, no update is put in force on this device; what is needed for one is fetched meanwhile.

        `timeout`: seconds after which it counts no longer, None = as long as the settings allow (15 minutes, unless the hub
        says otherwise). A version that turns out bad is taken back nevertheless. Raises InvalidRequest, NotReady.
        """
        if self._member is None:
            raise NotReady("the agent is not running: use it inside 'async with Agent(...)'")
        try:
            release = self._member.hold(reason, timeout)
        except Malformed as error:
            raise InvalidRequest(str(error)) from error
        try:
            await self._member.settled()
            yield
        finally:
            release()

    async def event(
        self,
        kind: str,
        body: bytes | Mapping[str, object],
        *,
        priority: int | None = None,
        ttl: float | None = None,
    ) -> str:
        """Hand over an event for the hub; its id, once it is on this device's disk. It is delivered when the hub is reached.

        `kind`: a word of the application's, which the hub shows as `app.<kind>`, or `alarm`. `body`: at most 48 KiB, JSON when
        it is a mapping. `priority`: 0..9, None = 5, of an alarm 9: higher ones go first and are dropped last. `ttl`: seconds
        after which it is not worth sending.

        Raises NotReady, `sync.errors.Malformed` naming the field, or `sync.errors.StoreFailed`: it is lost, and counted.
        """
        if self._member is None or self._predictor is None:
            raise NotReady("the agent is not running: use it inside 'async with Agent(...)'")
        data = body if isinstance(body, bytes) else encode_body(body)
        return await self._member.outbox.put(
            kind if kind == ALARM else f"{APPLICATION}{kind}", data, priority=priority, ttl=ttl
        )

    def running(self) -> dict[str, str]:
        """Model name -> `package/version` served in this process."""
        return self._repository.running() if self._repository else {}

    @property
    def connected(self) -> bool:
        """Whether the control plane is reachable. Answers do not depend on it."""
        return self._member is not None and self._member.connected

    async def wait_for(self, model: str, timeout: float = 30.0) -> None:
        """Return once `model` is served in this process. Raises NotReady after `timeout` seconds."""
        end = time.monotonic() + timeout
        while model not in self.running():
            if time.monotonic() > end:
                raise NotReady(f"model '{model}' was not delivered within {timeout:g} s")
            await asyncio.sleep(READY_POLL_SECONDS)

    def _array(self, model: str, name: str, value: ArrayLike) -> Array:
        if isinstance(value, np.ndarray):
            return value.astype(np.object_) if value.dtype.kind in "SU" else value
        try:
            array: np.ndarray[Any, Any] = np.asarray(value)
        except ValueError as error:
            raise InvalidRequest(f"input '{name}': {error}") from error
        if array.dtype.kind == "O":
            raise InvalidRequest(f"input '{name}': holds a value that is no number, truth value or text")
        if array.dtype.kind in "SU":
            array = array.astype(np.object_)
        spec = self._spec(model, name)
        if spec is None:
            return array.astype(np.float32) if array.dtype.kind == "f" else array
        return _converted(name, array, DTYPES[spec.datatype])

    def _spec(self, model: str, name: str) -> TensorSpec | None:
        assert self._repository is not None
        try:
            described = self._repository.describe(model, None)
        except NotFound:
            return None
        return next((spec for spec in described.inputs if spec.name == name), None)


def _converted(name: str, array: Array, wanted: np.dtype[Any]) -> Array:
    """Lists come as int64 or float64 whatever the model wants: converted where nothing but precision can be lost."""
    to_float = wanted.kind == "f" and array.dtype.kind in "iuf"
    to_integer = wanted.kind in "iu" and array.dtype.kind in "iu"
    if not (to_float or to_integer or array.dtype.kind == wanted.kind):
        raise InvalidRequest(f"input '{name}': values of {array.dtype} do not fit {wanted}")
    if to_integer and array.size:
        bounds = np.iinfo(wanted)
        if array.min() < bounds.min or array.max() > bounds.max:
            raise InvalidRequest(f"input '{name}': values do not fit {wanted} ({bounds.min} to {bounds.max})")
    return array.astype(wanted)


def _positive(field: str, value: float) -> float:
    if not (value > 0 and isfinite(value)):
        raise InvalidRequest(f"{field}: {value} is not a positive number of milliseconds")
    return value


def _share(field: str, value: float | None) -> float | None:
    if value is not None and not 0 <= value <= 1:
        raise InvalidRequest(f"{field}: {value} is not between 0 and 1")
    return value
