"""A browser asks for whatever page it shows: pages that are not listed get nothing, by no route and under no name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from access_writer import AccessWriter

from models.serving.access.checked import CheckedAccess
from models.serving.access.pages import Pages
from models.serving.caller import LOCAL_PEER, Access, Peer
from models.serving.exchange import HttpHead, HttpRequest, HttpResponse
from models.serving.plane import DataPlane
from models.serving.rest import RestHandler
from models.testing import StaticPredictor

BODY = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}'
PAGE = "https://app.example"
AWAY = Peer("192.0.2.7", encrypted=True)
INFER = "/v2/models/m/infer"
ROUTES = [
    ("GET", "/v2"),
    ("GET", "/v2/health/live"),
    ("GET", "/v2/models/m"),
    ("POST", INFER),
    ("POST", "/v2/models/m/submit"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/m/load"),
    ("POST", "/v2/repository/models/m/unload"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("GET", "/blobs/x"),
    ("DELETE", "/v2/jobs/x"),
    ("OPTIONS", INFER),
    ("GET", "/nothing"),
]


async def extra(request: HttpRequest) -> HttpResponse:
    return HttpResponse(200, body=b"{}")


class Site:
    """A server bound to loopback, and what reached its models."""

    def __init__(self, access: Access | None = None, host: str = "127.0.0.1") -> None:
        self.predictor = StaticPredictor({})
        plane = DataPlane(self.predictor, None, ready=lambda: True, access=access)  # type: ignore[arg-type]
        routes = {"/blobs": extra, "/v2/jobs": extra, "/v2/ws": extra}
        self.rest = RestHandler(plane, extra=routes, origins=[PAGE, "http://[fd00::1]:8000"], host=host)

    async def ask(
        self, method: str = "POST", path: str = INFER, peer: Peer = LOCAL_PEER, body: bytes = BODY, **headers: bytes
    ) -> tuple[int, str]:
        named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
        answer = await self.rest(HttpRequest(HttpHead(method, path, "", named, peer), body))
        assert isinstance(answer.body, bytes | list)
        raw = answer.body if isinstance(answer.body, bytes) else b"".join(answer.body)
        return answer.status, str(json.loads(raw).get("error", ""))


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": b"https://evil.example"},
        {"origin": b"null"},
        {"origin": b""},
        {"origin": b"\xff"},
        {"origin": b"https://app.example.evil"},
        {"origin": b"http://127.0.0.1:8000", "sec_fetch_site": b"same-origin"},
        {"sec_fetch_site": b"cross-site"},
        {"sec_fetch_site": b"same-site"},
    ],
)
@pytest.mark.parametrize("peer", [LOCAL_PEER, AWAY])
async def test_a_page_that_is_not_listed_reaches_nothing(
    method: str, path: str, headers: dict[str, bytes], peer: Peer
) -> None:
    site = Site()
    status, error = await site.ask(method, path, peer, **headers)
    assert (status, "pages of" in error) == (403, True)
    assert not site.predictor.requests


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": PAGE.encode(), "sec_fetch_site": b"cross-site"},
        {"sec_fetch_site": b"none"},
        {"sec_fetch_site": b"same-origin"},
    ],
)
async def test_programs_and_listed_pages_are_answered(headers: dict[str, bytes]) -> None:
    site = Site()
    assert await site.ask(content_type=b"application/json", **headers) == (200, "")
    assert (await site.ask("GET", "/blobs/x", **headers))[0] == 200
    assert (await site.ask("GET", "/v2/logging", **headers))[0] == 200


async def test_a_page_is_told_nothing_about_what_it_may_send() -> None:
    status, error = await Site().ask("OPTIONS", origin=PAGE.encode(), access_control_request_method=b"POST")
    assert (status, error) == (405, f"{INFER} takes POST, not OPTIONS")


FORM = b"application/x-www-form-urlencoded"


@pytest.mark.parametrize("path", [path for method, path in ROUTES if method == "POST" and "submit" not in path])
@pytest.mark.parametrize(
    ("kind", "alone", "page"),
    [
        (b"text/plain", 415, 415),
        (b"multipart/form-data; boundary=x", 415, 415),
        (FORM, None, 415),
        (FORM + b"; charset=utf-8", None, 415),
        (b"application/json", None, None),
    ],
)
async def test_a_form_that_a_page_may_send_unasked_is_no_body(
    path: str, kind: bytes, alone: int | None, page: int | None
) -> None:
    site = Site()
    for headers, status in (({}, alone), ({"origin": PAGE.encode()}, page)):
        got, _ = await site.ask("POST", path, body=BODY, content_type=kind, **headers)
        assert got == status if status else got != 415


OWN = [
    b"",
    b"localhost",
    b"LocalHost:8000",
    b"127.0.0.1:8000",
    b"127.0.0.2",
    b"127.1",
    b"[::1]:8000",
    b"[::1]",
    b"edge-1:8000",
    b"app.example",
    b"[fd00::1]:8000",
]
FOREIGN = [
    b"evil.example",
    b"evil.example:8000",
    b"localhost.evil.example",
    b"127.0.0.1.evil.example",
    b"127.evil.example:8000",
    b"192.168.0.7:8000",
    b"[::2]:8000",
    b"[fd00::12]:8000",
    b"[::1].evil.example",
    b"\xff",
]


@pytest.mark.parametrize("host", OWN)
async def test_a_local_client_calls_the_server_by_a_name_of_this_machine(host: bytes) -> None:
    site = Site(host="Edge-1")
    assert (await site.ask(host=host))[0] == 200
    assert (await site.ask("GET", "/blobs/x", host=host))[0] == 200


@pytest.mark.parametrize("host", FOREIGN)
async def test_a_page_whose_own_name_was_pointed_here_reads_and_changes_nothing(host: bytes) -> None:
    site = Site(host="edge-1")
    for method, path in ROUTES:
        if path in ("/v2", "/v2/health/live", "/nothing") or method == "OPTIONS":
            continue
        assert (await site.ask(method, path, host=host))[0] == 403, path
    assert (await site.ask(host=host, authorization=b"Bearer x"))[0] == 403, "which nobody checks here"
    for peer in (Peer("unix"), AWAY, Peer("192.0.2.7"), Peer("127.0.0.1", encrypted=True)):
        assert (await site.ask(peer=peer, host=host))[0] == 200


async def test_who_shows_a_token_calls_the_server_as_they_like(tmp_path: Path) -> None:
    writer = AccessWriter(tmp_path)
    site = Site(CheckedAccess(writer.path))
    for path, method in ((INFER, "POST"), ("/v2/jobs/x", "GET"), ("/blobs/x", "GET")):
        assert (await site.ask(method, path, host=b"gateway.example"))[0] == 403
        assert (await site.ask(method, path, host=b"gateway.example", authorization=writer.bearer()))[0] == 200
        assert (await site.ask(method, path, host=b"gateway.example", authorization=b"Bearer x"))[0] == 401


async def test_a_head_that_is_remembered_was_checked() -> None:
    site = Site()
    head = HttpHead("POST", INFER, "", {b"origin": b"https://evil.example"})
    for _ in range(2):
        assert (await site.rest(HttpRequest(head, BODY))).status == 403
        assert head.memo is None


async def test_a_handler_without_credentials_is_kept_from_pages() -> None:
    handler: Any = Pages().around(extra)
    for headers, status in (
        ({}, 200),
        ({b"host": b"localhost:8002"}, 200),
        ({b"host": b"evil.example"}, 403),
        ({b"origin": b"null"}, 403),
    ):
        assert (await handler(HttpRequest(HttpHead("GET", "/metrics", "", headers)))).status == status
    assert (await handler(HttpRequest(HttpHead("GET", "/metrics", "", {b"host": b"edge-1"}, AWAY)))).status == 200
