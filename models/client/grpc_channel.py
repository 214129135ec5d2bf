"""What both gRPC transports share: how a channel is made and what its failures stand for. grpcio is imported here alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.client.address import Address, PathText
from models.errors import DeadlineExceeded, TierlineError, Unreachable
from models.serving.reply import MAX_RESPONSE_BYTES
from models.serving.status import MAX_ERROR_TEXT, error_of_code

try:
    import grpc  # type: ignore[import-untyped]
    import grpc.aio  # type: ignore[import-untyped]
except ModuleNotFoundError as error:
    raise ImportError(f"grpc:// needs '{error.name}': pip install 'tierline[grpc]'") from error

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    ("grpc.max_send_message_length", -1),  # the server says what is too large
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),  # with jitter; grpcio's own default leaves a client blind for a second
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),  # ours alone decide
)


RpcError: type[Exception] = grpc.RpcError
"""What a failed call raises, of both libraries."""
Closed: type[Exception] = grpc.aio.UsageError
"""What the asynchronous library says of a closed channel; of the blocking one it is a ValueError."""


def blocking_channel(address: Address, ca: PathText | None, certificate: PathText | None, key: PathText | None) -> Any:
    """Raises OSError for a file that cannot be read."""
    return _make(grpc, address, channel_credentials(address, ca, certificate, key))


def async_channel(address: Address, credentials: Any) -> Any:
    """To be called in the loop that it belongs to. `credentials`: of `channel_credentials`."""
    return _make(grpc.aio, address, credentials)


def channel_credentials(
    address: Address, ca: PathText | None, certificate: PathText | None, key: PathText | None
) -> Any:
    """None for an address without TLS. Raises OSError for a file that cannot be read."""
    if not address.encrypted:
        return None
    # The key may stand in the certificate's file.
    chain, private = _read(certificate), _read(certificate if key is None else key)
    return grpc.ssl_channel_credentials(_read(ca), private, chain)


def error_of_rpc(error: Any, peer: str) -> TierlineError:
    """The error that a failed call stands for."""
    code = error.code().name
    text = error.details() or ""
    if text.startswith("CLIENT:"):  # grpcio's own word for an answer above the limit, under the code for an overload
        return Unreachable(f"{peer}: {text[:MAX_ERROR_TEXT]}")
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(f"{peer} did not answer within the deadline")
    if code == "UNAVAILABLE":
        text = f"{peer}: {text}"
    retry_after = ""
    for name, value in error.trailing_metadata() or ():
        if name == "retry-after" and isinstance(value, str):
            retry_after = value
    return error_of_code(code, text, retry_after)


def _make(library: Any, address: Address, credentials: Any) -> Any:
    target = address.endpoint.peer
    if credentials is None:
        return library.insecure_channel(target, options=OPTIONS)
    return library.secure_channel(target, credentials, options=OPTIONS)


def _read(path: PathText | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
