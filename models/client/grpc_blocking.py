"""Calls over grpcio's blocking channel, which is one connection for all threads."""

from __future__ import annotations

import time
from typing import Any, TypeVar, cast

from models.client.address import Address, PathText
from models.client.calls import Call
from models.client.grpc_calls import GrpcCall
from models.client.grpc_channel import RpcError, blocking_channel, error_of_rpc
from models.errors import DeadlineExceeded, Unreachable

T = TypeVar("T")


class BlockingGrpc:
    """`Transport` over gRPC."""

    def __init__(
        self, address: Address, *, ca: PathText | None, certificate: PathText | None, key: PathText | None
    ) -> None:
        self._peer = address.endpoint.peer
        self._channel = blocking_channel(address, ca, certificate, key)
        self._methods: dict[str, Any] = {}

    def run(self, call: Call[T], deadline: float) -> T:
        rpc = cast(GrpcCall[T], call)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded(f"{self._peer} did not answer within the deadline")
        try:
            answer = self._method(rpc)(rpc.message, timeout=remaining, metadata=rpc.metadata)
        except RpcError as error:
            raise error_of_rpc(error, self._peer) from error
        except ValueError as error:  # what grpcio says of a closed channel
            raise Unreachable(f"the client of {self._peer} is closed") from error
        return rpc.read(answer)

    def close(self) -> None:
        self._channel.close()

    def _method(self, rpc: GrpcCall[Any]) -> Any:
        method = self._methods.get(rpc.method)
        if method is None:
            method = self._methods[rpc.method] = self._channel.unary_unary(
                rpc.method,
                request_serializer=type(rpc.message).SerializeToString,
                response_deserializer=rpc.kind.FromString,
            )
        return method
