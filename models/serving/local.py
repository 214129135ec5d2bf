"""Answers from the models loaded here: check, run, answer.

A model whose run is short enough answers inside the event loop, with no task and no future; any other runs in an engine
thread, so that a slow model never stalls a fast one. Requests that come together are run together where that pays
(`models.serving.batching`). The caller's wait ends at its deadline whatever the run does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from models.errors import DeadlineExceeded, EngineFailure, InvalidRequest, NotReady, TierlineError
from models.manifest import confidence_of
from models.serving.drive import Parked
from models.serving.engine_pool import EnginePool, concatenated
from models.serving.loaded import INLINE_SECONDS, MAX_RUN_SECONDS, Loaded
from models.serving.loop_watch import LoopWatch
from models.serving.predictor import InferRequest, InferResponse
from models.serving.repository import NotResident, Repository
from models.serving.ticket import Run, Ticket
from models.serving.turn import Turn
from models.tensor import Array, check_tensor

log = logging.getLogger("tierline.local")

STALL_SECONDS = 5 * INLINE_SECONDS
"""A run in the event loop that takes longer (1 ms) is looked into: some models' cost is in the values, not in the shape."""
LONG_STALL_SECONDS = 20 * STALL_SECONDS
"""After one this long (20 ms, beyond what a busy machine takes from a thread) nothing enters the loop until that is done."""
PACE_SHARE = 0.2
"""Weight of the latest run in the pace of a model."""
CLOSE_SECONDS = 10.0
"""How long `close` waits for runs under way in all."""
PATIENCE_SECONDS = 5.0
"""How long it waits before it stops them."""


