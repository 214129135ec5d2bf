"""A webhook goes only where the operator allows, is signed, bounded in time, and tried again with growing pauses."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from job_store_contract import a_job
from msgspec.structs import replace

from models.errors import Forbidden, InvalidRequest
from models.serving.jobs.webhook import MAX_TRIES, Webhooks

ALLOWED = ["https://hooks.example.com", "http://127.0.0.1:8080/jobs", "http://[::1]:9000"]


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com",
        "https://hooks.example.com/a/b?c=d",
        "https://HOOKS.example.com:443/",
        "https://hooks.example.com./x",
        "http://127.0.0.1:8080/jobs",
        "http://127.0.0.1:8080/jobs/1?x",
        "http://127.0.0.1:8080/jobs?x",
        "http://[::1]:9000/x",
    ],
)
def test_listed_targets_are_allowed(url: str) -> None:
    Webhooks(ALLOWED).check(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/",
        "https://hooks.example.com:8443/",
        "https://hooks.example.com.evil.example/",
        "https://evil.example/hooks.example.com",
        "https://sub.hooks.example.com/",
        "http://127.0.0.1:8080/",
        "http://127.0.0.1:8080/jobsX",
        "http://127.0.0.1:8080/job",
        "http://127.0.0.1:80/jobs",
        "http://2130706433:8080/jobs",
        "http://localhost:8080/jobs",
        "http://169.254.169.254/latest/meta-data",
    ],
)
def test_everything_else_is_forbidden(url: str) -> None:
    with pytest.raises(Forbidden):
        Webhooks(ALLOWED).check(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example.com",
        "//hooks.example.com",
        "ftp://hooks.example.com/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:8080/jobs",
        "https:///x",
        "https://hooks.example.com@evil.example/",
        "https://user:secret@hooks.example.com/",
        "https://evil.example\\@hooks.example.com/",
        "https://hooks.example.com/#fragment",
        "https://hooks.example.com:port/",
        "https://hooks.example.com:99999/",
        "https://hooks.example.com/\r\nhost: evil",
        "https://hooks.example.com/ x",
        "https://hooks.example.com/\u00e9",
        "http://127.0.0.1:8080/jobs/../admin",
        "http://127.0.0.1:8080/jobs/%2e%2E/admin",
        "http://127.0.0.1:8080/jobs/..%2fadmin",
        "https://[::1/",
        "https://hooks.example.com/" + "x" * 3000,
    ],
)
def test_what_is_no_plain_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="tierline-webhook"):
        Webhooks(ALLOWED).check(url)


def test_without_a_list_nothing_is_allowed_and_the_answer_says_why() -> None:
    with pytest.raises(Forbidden, match="no target is configured"):
        Webhooks().check("https://hooks.example.com/")


@asynccontextmanager
async def receiver(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except OSError:
            pass  # the other side has gone, which some tests want
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


async def delivered(text: bytes, *, tries: int = 1) -> float | None:
    """When the next try is due after the receiver has answered `text`, with the clock at 1000."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(text)
        await writer.drain()

    async with receiver(answer) as url:
        hooks = Webhooks([url], timeout=1.0, clock=lambda: 1000.0, uniform=lambda low, high: high)
        return await hooks.deliver(replace(a_job(webhook=url), expires=1e9, hook_tries=tries))


async def test_what_is_sent_is_the_signed_status() -> None:
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        seen.extend((head, await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")

    async with receiver(answer) as url:
        job = replace(a_job(webhook=f"{url}/a?b=c"), state="succeeded", hook_tries=1)
        assert await Webhooks([url], secret=b"shared", clock=lambda: 1000.7).deliver(job) is None
    head, body = seen
    assert head.startswith(b"POST /a?b=c HTTP/1.1\r\nhost: 127.0.0.1:")
    status = json.loads(body)
    assert (status["job"], status["status"], status["result"]) == (job.id, "succeeded", f"/v2/jobs/{job.id}/result")
    mac = hmac.new(b"shared", b"1000." + body, hashlib.sha256).hexdigest()
    assert f"tierline-signature: t=1000,v1={mac}\r\n".encode() in head


@pytest.mark.parametrize(
    ("text", "again"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", False),
        (b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\n\r\n", False),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", False),
        (b"HTTP/1.1 410 Gone\r\n\r\n", False),
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n", True),
        (b"HTTP/1.1 500 Oops\r\n\r\n", True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 9, True),
        (b"220 smtp.example.com\r\n\r\n", True),
        (b"", True),
        (b"HTTP/1.1 200 " + b"x" * 100_000, True),
    ],
)
async def test_what_an_answer_means(text: bytes, again: bool) -> None:
    assert (await delivered(text) is not None) == again


async def test_pauses_grow_and_tries_are_counted() -> None:
    oops = b"HTTP/1.1 500 Oops\r\n\r\n"
    assert await delivered(oops, tries=1) == 1004.0
    assert await delivered(oops, tries=3) == 1016.0
    assert await delivered(oops, tries=MAX_TRIES) is None


async def test_a_receiver_that_hangs_or_is_not_there_costs_a_bounded_time() -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with receiver(hang) as url:
        hooks = Webhooks([url], timeout=0.05)
        assert await hooks.deliver(replace(a_job(webhook=url), expires=1e12)) is not None
    assert await hooks.deliver(replace(a_job(webhook=url), expires=1e12)) is not None
    assert await hooks.deliver(replace(a_job(webhook=url), expires=0.0)) is None  # its job is gone by then


async def test_a_target_that_is_no_longer_listed_is_given_up() -> None:
    assert await Webhooks().deliver(a_job(webhook="https://hooks.example.com")) is None
