"""Fakes of the data plane, for tests of whatever is built on a `Predictor`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from msgspec.structs import replace

from models.errors import TierlineError
from models.serving.predictor import InferRequest, InferResponse
from models.tensor import Array


class StaticPredictor:
    """Answers at once, always the same. `requests` are those it was asked, oldest first."""

    def __init__(
        self,
        outputs: Mapping[str, Array],
        *,
        package: str = "fake",
        version: str = "1",
        tier: str = "edge",
        confidence: float | None = None,
    ) -> None:
        self.requests: list[InferRequest] = []
        self._answer = InferResponse(
            outputs=outputs, model="", package=package, version=version, tier=tier, confidence=confidence
        )

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        return replace(self._answer, model=request.model, id=request.id)


class FailingPredictor:
    """Raises the same error every time."""

    def __init__(self, error: TierlineError) -> None:
        self.requests: list[InferRequest] = []
        self._error = error

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        raise self._error


class SlowPredictor:
    """Answers as `inner` does, once `release` is set. `asked` is set by the first request; `cancelled` counts those dropped."""

    def __init__(self, inner: StaticPredictor | FailingPredictor) -> None:
        self.release = asyncio.Event()
        self.asked = asyncio.Event()
        self.cancelled = 0
        self._inner = inner

    async def infer(self, request: InferRequest) -> InferResponse:
        self.asked.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await self._inner.infer(request)
