"""Counts what a predictor answers, and asks the previous version about a few of the same inputs, off the request path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from models.contract import is_finite
from models.errors import DeadlineExceeded, EngineFailure
from models.manifest import confidence_of
from models.serving.cores import give_way
from models.serving.loaded import Loaded
from models.serving.predictor import InferRequest, InferResponse, Predictor
from models.serving.quality import BASELINE_ANSWERS, Record
from models.serving.quality_watch import QualityWatch
from models.tensor import Array

LOOK_EVERY = 8
"""Of a newcomer's answers, one in this many is looked through for NaN: a large output takes longer than all else here."""
SHADOW_NICE = 15
"""Behind everything that serves, which runs at 0 to 5."""


class Watched:
    """`Predictor` around `here`. `previous(model)`: the version that a newcomer replaced, while it is still loaded.

    Costs a dictionary lookup and two histogram updates per answer; more only while a version is new.
    """

    def __init__(
        self,
        here: Predictor,
        quality: QualityWatch,
        previous: Callable[[str], Loaded | None],
        *,
        busy: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._here = here
        self._quality = quality
        self._shadow = Shadow(previous, busy, clock)
        self._clock = clock

    async def infer(self, request: InferRequest) -> InferResponse:
        """As the predictor inside."""
        began = 0.0 if request.deadline is None else self._clock()
        try:
            answer = await self._here.infer(request)
        except (EngineFailure, DeadlineExceeded) as error:
            self._failed(request, error, began)
            raise
        record = self._quality.live.get(answer.model)
        if record is not None and record.version == answer.version and record.package == answer.package:
            record.add(answer.timings["compute"])
            if record.answers > BASELINE_ANSWERS:
                self._quality.age(record)
            if self._quality.newcomers:
                self._look(record, request, answer)
        return answer

    async def close(self) -> None:
        """Begin no more comparisons; the one under way keeps its session open until it is over."""
        self._shadow.close()

    def _failed(self, request: InferRequest, error: Exception, began: float) -> None:
        record = self._quality.live.get(request.model)
        if record is None or request.version not in (None, record.version):
            return
        if isinstance(error, EngineFailure):
            record.errors += 1
        elif request.deadline is None or request.deadline - began > self._quality.patience.get(request.model, 0.0):
            # A caller who gives no time at all must not be able to take a version back.
            record.late += 1

    def _look(self, record: Record, request: InferRequest, answer: InferResponse) -> None:
        newcomer = self._quality.newcomers.get(answer.model)
        if newcomer is None or newcomer.record is not record:
            return
        rules = self._quality.rules
        # A confidence of exactly 0 is what scores that are not finite are read as.
        if record.answers <= rules.watch_answers and (record.answers % LOOK_EVERY == 1 or answer.confidence == 0.0):
            record.looked += 1
            if not _all_finite(answer.outputs) and _all_finite(request.inputs):
                record.not_finite += 1
        if rules.shadow and record.compared < rules.shadow_answers:
            self._quality.can_compare |= self._shadow.offer(record, request, answer, rules.shadow_share)


class Shadow:
    """One comparison at a time, in a thread behind all others, as long as it takes no more than its share of one core."""

    def __init__(
        self, previous: Callable[[str], Loaded | None], busy: Callable[[], bool], clock: Callable[[], float]
    ) -> None:
        self._previous = previous
        self._busy = busy
        self._clock = clock
        self._thread: ThreadPoolExecutor | None = None
        self._under_way = False
        self._closed = False
        self._due = 0.0
        self._of: Record | None = None
        self._seen: set[bytes] = set()

    def offer(self, record: Record, request: InferRequest, answer: InferResponse, share: float) -> bool:
        """Compare this answer, unless one is being compared, it is too early, or others wait for a thread. Whether it is."""
        now = self._clock()
        if self._under_way or self._closed or now < self._due or self._busy():
            return False
        previous = self._previous(answer.model)
        # A session that takes one run at a time may still be answering what it began with.
        if previous is None or previous.in_flight or previous.retired:
            return False
        names = comparable(previous, answer.outputs)
        if not names:
            return False
        if self._thread is None:
            self._thread = ThreadPoolExecutor(
                1, thread_name_prefix="tierline-shadow", initializer=give_way, initargs=(SHADOW_NICE,)
            )
        if self._of is not record:
            self._of, self._seen = record, set()
        self._under_way = True
        previous.acquire()
        previous.in_threads += 1
        work = asyncio.get_running_loop().run_in_executor(
            self._thread, _compare, previous, request.inputs, names, answer.outputs, self._seen
        )
        work.add_done_callback(lambda done: self._done(done, previous, record, answer.confidence, now, share))
        return True

    def close(self) -> None:
        self._closed = True
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _done(
        self,
        work: asyncio.Future[Compared | None],
        previous: Loaded,
        record: Record,
        confidence: float | None,
        began: float,
        share: float,
    ) -> None:
        self._under_way = False
        now = self._clock()
        self._due = now + (now - began) / share
        previous.in_threads -= 1
        previous.release()
        found = None if work.cancelled() or work.exception() is not None else work.result()
        if found is not None:
            record.compare(found.differs, found.seconds)
            if confidence is not None and found.confidence is not None:
                record.pair(confidence, found.confidence)


def comparable(previous: Loaded, outputs: Mapping[str, Array]) -> list[str]:
    """Outputs that mean the same in any version: the classes behind the confidence, and labels (integers, text, truth).

    Other numbers may differ because the new version is better: they are not judged.
    """
    rule = previous.confidence
    names = [name for name in previous.output_names if name in outputs]
    return [name for name in names if outputs[name].dtype.kind in "iubO" or (rule is not None and rule.output == name)]


class Compared(NamedTuple):
    """`differs`: whether the previous version says something else; `seconds`: of its run; `confidence`: 0..1, or None."""

    differs: bool
    seconds: float
    confidence: float | None


def _compare(
    previous: Loaded, inputs: Mapping[str, Array], names: list[str], outputs: Mapping[str, Array], seen: set[bytes]
) -> Compared | None:
    """In the shadow's thread; None when it cannot say, or was asked this before: who repeats himself is one witness."""
    digest = blake2b(digest_size=16)
    for array in inputs.values():
        # Objects (texts) have no bytes of their own worth hashing.
        digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).data)
    if digest.digest() in seen:
        return None
    began = time.perf_counter()
    try:
        before = dict(zip(names, previous.session.run(inputs, names), strict=True))
    except Exception:  # noqa: BLE001 - inputs that only the new version takes, or a session that is closing
        return None
    seconds = time.perf_counter() - began
    seen.add(digest.digest())
    rule = previous.confidence
    confidence = confidence_of(rule, before) if rule is not None and rule.output in before else None
    differs = any(not _agree(outputs[name], array) for name, array in before.items())
    return Compared(differs, seconds, confidence)


def _agree(new: Array, old: Array) -> bool:
    if new.dtype.kind == "f" and old.dtype.kind == "f":
        if not new.shape or not old.shape or not new.size or not old.size:
            return True
        return bool(np.array_equal(new.argmax(axis=-1), old.argmax(axis=-1)))
    return bool(np.array_equal(new, old))


def _all_finite(arrays: Mapping[str, Array]) -> bool:
    return all(is_finite(array) for array in arrays.values())
