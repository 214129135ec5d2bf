"""What a request's `parameters` may say, checked once for every frontend. Pure.

A value is whatever the protocol's parameter holds: bool, int, float or str, and in JSON anything at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from models.errors import InvalidRequest

NO_SHARED_MEMORY = "shared memory regions are not supported, send the data in the body"


def min_confidence(parameters: Mapping[str, object]) -> float | None:
    """Raises InvalidRequest."""
    value = parameters.get("min_confidence")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidRequest("parameters.min_confidence is not a number from 0 to 1")
    return float(value)


def priority(parameters: Mapping[str, object]) -> int:
    """Raises InvalidRequest."""
    value = parameters.get("priority", 0)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest("parameters.priority is not an integer")
    return value


def binary_output(parameters: Mapping[str, object]) -> bool:
    """Whether outputs are wanted as binary data where nothing else is said of one. Raises InvalidRequest."""
    value = parameters.get("binary_data_output", False)
    if not isinstance(value, bool):
        raise InvalidRequest("parameters.binary_data_output is neither true nor false")
    return value


def check_output(name: str, before: Iterable[str], *, shared_memory: bool, classification: object) -> None:
    """Raise InvalidRequest for an output asked for twice, or in a way that is not supported. `before`: those before it."""
    if name in before:
        raise InvalidRequest(f"output '{name}' is asked for twice")
    if shared_memory:
        raise InvalidRequest(f"output '{name}': {NO_SHARED_MEMORY}")
    if classification:
        raise InvalidRequest(f"output '{name}': the classification extension is not supported")
