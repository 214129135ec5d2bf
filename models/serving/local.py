"""Answers from the models loaded here: check, run, answer.

A model whose run is short enough answers inside the event loop, with no task and no future; any other runs in a small
thread pool, so that a slow model never stalls a fast one. The caller's wait ends at its deadline; the run itself cannot be
stopped, so its session stays open until it is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from models.errors import DeadlineExceeded, EngineFailure, InvalidRequest, NotReady, Overloaded
from models.manifest import confidence_of
from models.serving.loaded import INLINE_SECONDS, Loaded
from models.serving.predictor import InferRequest, InferResponse
from models.serving.repository import Repository
from models.tensor import Array, check_tensor

log = logging.getLogger("tierline.local")

MAX_RUN_SECONDS = 60.0
"""Longest wait for a run whose request carries no deadline."""
STALL_SECONDS = 5 * INLINE_SECONDS
"""A run in the event loop that takes longer (1 ms) is looked into: some models' cost is in the values, not in the shape."""
LONG_STALL_SECONDS = 20 * STALL_SECONDS
"""After one this long (20 ms, beyond what a busy machine takes from a thread) nothing enters the loop until that is done."""
CLOSE_SECONDS = 10.0
"""How long `close` waits for runs under way."""
STOPPING = "this node is stopping"

_Run = tuple[list[Array], float, float]  # outputs, when the run started, when it ended


