"""The outermost predictor: counts every request and every error, and traces those worth it.

A request that is not traced costs about a microsecond: two readings of the clock, one lookup, a few appends. Everything
else happens once per 256 requests, per scrape, or when something went wrong.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from models.errors import CallerError, NotFound, TierlineError
from models.serving.index import Duration, ModelIndex, ModelStatistics
from models.serving.meter.registry import OTHER, Counter, Registry
from models.serving.meter.trace import Context, Span, Tracer
from models.serving.meter.track import Track
from models.serving.predictor import InferRequest, InferResponse, Predictor

MAX_TRACKS = 1024
"""Versions of models that are counted apart; a tier above with more is counted together."""
LOCAL = "local"


class Meter:
    """`Predictor` and `Statistics`.

    `tier`: of this node; statistics are of what was computed here. `tracer`: None = nothing is traced, a traceparent is
    passed on as it came. `clock`: monotonic seconds; `wall`: seconds of the epoch.
    """

    def __init__(
        self,
        inner: Predictor,
        registry: Registry,
        index: ModelIndex,
        *,
        tier: str,
        tracer: Tracer | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._infer = inner.infer
        self._registry = registry
        self._index = index
        self._tier = tier
        self._tracer = tracer
        self._clock = clock
        self._wall = wall
        self._tracks: dict[tuple[str, str, str], Track] = {}
        self._overflow: Track | None = None
        self._failures: dict[tuple[str, str], Duration] = {}
        self._errors: dict[tuple[str, str], Counter] = {}
        self._decisions: dict[tuple[str, str], Counter] = {}
        registry.before_collect(self._fold)
        registry.read("inference.model.served", lambda: len(index.names()))

    async def infer(self, request: InferRequest) -> InferResponse:
        """What the predictor within answers or raises. A request that came with a trace gets it back in its answer."""
        tracer = self._tracer
        if tracer is not None:
            if request.trace is not None:
                return await self._traced(tracer, tracer.join(request.trace), request)
            tracer.untraced -= 1
            if tracer.untraced <= 0:
                return await self._traced(tracer, tracer.sample(), request)
        start = self._clock()
        try:
            response = await self._infer(request)
        except BaseException as error:
            self._failed(request, error, start, None)
            raise
        self._answered(request, response, start, None)
        return response

    async def _traced(self, tracer: Tracer, context: Context, request: InferRequest) -> InferResponse:
        came_with_one = request.trace is not None
        request = replace(request, trace=context.header)
        start = self._clock()
        try:
            response = await self._infer(request)
        except BaseException as error:
            self._failed(request, error, start, context)
            raise
        self._answered(request, response, start, context)
        return replace(response, trace=request.trace) if came_with_one else response

    # --- counting --------------------------------------------------------------------------------------------------------

    def _answered(self, request: InferRequest, response: InferResponse, start: float, context: Context | None) -> None:
        now = self._clock()
        track = self._tracks.get((request.model, response.version, response.tier))
        if track is None:
            track = self._track(request.model, response.version, response.tier)
        rows = 1
        if track.rowed is not None:
            array = request.inputs.get(track.rowed)
            if array is not None:
                rows = len(array)
        track.add(now, now - start, response.timings, rows, response.batch)
        if response.reason != LOCAL:
            self._decided(request.model, response)
        late = request.deadline is not None and now > request.deadline
        if context is not None or late or response.degraded:
            self._keep(request, response, now - start, context, wrong=late or response.degraded)

    def _decided(self, model: str, response: InferResponse) -> None:
        counter = self._decisions.get((model, response.reason))
        if counter is None:
            counter = self._registry.counter("router.decision.count", model=model, reason=response.reason)
            if len(self._decisions) < MAX_TRACKS:
                self._decisions[model, response.reason] = counter
        counter.add()
        if response.degraded:
            # Such an answer has waited for another machine: asking the registry is fine.
            self._registry.counter("inference.request.degraded", model=model).add()

    def _failed(self, request: InferRequest, error: BaseException, start: float, context: Context | None) -> None:
        seconds = self._clock() - start
        kind = kind_of(error)
        model, version = self._asked_for(request)
        counter = self._errors.get((model, kind))
        if counter is None:
            counter = self._registry.counter("inference.request.errors", model=model, error=kind)
            self._errors[model, kind] = counter
        counter.add()
        if version is not None:
            failures = self._failures.setdefault((model, version), Duration())
            failures.count += 1
            failures.ns += int(seconds * 1e9)
        # What the caller did wrong or no longer wants is the caller's to look into, unless it is traced anyway.
        wrong = not isinstance(error, (CallerError, asyncio.CancelledError))
        if self._tracer is not None and (context is not None or wrong):
            context = context or self._tracer.catch()
            if context is not None:
                span = Span(context, self._tracer.started(seconds), seconds, model, version or "", "", "", kind)
                self._tracer.keep(span, wrong=wrong)

    def _keep(
        self, request: InferRequest, response: InferResponse, seconds: float, context: Context | None, *, wrong: bool
    ) -> None:
        tracer = self._tracer
        if tracer is None:
            return
        context = context or tracer.catch()
        if context is not None:
            timings = response.timings
            span = Span(
                context,
                tracer.started(seconds),
                seconds,
                request.model,
                response.version,
                response.tier,
                response.reason,
                degraded=response.degraded,
                queue=timings.get("queue"),
                compute=timings.get("compute"),
            )
            tracer.keep(span, wrong=wrong)

    def _track(self, model: str, version: str, tier: str) -> Track:
        """A track that is counted for the first time; beyond the bound one for all the others."""
        if tier == self._tier:
            self._retire_old(model)
        if len(self._tracks) < MAX_TRACKS:
            rowed = self._rowed(model, version) if tier == self._tier else None
            track = Track(self._registry, rowed, model=model, version=version, tier=tier)
            self._tracks[model, version, tier] = track
            return track
        if self._overflow is None:
            self._overflow = Track(self._registry, None, model=OTHER, version=OTHER, tier=OTHER)
        return self._overflow

    def _retire_old(self, model: str) -> None:
        """A new version answers: those that can no longer be asked for would only pile up, one a swap."""
        try:
            versions = self._index.describe(model, None).versions
        except TierlineError:
            versions = ()
        for key in [key for key in self._tracks if key[0] == model and key[2] == self._tier and key[1] not in versions]:
            del self._tracks[key]
            self._failures.pop((key[0], key[1]), None)
            self._registry.retire(model=key[0], version=key[1])

    def _rowed(self, model: str, version: str) -> str | None:
        try:
            inputs = self._index.describe(model, version).inputs
        except TierlineError:
            return None  # it has just been replaced
        return next((spec.name for spec in inputs if spec.shape[:1] == (-1,)), None)

    def _asked_for(self, request: InferRequest) -> tuple[str, str | None]:
        """Model and version to count a failure for: callers may invent names, which must not become labels."""
        try:
            versions = self._index.describe(request.model, None).versions
        except TierlineError:
            return OTHER, None
        version = request.version or versions[-1]
        return request.model, version if version in versions else None

    def _fold(self) -> None:
        for track in self._tracks.values():
            track.fold()
        if self._overflow is not None:
            self._overflow.fold()

    # --- statistics ------------------------------------------------------------------------------------------------------

    def statistics(self, model: str | None, version: str | None) -> Sequence[ModelStatistics]:
        """Of what is served here. Raises NotFound."""
        names = self._index.names() if model is None else (model,)
        found = []
        for name in names:
            versions = self._index.describe(name, None).versions
            if version is not None and version not in versions:
                raise NotFound(f"model '{name}' has no version '{version}' here; served: {', '.join(versions)}")
            found += [self._of(name, each) for each in versions if version in (None, each)]
        return found

    def _of(self, model: str, version: str) -> ModelStatistics:
        statistics = ModelStatistics(model, version)
        stats = statistics.inference_stats
        failures = self._failures.get((model, version))
        if failures is not None:
            stats["fail"] = replace(failures)
        track = self._tracks.get((model, version, self._tier))
        if track is None or track.last is None:
            return statistics
        track.fold()
        stats["success"] = replace(track.success)
        stats["queue"] = replace(track.queued)
        stats["compute_infer"] = replace(track.computed)
        stats["cache_hit"] = replace(track.hit)
        stats["cache_miss"] = replace(track.missed)
        statistics.inference_count = track.rows
        statistics.execution_count = round(track.runs)
        statistics.last_inference = int((self._wall() - (self._clock() - track.last)) * 1e3)
        return statistics


def _kinds(kind: type[TierlineError]) -> Mapping[type[BaseException], str]:
    """Every error of the tree -> its name as a label."""
    known: dict[type[BaseException], str] = {kind: re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()}
    for each in kind.__subclasses__():
        known |= _kinds(each)
    return known


_KINDS = {**_kinds(TierlineError), asyncio.CancelledError: "cancelled", GeneratorExit: "cancelled"}


def kind_of(error: BaseException) -> str:
    """The error's class as a label, from a closed list."""
    return next((_KINDS[kind] for kind in type(error).__mro__ if kind in _KINDS), "unexpected")