class Local:
    """`Predictor` over a repository.

    `threads`: runs of long models at once, None = one for each core that this process may use. `max_waiting`: runs waiting
    for a thread, beyond which requests are refused: each holds its input tensors in memory.
    """

    def __init__(
        self,
        repository: Repository,
        tier: str,
        *,
        threads: int | None = None,
        max_waiting: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lookup = repository.lookup
        self._resident = repository.resident
        self._tier = tier
        self._clock = clock
        self.pool = EnginePool(threads, max_waiting, self._landed, clock)
        self._watch = LoopWatch(clock)
        self._turn = Turn(self._landed, clock, self._watch)
        self._under_way = 0
        self._tried: set[Loaded] = set()
        self._idle = asyncio.Event()

    async def infer(self, request: InferRequest) -> InferResponse:
        """Raises NotFound, InvalidRequest, DeadlineExceeded, Overloaded, NotReady, or EngineFailure."""
        try:
            loaded = self._lookup(request.model, request.version)
        except NotResident:
            loaded = await self._resident(request.model, request.version, request.deadline)
        elements, rows = check(loaded, request)
        loaded.used = now = self._clock()
        if request.deadline is not None and request.deadline <= now:
            raise DeadlineExceeded(f"the deadline of this request for '{request.model}' had passed before it was run")
        names = _wanted(loaded, request.outputs) if request.outputs else loaded.output_names
        if not loaded.runs_here(elements):
            run = await self._in_pool(loaded, request, names, rows, now)
        elif self._turn.at_once(loaded, rows):
            run = self._run_here(loaded, request, names)
        else:
            ticket = self._ticket(loaded, request, names, rows, now)
            self._turn.gather(ticket)
            run = await ticket.parked
        return self._answer(loaded, request, names, run, now)

    def _run_here(self, loaded: Loaded, request: InferRequest, names: Sequence[str]) -> Run:
        inputs = request.inputs
        stops = loaded.stops
        start = self._clock()
        self._watch.begin()
        self._watch.running = loaded, start
        try:
            outputs = loaded.session.run(inputs, names)
        except EngineFailure as error:
            if loaded.stops == stops:
                loaded.refuse(error)
            loaded.failed()
            raise
        finally:
            self._watch.running = None
        ended = self._clock()
        loaded.answered(inputs, outputs)
        if ended - start > STALL_SECONDS:
            self._look_into(loaded, inputs, names, ended - start)
        if request.deadline is not None and ended > request.deadline:
            raise DeadlineExceeded(f"'{request.model}' took {(ended - start) * 1e3:.1f} ms, longer than was left")
        return Run(outputs, start, ended)

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
        loaded.acquire()
        self._under_way += 1
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

    # --- runs that others make: the end of the turn, or a thread ---------------------------------------------------------

    def _ticket(self, loaded: Loaded, request: InferRequest, names: Sequence[str], rows: int, now: float) -> Ticket:
        if loaded.stuck:
            raise NotReady(f"model '{request.model}' is stuck in a run that cannot be stopped")
        # Where rows may differ in shape only equal ones can be put together.
        tails = tuple([array.shape[1:] for array in request.inputs.values()]) if loaded.fresh_shapes else None
        deadline = now + MAX_RUN_SECONDS if request.deadline is None else request.deadline
        ticket = Ticket(
            loaded, request.inputs, names, rows, tails, deadline, request.priority, Parked(asyncio.get_running_loop())
        )
        loaded.acquire()
        self._under_way += 1
        return ticket

    async def _in_pool(self, loaded: Loaded, request: InferRequest, names: Sequence[str], rows: int, now: float) -> Run:
        ticket = self._ticket(loaded, request, names, rows, now)
        parked = ticket.parked
        loaded.in_threads += 1
        ticket.threaded = True
        try:
            self.pool.submit(ticket)
        except TierlineError:
            self._end(loaded)
            loaded.in_threads -= 1
            raise
        parked.on_cancel = lambda: self._drop(ticket)
        late = DeadlineExceeded(f"'{request.model}' did not answer within {(ticket.deadline - now) * 1e3:.1f} ms")
        timer = asyncio.get_running_loop().call_later(ticket.deadline - now, self._expire, ticket, late)
        try:
            return await parked
        finally:
            timer.cancel()

    def _expire(self, ticket: Ticket, error: TierlineError) -> None:
        self._drop(ticket)
        ticket.parked.fail(error)

    def _drop(self, ticket: Ticket) -> None:
        """Nobody waits any more: what has not begun is taken back, what runs keeps its session open until it is over."""
        if self.pool.drop(ticket):
            self._ended(ticket)

    def _landed(self, tickets: Sequence[Ticket], outcome: Run | TierlineError | Sequence[Run | TierlineError]) -> None:
        """In the loop: how the runs of some tickets ended."""
        if isinstance(outcome, Run):
            self._learn(tickets, outcome)
            if len(tickets) == 1:
                self._give(tickets[0], outcome)
                return
            outputs, started, ended, rows = outcome.outputs, outcome.started, outcome.ended, outcome.rows
            start = 0
            for ticket in tickets:
                stop = start + ticket.rows
                self._give(ticket, Run([array[start:stop] for array in outputs], started, ended, rows))
                start = stop
        elif isinstance(outcome, TierlineError):
            for ticket in tickets:
                self._give(ticket, outcome)
        else:
            for ticket, each in zip(tickets, outcome, strict=True):
                if isinstance(each, Run):
                    self._learn((ticket,), each)
                self._give(ticket, each)

    def _learn(self, tickets: Sequence[Ticket], run: Run) -> None:
        first = tickets[0]
        loaded, seconds = first.loaded, run.ended - run.started
        if first.threaded:
            each = seconds / max(run.rows, first.rows, 1)
            loaded.pace += PACE_SHARE * (each - loaded.pace) if loaded.pace else each
        elif seconds > STALL_SECONDS:
            self._look_into(loaded, concatenated(tickets), first.names, seconds)
        if not loaded.is_trusted:
            loaded.learn(first.inputs)

    def _give(self, ticket: Ticket, outcome: Run | TierlineError) -> None:
        loaded = ticket.loaded
        if isinstance(outcome, Run):
            if loaded.is_trusted:
                loaded.answers += 1
            else:
                loaded.answered(ticket.inputs, outcome.outputs)
            self._ended(ticket)
            if outcome.ended > ticket.deadline:
                ticket.parked.fail(DeadlineExceeded(f"'{loaded.identity}' was done after the deadline"))
            else:
                ticket.parked.give(outcome)
            return
        if isinstance(outcome, EngineFailure):
            loaded.failed()
        self._ended(ticket)
        ticket.parked.fail(outcome)

    def _ended(self, ticket: Ticket) -> None:
        if ticket.threaded:
            ticket.loaded.in_threads -= 1
            # Else the two keep each other, and the version, until the next full collection.
            ticket.parked.on_cancel = None
        self._end(ticket.loaded)

    def _end(self, loaded: Loaded) -> None:
        self._under_way -= 1
        if self._under_way == 0:
            self._idle.set()
        loaded.release()

    def _answer(
        self, loaded: Loaded, request: InferRequest, names: Sequence[str], run: Run, asked: float
    ) -> InferResponse:
        outputs = dict(zip(names, run.outputs, strict=True))
        rule = loaded.confidence
        confidence = None
        if rule is not None:
            confidence = confidence_of(rule, outputs)
            if request.outputs and rule.output not in request.outputs:
                del outputs[rule.output]
        identity = loaded.identity
        return InferResponse(
            outputs=outputs,
            model=request.model,
            package=identity.package,
            version=identity.version,
            tier=self._tier,
            confidence=confidence,
            timings={"queue": run.started - asked, "compute": run.ended - run.started},
            batch=run.rows,
            id=request.id,
        )

    async def close(self) -> None:
        """Accept no more runs, refuse those that have not begun, wait for those under way, and stop what takes too long."""
        self._turn.close()
        self._watch.close()
        self.pool.close()
        for seconds in (PATIENCE_SECONDS, CLOSE_SECONDS - PATIENCE_SECONDS):
            if not self._under_way:
                return
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), seconds)
            except TimeoutError:
                self.pool.stop_running()
        if self._under_way:
            log.warning("%d runs did not end within %g s", self._under_way, CLOSE_SECONDS)


def check(loaded: Loaded, request: InferRequest) -> tuple[int, int]:
    """Number of input elements, and of rows (1 when the model has none).

    Raises InvalidRequest, naming the tensor, unless the engine can be asked. Where rows are run together, inputs must agree
    on how many there are. Whether a tensor may be empty is for the engine to say.
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
        elements += array.size
        if batched:
            if rows not in (-1, got[0]) and loaded.batching.rows > 1:
                raise InvalidRequest(f"input '{name}': has {got[0]} rows, another input has {rows}")
            rows = got[0]
    for name in request.outputs:
        if name not in loaded.output_names:
            raise InvalidRequest(f"output '{name}' is unknown; this model has {', '.join(loaded.output_names)}")
    return elements, (1 if rows < 0 else rows)


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


def _processor_seconds(loaded: Loaded, inputs: Mapping[str, Array], names: Sequence[str]) -> float:
    """Of this thread alone: other work on the machine does not count."""
    start = time.thread_time()
    loaded.session.run(inputs, names)
    return time.thread_time() - start