class Local:
    """`Predictor` over a repository.

    `threads`: runs of long models at once. `max_waiting`: runs under way or waiting for a thread, beyond which requests
    are refused: each holds its input tensors in memory.
    """

    def __init__(
        self,
        repository: Repository,
        tier: str,
        *,
        threads: int = 2,
        max_waiting: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lookup = repository.lookup
        self._tier = tier
        self._threads = threads
        self._max_waiting = max_waiting
        self._clock = clock
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tierline-engine")
        self._waiting = 0
        self._tried: set[Loaded] = set()
        self._idle = asyncio.Event()

    async def infer(self, request: InferRequest) -> InferResponse:
        """Raises NotFound, InvalidRequest, DeadlineExceeded, Overloaded, NotReady, or EngineFailure."""
        loaded = self._lookup(request.model, request.version)
        elements = check(loaded, request)
        now = self._clock()
        if request.deadline is not None and request.deadline <= now:
            raise DeadlineExceeded(f"the deadline of this request for '{request.model}' had passed before it was run")
        names = _wanted(loaded, request.outputs)
        if loaded.runs_here(elements):
            run = self._run_here(loaded, request, names)
        else:
            run = await self._run_in_pool(loaded, request, names, now)
        return self._answer(loaded, request, names, run, now)

    def _run_here(self, loaded: Loaded, request: InferRequest, names: Sequence[str]) -> _Run:
        inputs = request.inputs
        start = self._clock()
        try:
            outputs = loaded.session.run(inputs, names)
        except EngineFailure as error:
            loaded.refuse(error)
            loaded.failed()
            raise
        ended = self._clock()
        loaded.answered(inputs, outputs)
        if ended - start > STALL_SECONDS:
            self._look_into(loaded, inputs, names, ended - start)
        if request.deadline is not None and ended > request.deadline:
            raise DeadlineExceeded(f"'{request.model}' took {(ended - start) * 1e3:.1f} ms, longer than was left")
        return outputs, start, ended

    def _look_into(self, loaded: Loaded, inputs: Mapping[str, Array], names: Sequence[str], seconds: float) -> None:
        """A run held the loop: by its own work, or because the machine was busy elsewhere?

        The same inputs are tried again in a thread; if they cost as much there, this version never enters the loop again.
        """
        allowed = 0
        if seconds > LONG_STALL_SECONDS:
            allowed, loaded.inline_elements = loaded.inline_elements, 0
        elif loaded in self._tried:
            return
        self._tried.add(loaded)
        self._begin(loaded)
        # Not in the pool, where the trial could wait behind long runs.
        trial = asyncio.get_running_loop().run_in_executor(None, _processor_seconds, loaded, inputs, names)
        trial.add_done_callback(lambda done: self._settle(loaded, allowed, done))

    def _settle(self, loaded: Loaded, allowed: int, trial: asyncio.Future[float]) -> None:
        """In the loop, once a trial is over. `allowed`: what the version may have back, 0 = it was not stopped meanwhile."""
        self._tried.discard(loaded)
        if trial.cancelled() or trial.exception() is not None or trial.result() > STALL_SECONDS:
            loaded.inline_elements = 0
            log.warning("%s is no longer run in the event loop: its cost is in the values", loaded.identity)
        elif allowed:
            loaded.inline_elements = allowed
        self._end(loaded)

    async def _run_in_pool(self, loaded: Loaded, request: InferRequest, names: Sequence[str], now: float) -> _Run:
        if self._waiting >= self._max_waiting:
            backlog = self._waiting * min(loaded.seconds, 1.0) / self._threads
            raise Overloaded(f"{self._waiting} runs are waiting, no more are accepted", retry_after=max(backlog, 0.05))
        landed = self._submit(loaded, request.inputs, names)
        timeout = MAX_RUN_SECONDS if request.deadline is None else request.deadline - now
        try:
            await asyncio.wait((landed,), timeout=timeout)
            if landed.done():
                return landed.result()
        finally:
            landed.cancel()
        raise DeadlineExceeded(f"'{request.model}' did not answer within {timeout * 1e3:.1f} ms")

    def _submit(self, loaded: Loaded, inputs: Mapping[str, Array], names: Sequence[str]) -> asyncio.Future[_Run]:
        """Start a run in the pool. Cancelling the future takes the run back if it has not begun."""
        loop = asyncio.get_running_loop()
        landed: asyncio.Future[_Run] = loop.create_future()
        try:
            run = self._pool.submit(_timed, loaded, inputs, names, self._clock)
        except RuntimeError as error:
            raise NotReady(STOPPING) from error
        self._begin(loaded)
        landed.add_done_callback(lambda _: run.cancel())
        run.add_done_callback(lambda done: loop.call_soon_threadsafe(self._land, loaded, inputs, landed, done))
        return landed

    def _land(
        self, loaded: Loaded, inputs: Mapping[str, Array], landed: asyncio.Future[_Run], run: Future[_Run]
    ) -> None:
        """In the loop, once a run is over or taken back: by its caller, who has gone, or by `close`."""
        if not run.cancelled():
            self._count(loaded, inputs, run)
        if not landed.done():
            _copy(run, landed)
        self._end(loaded)

    def _begin(self, loaded: Loaded) -> None:
        loaded.acquire()
        self._waiting += 1

    def _end(self, loaded: Loaded) -> None:
        self._waiting -= 1
        if self._waiting == 0:
            self._idle.set()
        loaded.release()

    def _count(self, loaded: Loaded, inputs: Mapping[str, Array], run: Future[_Run]) -> None:
        error = run.exception()
        if error is None:
            loaded.learn(inputs)
            loaded.answered(inputs, run.result()[0])
        elif isinstance(error, EngineFailure):
            loaded.failed()

    def _answer(
        self, loaded: Loaded, request: InferRequest, names: Sequence[str], run: _Run, asked: float
    ) -> InferResponse:
        arrays, started, ended = run
        outputs = dict(zip(names, arrays, strict=True))
        rule = loaded.confidence
        confidence = confidence_of(rule, outputs)
        if rule is not None and request.outputs and rule.output not in request.outputs:
            del outputs[rule.output]
        return InferResponse(
            outputs=outputs,
            model=request.model,
            package=loaded.identity.package,
            version=loaded.identity.version,
            tier=self._tier,
            confidence=confidence,
            timings={"queue": started - asked, "compute": ended - started},
            id=request.id,
        )

    async def close(self) -> None:
        """Accept no more runs, refuse those that have not begun and wait for those under way, at most 10 s."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._waiting:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), CLOSE_SECONDS)
            except TimeoutError:
                log.warning("%d runs did not end within %g s", self._waiting, CLOSE_SECONDS)


def check(loaded: Loaded, request: InferRequest) -> int:
    """Number of input elements. Raises InvalidRequest, naming the tensor, unless the engine can be asked.

    Inputs whose first dimension may be of any size are rows of one batch and must agree on how many; none may be empty.
    """
    inputs = request.inputs
    if len(inputs) != len(loaded.expected):
        raise _wrong_inputs(loaded, inputs)
    elements, rows = 0, -1
    for name, dtype, batched, tail, spec in loaded.expected:
        array = inputs.get(name)
        if array is None:
            raise _wrong_inputs(loaded, inputs)
        got = array.shape
        if not (batched and got and array.dtype is dtype and got[1:] == tail):
            check_tensor(spec, array)
        size = array.size
        if size == 0:
            raise InvalidRequest(f"input '{name}': shape {list(got)} has no elements")
        elements += size
        if batched:
            if rows not in (-1, got[0]):
                raise InvalidRequest(f"input '{name}': has {got[0]} rows, another input has {rows}")
            rows = got[0]
    for name in request.outputs:
        if name not in loaded.output_names:
            raise InvalidRequest(f"output '{name}' is unknown; this model has {', '.join(loaded.output_names)}")
    return elements


def _wrong_inputs(loaded: Loaded, inputs: Mapping[str, Array]) -> InvalidRequest:
    wanted = [spec.name for spec in loaded.inputs]
    for name in inputs:
        if name not in wanted:
            return InvalidRequest(f"input '{name}' is unknown; this model takes {', '.join(wanted)}")
    missing = ", ".join(f"'{name}'" for name in wanted if name not in inputs)
    return InvalidRequest(f"input {missing} is missing")


def _wanted(loaded: Loaded, outputs: Sequence[str]) -> Sequence[str]:
    """Outputs to compute: those asked for, each once, and the one that confidence is read from."""
    if not outputs:
        return loaded.output_names
    rule = loaded.confidence
    return tuple(dict.fromkeys((*outputs, rule.output) if rule else outputs))


def _timed(loaded: Loaded, inputs: Mapping[str, Array], names: Sequence[str], clock: Callable[[], float]) -> _Run:
    start = clock()
    try:
        outputs = loaded.session.run(inputs, names)
    except EngineFailure as error:
        loaded.refuse(error)
        raise
    return outputs, start, clock()


def _processor_seconds(loaded: Loaded, inputs: Mapping[str, Array], names: Sequence[str]) -> float:
    """Of this thread alone: other work on the machine does not count."""
    start = time.thread_time()
    loaded.session.run(inputs, names)
    return time.thread_time() - start


def _copy(run: Future[_Run], landed: asyncio.Future[_Run]) -> None:
    if run.cancelled():
        landed.set_exception(NotReady(STOPPING))
        return
    error = run.exception()
    if error is None:
        landed.set_result(run.result())
    else:
        landed.set_exception(error)
