"""What a meter is tested with: a small index, a clock that stands still, a predictor that does as it is told."""

from __future__ import annotations

import numpy as np

from models.errors import NotFound
from models.serving.index import ModelDescription
from models.serving.meter.registry import Registry
from models.serving.predictor import InferRequest, InferResponse
from models.tensor import TensorSpec


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Index:
    """Model `m` in versions 1 and 2, rows of four numbers; model `fixed` takes no rows."""

    def __init__(self) -> None:
        self.models = {"m": ((-1, 4), ("1", "2")), "fixed": ((3, 4), ("1",))}

    def names(self) -> list[str]:
        return sorted(self.models)

    def describe(self, model: str, version: str | None) -> ModelDescription:
        shape, versions = self.models.get(model, ((), ()))
        if not versions or version not in (None, *versions):
            raise NotFound(f"no model '{model}' version {version}")
        return ModelDescription(model, "p", versions, "onnx_fp32", (TensorSpec("x", "FP32", shape),), ())

    def is_ready(self, model: str, version: str | None) -> bool:
        return self.describe(model, version) is not None


class Scripted:
    """Takes `seconds` of the clock for each request, then gives `answer` or raises it. `requests`: those it was asked."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds = 0.002
        self.answer: InferResponse | BaseException = InferResponse(
            outputs={}, model="m", package="p", version="2", tier="edge", timings={"queue": 0.0005, "compute": 0.001}
        )
        self.requests: list[InferRequest] = []

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        self.clock.now += self.seconds
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def ask(model: str = "m", rows: int = 1, **fields: object) -> InferRequest:
    return InferRequest(model=model, inputs={"x": np.zeros((rows, 4), np.float32)}, **fields)  # type: ignore[arg-type]


def numbers(registry: Registry) -> dict[str, dict[tuple[str, ...], object]]:
    """Metric -> labels -> value; of a histogram, how many values it has."""
    return {
        family.entry.name: {labels: getattr(number, "count", number) for labels, number in family.series}
        for family in registry.collect()
    }
