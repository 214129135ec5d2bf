"""One request to a hub and its answer, in the calling thread: enrolment, renewal, leaving. Bounded in time and size."""

from __future__ import annotations

import ssl

import msgspec
import urllib3

from sync.enrol_messages import MAX_ANSWER_BYTES
from sync.errors import Malformed, Refused, Unavailable
from sync.tunnel import read_proxy

CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0


class HubRefused(Refused):
    """The hub answered no; the message is its own. `status`: of HTTP."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Error(msgspec.Struct, frozen=True):
    error: str = ""


def call(url: str, body: msgspec.Struct | None, context: ssl.SSLContext | None, proxy: str | None = None) -> bytes:
    """POST `body` as JSON, or GET without one. Raises HubRefused, Unavailable, Malformed."""
    data = None if body is None else msgspec.json.encode(body)
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
    try:
        with _pool(proxy, context, timeout) as pool:
            answer = pool.request(
                "GET" if body is None else "POST",
                url,
                body=data,
                headers=headers,
                redirect=False,
                preload_content=False,
            )
            try:
                content = answer.read(MAX_ANSWER_BYTES + 1)
            finally:
                answer.close()
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise Unavailable(f"{url}: {_cause(error)}") from error
    if len(content) > MAX_ANSWER_BYTES:
        raise Malformed(f"{url} answered more than {MAX_ANSWER_BYTES} bytes")
    if answer.status >= 500:
        raise Unavailable(f"{url} answered {answer.status}")
    if not 200 <= answer.status < 300:
        raise HubRefused(answer.status, _text(content) or f"{url} answered {answer.status}")
    return content


def _pool(
    proxy: str | None, context: ssl.SSLContext | None, timeout: urllib3.Timeout
) -> urllib3.PoolManager | urllib3.ProxyManager:
    if proxy is None:
        return urllib3.PoolManager(retries=False, timeout=timeout, ssl_context=context)
    at = read_proxy(proxy)
    headers = {"Proxy-Authorization": at.credentials} if at.credentials else None
    host = f"[{at.host}]" if ":" in at.host else at.host
    return urllib3.ProxyManager(
        f"http://{host}:{at.port}", proxy_headers=headers, retries=False, timeout=timeout, ssl_context=context
    )


def _text(content: bytes) -> str:
    try:
        return msgspec.json.decode(content, type=_Error).error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""


def _cause(error: BaseException) -> str:
    inner = error.__cause__ or getattr(error, "reason", None) or error
    return str(inner) or type(inner).__name__
