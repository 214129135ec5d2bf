"""What one session wants to be told of: other versions of models, and what becomes of jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from models.errors import NotFound, Overloaded, TierlineError
from models.serving.caller import Caller
from models.serving.plane import DataPlane
from models.serving.websocket.envelope import news_text

JobFeed = Callable[[Caller, str, Callable[[Mapping[str, Any]], None]], Callable[[], None]]
"""`feed(caller, job, notify)` calls `notify(event)` once, in the loop and not before it has returned: when the job has ended
or turns out to be none that the caller may know of. What it returns takes that back.

Raises NotFound for a job that the caller may not know of.
"""


class Subscriptions:
    """At most `limit` of them. `feed` None = no jobs are kept here. `send` takes messages of news."""

    def __init__(self, plane: DataPlane, feed: JobFeed | None, limit: int, send: Callable[[bytes], None]) -> None:
        self._plane = plane
        self._feed = feed
        self._limit = limit
        self._send = send
        self._models: dict[str, tuple[str, ...]] = {}  # with the versions told last
        self._jobs: dict[str, Callable[[], None]] = {}  # with what ends them

    def add_model(self, caller: Caller, model: str) -> None:
        """Tell the model's versions now and whenever they change. Raises NotFound, Overloaded."""
        versions = self._plane.describe(caller, model, None).versions
        if model not in self._models:
            self._check_room()
        self._models[model] = versions
        self._send(news_text("model", model=model, versions=versions))

    def add_job(self, caller: Caller, job: str) -> None:
        """Tell what has become of the job, once. Raises NotFound, Overloaded."""
        if self._feed is None:
            raise NotFound("no jobs are kept here")
        if job in self._jobs:
            return
        self._check_room()

        def told(event: Mapping[str, Any]) -> None:
            # Given back first: what the client then asks for finds its room.
            self._jobs.pop(job, None)
            self._send(news_text("job", job=job, event=event))

        self._jobs[job] = self._feed(caller, job, told)

    def remove(self, model: str, job: str) -> None:
        """End both, where there are such."""
        self._models.pop(model, None)
        stop = self._jobs.pop(job, None)
        if stop is not None:
            stop()

    def tell_all(self, caller: Caller) -> None:
        for model in tuple(self._models):
            self.tell(caller, model)

    def tell(self, caller: Caller, model: str) -> None:
        """The model's versions, if they are not those told last; of a model that is gone, that there are none."""
        told = self._models.get(model)
        if told is None:
            return
        try:
            versions = self._plane.describe(caller, model, None).versions
        except TierlineError:
            versions = ()
        if versions != told:
            self._models[model] = versions
            self._send(news_text("model", model=model, versions=versions))

    def clear(self) -> None:
        self._models.clear()
        while self._jobs:
            self._jobs.popitem()[1]()

    def _check_room(self) -> None:
        if len(self._models) + len(self._jobs) >= self._limit:
            raise Overloaded(f"a session has at most {self._limit} subscriptions")
