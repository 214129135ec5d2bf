"""The tier above as a predictor: our own data plane over HTTP, tensors as binary data.

Foreign errors end here: a socket's become Unreachable, an HTTP status the error of `models.errors` that it stands for.
"""

from __future__ import annotations

import asyncio
import time
from functools import lru_cache
from urllib.parse import SplitResult, quote, urlsplit

from models.errors import DeadlineExceeded, NotReady, Unreachable
from models.serving.codec_client import Heads, decode_response, encode_request, header_length_of
from models.serving.endpoint import HEADER_VALUE, Endpoint
from models.serving.predictor import InferRequest, InferResponse
from models.serving.status import error_of
from models.serving.wire import Pool


def check_url(url: str) -> SplitResult:
    """The parts of a base URL that `Remote` can use. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not http://host:port")
    return parts


class Remote:
    """`Predictor` that asks the server at `url` (http://host:port, IPv6 in brackets, a path prefix allowed).

    `tier`: what answers are marked with when they do not say. `token`: sent as a bearer token. `connect_timeout`,
    `default_timeout`: seconds; the latter holds for a request without a deadline. At most `max_connections` are kept, and
    a call that finds none free waits until its deadline. Raises ValueError for a URL it cannot use.
    """

    def __init__(
        self,
        url: str,
        *,
        tier: str,
        token: str | None = None,
        connect_timeout: float = 1.0,
        max_connections: int = 8,
        default_timeout: float = 10.0,
    ) -> None:
        parts = check_url(url)
        if token is not None and not HEADER_VALUE.fullmatch(token):
            raise ValueError("the token holds characters that a header cannot carry")
        self._tier = tier
        self._prefix = parts.path.rstrip("/")
        self._default_timeout = default_timeout
        endpoint = Endpoint(parts.hostname or "", parts.port or 80)
        self._pool = Pool(endpoint, size=max_connections, connect_timeout=connect_timeout)
        credential = "" if token is None else f"authorization: Bearer {token}\r\n"
        self._shared_head = f" HTTP/1.1\r\nhost: {parts.netloc}\r\n{credential}".encode("ascii")
        self._heads = Heads()
        self._infer_head = lru_cache(maxsize=256)(self._make_infer_head)

    async def infer(self, request: InferRequest) -> InferResponse:
        """The answer of the tier above, by the request's deadline. Raises only errors of `models.errors`."""
        remaining = self._default_timeout if request.deadline is None else request.deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded("the deadline passed before the request was sent")
        deadline = asyncio.get_running_loop().time() + remaining
        body = encode_request(request, self._heads)
        trace = b""
        if request.trace is not None and HEADER_VALUE.fullmatch(request.trace):
            trace = b"traceparent: %b\r\n" % request.trace.encode()
        head = (
            b"%bcontent-length: %d\r\ninference-header-content-length: %d\r\ntierline-deadline-ms: %.3f\r\n%b\r\n"
            % (
                self._infer_head(request.model, request.version),
                sum(map(len, body)),
                len(body[0]),
                remaining * 1e3,
                trace,
            )
        )
        reply = await self._pool.exchange([head, *body], deadline)
        if reply.status != 200:
            raise error_of(reply)
        return decode_response(reply.body, header_length_of(reply, self._tier), request, self._tier, self._heads)

    async def ping(self, timeout: float) -> float:
        """Seconds that /v2/health/ready took. Raises Unreachable, or NotReady when it answers that it is not ready."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        head = f"GET {self._prefix}/v2/health/ready".encode("ascii") + self._shared_head + b"\r\n"
        try:
            reply = await self._pool.exchange_unbounded([head], start + timeout)
        except DeadlineExceeded as error:
            raise Unreachable(f"the {self._tier} tier did not answer a ping within {timeout:g} s") from error
        if reply.status == 503:
            raise NotReady(f"the {self._tier} tier is not ready")
        if reply.status != 200:
            raise Unreachable(f"the {self._tier} tier answered a ping with status {reply.status}")
        return loop.time() - start

    async def close(self) -> None:
        """Close every connection; calls in flight fail with Unreachable."""
        self._pool.close()

    def _make_infer_head(self, model: str, version: str | None) -> bytes:
        versions = "" if version is None else f"/versions/{quote(version, safe='')}"
        path = f"{self._prefix}/v2/models/{quote(model, safe='')}{versions}/infer"
        return f"POST {path}".encode("ascii") + self._shared_head + b"content-type: application/octet-stream\r\n"
