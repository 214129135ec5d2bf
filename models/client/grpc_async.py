"""Calls over grpcio's asynchronous channel, which is one connection."""

from __future__ import annotations

import time
from typing import Any, TypeVar, cast

from models.client.address import Address, PathText
from models.client.calls import Call
from models.client.grpc_calls import GrpcCall
from models.client.grpc_channel import Closed, RpcError, async_channel, channel_credentials, error_of_rpc
from models.errors import DeadlineExceeded, Unreachable

T = TypeVar("T")


class AsyncGrpc:
    """`AsyncTransport` over gRPC."""

    def __init__(
        self, address: Address, *, ca: PathText | None, certificate: PathText | None, key: PathText | None
    ) -> None:
        self._peer = address.endpoint.peer
        self._address = address
        self._credentials = channel_credentials(address, ca, certificate, key)
        self._channel: Any = None  # made in the loop that it belongs to
        self._closed = False
        self._methods: dict[str, Any] = {}

    async def run(self, call: Call[T], deadline: float) -> T:
        rpc = cast(GrpcCall[T], call)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded(f"{self._peer} did not answer within the deadline")
        if self._closed:
            raise Unreachable(f"the client of {self._peer} is closed")
        try:
            answer = await self._method(rpc)(rpc.message, timeout=remaining, metadata=rpc.metadata)
        except RpcError as error:
            raise error_of_rpc(error, self._peer) from error
        except Closed as error:
            raise Unreachable(f"the client of {self._peer} is closed") from error
        return rpc.read(answer)

    async def close(self) -> None:
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    def _method(self, rpc: GrpcCall[Any]) -> Any:
        if self._channel is None:
            self._channel = async_channel(self._address, self._credentials)
        method = self._methods.get(rpc.method)
        if method is None:
            method = self._methods[rpc.method] = self._channel.unary_unary(
                rpc.method,
                request_serializer=type(rpc.message).SerializeToString,
                response_deserializer=rpc.kind.FromString,
            )
        return method
