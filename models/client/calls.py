"""The seam between what is asked and how it travels: a protocol makes a `Call`, a transport runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from models.client.answer import Answer, Metadata, ModelState, ModelStatistics
from models.serving.predictor import InferRequest

T = TypeVar("T")


class Call(Generic[T]):
    """One exchange whose answer is a T. `repeatable`: doing it twice is the same as once, so it may be sent again."""

    repeatable: bool


class Calls(Protocol):
    """Every call of the Open Inference Protocol, for one transport. `version` None = the one being served."""

    def infer(self, request: InferRequest) -> Call[Answer]: ...
    def live(self) -> Call[bool]: ...
    def ready(self, model: str | None, version: str | None) -> Call[bool]: ...
    def metadata(self, model: str, version: str | None) -> Call[Metadata]: ...
    def index(self, ready_only: bool) -> Call[list[ModelState]]: ...
    def load(self, model: str) -> Call[None]: ...
    def unload(self, model: str) -> Call[None]: ...
    def config(self, model: str, version: str | None) -> Call[Mapping[str, Any]]: ...
    def statistics(self, model: str | None, version: str | None) -> Call[Sequence[ModelStatistics]]: ...


class Transport(Protocol):
    """Runs calls, from any thread. `deadline`: seconds of `time.monotonic`."""

    def run(self, call: Call[T], deadline: float) -> T:
        """Raises errors of `models.errors` only."""
        ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """Runs calls in one event loop. `deadline`: seconds of `time.monotonic`."""

    async def run(self, call: Call[T], deadline: float) -> T: ...

    async def close(self) -> None: ...
