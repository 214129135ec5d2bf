"""Rows are run together only where it pays and where they leave each other alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from models.errors import EngineFailure
from models.serving.batching import measure_batching
from models.tensor import Array, TensorSpec

X, Y = TensorSpec("x", "FP32", (-1, 4)), TensorSpec("y", "FP32", (-1, 4))
SAMPLE = {"x": np.ones((1, 4), np.float32)}


class Session:
    """Computes `function` and takes `seconds(rows)` for it."""

    serial = False

    def __init__(self, function: Callable[[Array], Array], seconds: Callable[[int], float]) -> None:
        self.inputs, self.outputs = (X,), (Y,)
        self._function = function
        self._seconds = seconds

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        ends = time.perf_counter() + self._seconds(len(inputs["x"]))
        answer = self._function(inputs["x"])
        while time.perf_counter() < ends:
            pass
        return [answer]

    def stop(self) -> bool:
        return False

    def close(self) -> None:
        return


def double(x: Array) -> Array:
    return x * 2


def by_call(rows: int) -> float:
    return 1e-4


def by_row(rows: int) -> float:
    return 3e-4 * rows


def measured(
    function: Callable[[Array], Array] = double, seconds: Callable[[int], float] = by_call, **changes: Any
) -> Any:
    arguments = {"inputs": (X,), "outputs": (Y,), "sample": SAMPLE, **changes}
    return measure_batching(Session(function, seconds), **arguments)


def test_a_model_whose_cost_is_in_the_call_is_batched() -> None:
    found = measured()
    assert found.rows == 128
    assert "of a row alone" in found.reason


def test_a_model_whose_cost_is_in_the_rows_is_not_and_says_so() -> None:
    found = measured(seconds=by_row)
    assert found.rows == 1
    assert "not worth it" in found.reason


def test_a_batch_stays_within_a_quarter_of_the_promised_latency() -> None:
    found = measured(seconds=lambda rows: 1e-3 + 1e-4 * rows)
    assert 1 < found.rows < 64
    assert found.times[found.rows] <= 0.0025


def over_the_batch(x: Array) -> Array:
    return x - x.mean(axis=0, keepdims=True)


def refuses_two(x: Array) -> Array:
    if len(x) > 1:
        raise EngineFailure("one at a time")
    return x


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"function": over_the_batch}, "influence each other"),
        ({"function": lambda x: x[:1]}, "influence each other"),
        ({"function": refuses_two}, "refuses more than one row"),
        ({"inputs": (TensorSpec("x", "FP32", (1, 4)),)}, "input 'x' has no free first dimension"),
        ({"outputs": (TensorSpec("y", "FP32", (4,)),)}, "output 'y' has no free first dimension"),
        ({"inputs": (TensorSpec("x", "BYTES", (-1, 4)),)}, "input 'x' is text"),
        ({"inputs": ()}, "no inputs"),
        ({"sample": None}, "no inputs are known"),
    ],
)
def test_where_rows_cannot_be_put_together_it_is_off_and_says_why(changes: Any, reason: str) -> None:
    found = measured(**changes)
    assert found.rows == 1
    assert reason in found.reason
