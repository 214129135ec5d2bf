"""What both clients share: their options, and how a caller's arguments become a request. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from models.client.address import Address
from models.client.answer import Metadata
from models.client.calls import Calls
from models.client.http_calls import HttpCalls
from models.client.retries import Retries, RetryBudget
from models.errors import InvalidRequest, NotFound, TierlineError
from models.serving.predictor import InferRequest
from models.tensor import Array

MAX_KNOWN_MODELS = 256
"""Models whose metadata is remembered at once."""
LONGEST_TIMEOUT = 24 * 3600.0
"""Seconds; a longer wait is a mistake, or infinity, which no socket understands."""


def make_calls(address: Address, token: str | None) -> Calls:
    """The protocol for this address. Raises ImportError, naming the extra, when gRPC is wanted and not installed."""
    peer = address.endpoint.peer
    if address.grpc:
        from models.client.grpc_calls import GrpcCalls

        return GrpcCalls(peer, token)
    return HttpCalls(address.prefix, address.authority, peer, token)


def make_budget(retries: int | Retries) -> RetryBudget | None:
    if isinstance(retries, int):
        retries = Retries(most=retries)
    return RetryBudget(retries) if retries.most > 0 else None


def check_connections(most: int) -> int:
    """Raises ValueError."""
    if most < 1:
        raise ValueError(f"max_connections is {most}: without a connection nothing can be asked")
    return most


def check_timeout(seconds: float) -> float:
    """Raises InvalidRequest unless it is a time that can be waited for."""
    if not isfinite(seconds) or seconds > LONGEST_TIMEOUT:
        raise InvalidRequest(f"timeout {seconds!r} is not a number of seconds up to {LONGEST_TIMEOUT:g}")
    return seconds


class Known:
    """Metadata of models whose inputs were given as lists or without a name."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str | None], Metadata] = {}

    def get(self, model: str, version: str | None) -> Metadata | None:
        return self._models.get((model, version))

    def put(self, model: str, version: str | None, metadata: Metadata) -> Metadata:
        if len(self._models) >= MAX_KNOWN_MODELS:
            self._models.clear()
        self._models[model, version] = metadata
        return metadata

    def forget(self, model: str, version: str | None, error: TierlineError) -> None:
        """The server refused what was made from the metadata: another version may answer to the name by now."""
        if isinstance(error, InvalidRequest | NotFound):
            self._models.pop((model, version), None)


def make_request(
    model: str,
    inputs: Mapping[str, Array],
    version: str | None,
    outputs: Sequence[str],
    min_confidence: float | None,
    priority: int,
    id: str | None,
    parameters: Mapping[str, Any] | None,
    trace: str | None,
) -> InferRequest:
    return InferRequest(
        model=model,
        inputs=inputs,
        version=version,
        outputs=outputs,
        # True, 1 and 1.0 are equal to Python, not to the protocol.
        min_confidence=None if min_confidence is None else float(min_confidence),
        priority=int(priority),
        trace=trace,
        id=id,
        parameters=parameters or {},
    )
