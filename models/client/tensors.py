"""What a caller hands over, as the tensors that a model wants. Nothing is wrapped, rounded or truncated on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.client.answer import Metadata
from models.errors import InvalidRequest
from models.tensor import DTYPES, Array, TensorSpec

_ACCEPTS = {"b": "b", "f": "fiu", "O": "OSU"}
"""Kind of the wanted dtype -> kinds of the values that may become it; integers have checks of their own."""

Inputs = Mapping[str, object] | object
"""By name; for a model with one input also its value alone."""


def as_sent(inputs: Inputs) -> dict[str, Array] | None:
    """`inputs` when they are named arrays, which say all there is to know. None = the model's metadata is needed."""
    if not isinstance(inputs, Mapping):
        return None
    sent: dict[str, Array] = {}
    for name, value in inputs.items():
        if not isinstance(value, np.ndarray):
            return None
        sent[name] = value
    return sent


def as_wanted(inputs: Inputs, known: Metadata) -> dict[str, Array]:
    """`inputs` named and with the model's datatypes; arrays stay as they are. Raises InvalidRequest, naming the input."""
    if not isinstance(inputs, Mapping):
        if len(known.inputs) != 1:
            names = ", ".join(spec.name for spec in known.inputs)
            raise InvalidRequest(f"model '{known.name}' has {len(known.inputs)} inputs ({names}): give them by name")
        inputs = {known.inputs[0].name: inputs}
    specs = {spec.name: spec for spec in known.inputs}
    for name in inputs:
        if name not in specs:
            raise InvalidRequest(f"model '{known.name}' has no input {name!r}, it has {', '.join(map(repr, specs))}")
    return {
        name: value if isinstance(value, np.ndarray) else _array(value, specs[name]) for name, value in inputs.items()
    }


def _array(value: object, spec: TensorSpec) -> Array:
    wanted = DTYPES.get(spec.datatype)
    if wanted is None:
        raise InvalidRequest(f"input '{spec.name}': the model's datatype {spec.datatype!r} is unknown here")
    try:
        given = np.asarray(value)
        # numpy would end a bytes value at its last byte that is not zero, and make floats of 0 beside 2**63.
        if wanted.kind == "O" or (wanted.kind in "iu" and given.dtype.kind == "f"):
            given = np.array(value, dtype=object)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"input '{spec.name}': {error}") from error
    if given.size == 0:
        return given.astype(wanted)
    if wanted.kind in "iu":
        return _integers(given, wanted, spec)
    if given.dtype.kind not in _ACCEPTS[wanted.kind]:
        raise InvalidRequest(f"input '{spec.name}': {spec.datatype} cannot be made of values of type {given.dtype}")
    return given.astype(wanted)


def _integers(given: Array, wanted: np.dtype[Any], spec: TensorSpec) -> Array:
    if given.dtype.kind not in "iu" and not all(type(value) is int for value in given.flat):
        raise InvalidRequest(f"input '{spec.name}': {spec.datatype} is made of integers alone")
    limits = np.iinfo(wanted)
    if int(given.min()) < limits.min or int(given.max()) > limits.max:
        raise InvalidRequest(f"input '{spec.name}': a value is outside {spec.datatype} ({limits.min} to {limits.max})")
    return given.astype(wanted)
