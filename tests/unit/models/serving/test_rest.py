"""The protocol's routes as a pure handler: right status, right body, nothing leaked."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import numpy as np
import pytest

from models.errors import (
    CallerError,
    DeadlineExceeded,
    EngineFailure,
    NotFound,
    NotReady,
    Overloaded,
    TierlineError,
    TooLarge,
    Unreachable,
)
from models.serving.codec import MAX_JSON_BYTES
from models.serving.exchange import HttpHead, HttpRequest, HttpResponse
from models.serving.index import ModelDescription
from models.serving.plane import DataPlane
from models.serving.predictor import InferRequest, InferResponse
from models.serving.rest import RestHandler
from models.serving.rest_routes import MAX_ROUTES, find_route
from models.tensor import TensorSpec
from models.testing import FailingPredictor, StaticPredictor

BODY = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}'
Y = {"y": np.ones(1, np.float32)}


class Index:
    """One model, 'm ü', in versions 1 and 2; version 2 is loading."""

    def names(self) -> list[str]:
        return ["m ü"]

    def describe(self, model: str, version: str | None) -> ModelDescription:
        if model != "m ü" or version not in (None, "1", "2"):
            raise NotFound(f"no model '{model}' version {version}")
        spec = TensorSpec("x", "FP32", (-1, 4))
        return ModelDescription(model, "p", ("1", "2"), "onnx_fp32", (spec,), (spec,))

    def is_ready(self, model: str, version: str | None) -> bool:
        return self.describe(model, version) is not None and version != "2"


def handler_of(predictor: Any = None, **options: Any) -> RestHandler:
    options.setdefault("ready", lambda: True)
    extra = options.pop("extra", None)
    return RestHandler(DataPlane(predictor or StaticPredictor(Y), Index(), **options), extra=extra)


async def ask(
    handler: RestHandler, path: str, method: str = "GET", body: bytes = b"", headers: dict[bytes, bytes] | None = None
) -> tuple[int, Any]:
    response = await handler(HttpRequest(HttpHead(method, path, "", headers or {}), body))
    raw = b"".join(response.body) if isinstance(response.body, list) else response.body
    assert isinstance(raw, bytes)
    return response.status, json.loads(raw)


M = "/v2/models/m%20%C3%BC"


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/v2/health/live", 200, {"live": True}),
        ("/v2/health/ready", 200, {"ready": True}),
        (f"{M}/ready", 200, {"name": "m ü", "ready": True}),
        (f"{M}/versions/1/ready", 200, {"name": "m ü", "ready": True}),
        (f"{M}/versions/2/ready", 503, None),
        (f"{M}/versions/3/ready", 404, None),
        (f"{M}/versions/3", 404, None),
        ("/v2/models/other", 404, None),
        ("/v2/models/other/ready", 404, None),
        ("/v2/models/%ff", 400, None),
        ("/v2/models/", 404, None),
        ("/v2/models", 404, None),
        ("/v2/nothing", 404, None),
        ("/", 404, None),
        ("*", 404, None),
        ("", 404, None),
        (f"{M}/infer", 405, None),
        (f"{M}/infer/more", 404, None),
    ],
)
async def test_routes(path: str, status: int, body: object) -> None:
    got, answer = await ask(handler_of(), path)
    assert got == status
    if body is None:
        assert list(answer) == ["error"]
        assert isinstance(answer["error"], str)
    else:
        assert answer == body


async def test_metadata_tells_what_is_really_there() -> None:
    _, server = await ask(handler_of(), "/v2")
    assert server["name"] == "tierline"
    assert "binary_tensor_data" in server["extensions"]
    _, model = await ask(handler_of(), M)
    spec = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
    assert model == {
        "name": "m ü",
        "versions": ["1", "2"],
        "platform": "onnx_fp32",
        "inputs": [spec],
        "outputs": [spec],
        "parameters": {"package": "p"},
    }


async def test_a_server_that_is_not_ready_says_503() -> None:
    assert (await ask(handler_of(ready=lambda: False), "/v2/health/ready"))[0] == 503


@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST"])
async def test_a_method_that_does_not_apply_is_refused(method: str) -> None:
    status, body = await ask(handler_of(), "/v2/health/live", method)
    assert status == 405
    assert method in body["error"]


async def test_the_name_and_version_in_the_path_are_what_is_asked_for() -> None:
    predictor = StaticPredictor(Y)
    handler = handler_of(predictor)
    for _ in range(2):  # once parsed, once remembered
        assert (await ask(handler, f"{M}/versions/7/infer", "POST", BODY))[0] == 200
    assert {(request.model, request.version) for request in predictor.requests} == {("m ü", "7")}


async def test_invented_paths_do_not_grow_memory() -> None:
    handler = handler_of()
    for number in range(MAX_ROUTES + 10):
        await ask(handler, f"/v2/models/m{number}/infer", "POST", BODY)
    assert find_route.cache_info().currsize <= MAX_ROUTES


async def test_the_deadline_header_becomes_monotonic_seconds() -> None:
    predictor = StaticPredictor(Y)
    before = time.monotonic()
    await ask(handler_of(predictor), f"{M}/infer", "POST", BODY, {b"tierline-deadline-ms": b"1500.5"})
    deadline = predictor.requests[0].deadline
    assert deadline is not None
    assert before + 1.5 <= deadline <= time.monotonic() + 1.5005


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({b"tierline-deadline-ms": b"soon"}, 400),
        ({b"tierline-deadline-ms": b"nan"}, 400),
        ({b"tierline-deadline-ms": b"inf"}, 400),
        ({b"inference-header-content-length": b"x"}, 400),
        ({b"inference-header-content-length": b"-1"}, 400),
        ({b"inference-header-content-length": b"0"}, 400),
        ({b"inference-header-content-length": b"9" * 30}, 400),
        ({b"inference-header-content-length": b"10"}, 400),
        ({b"content-type": b"text/html"}, 415),
        ({b"content-type": b"\xff"}, 415),
        ({b"content-encoding": b"br"}, 415),
        ({b"content-encoding": b"gzip, gzip"}, 415),
        ({b"content-encoding": b"gzip"}, 400),
        ({b"content-type": b"application/json; charset=utf-8"}, 200),
        ({b"content-type": b"Application/JSON"}, 200),
        ({b"content-type": b"application/octet-stream"}, 200),
        ({b"content-encoding": b"identity"}, 200),
        ({}, 200),
    ],
)
async def test_headers(headers: dict[bytes, bytes], status: int) -> None:
    assert (await ask(handler_of(), f"{M}/infer", "POST", BODY, headers))[0] == status


@pytest.mark.parametrize(
    "body", [b"", b"\x00", b"{}", b"[" * 30_000, BODY[:-1], b"\xff" + BODY, BODY.replace(b"1", b"x")]
)
async def test_a_bad_body_is_always_the_callers_fault(body: bytes) -> None:
    status, answer = await ask(handler_of(), f"{M}/infer", "POST", body)
    assert status == 400
    assert answer["error"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotFound("no such model"), 404),
        (TooLarge("too large"), 413),
        (Overloaded("busy", retry_after=2.2), 429),
        (NotReady("loading"), 503),
        (Unreachable("gone"), 503),
        (DeadlineExceeded("late"), 504),
        (EngineFailure("broken"), 500),
        (CallerError("broken \udcff name"), 400),
    ],
)
async def test_every_error_of_the_tree_has_its_status(error: TierlineError, status: int) -> None:
    response = await handler_of(FailingPredictor(error))(HttpRequest(HttpHead("POST", f"{M}/infer", "", {}), BODY))
    assert response.status == status
    assert isinstance(response.body, bytes)
    assert json.loads(response.body)["error"] == str(error).replace("\udcff", "?")
    assert (b"retry-after: 3\r\n" in response.headers) == (status == 429)


class Buggy:
    async def infer(self, request: InferRequest) -> InferResponse:
        raise KeyError("a secret")


async def test_what_nobody_expected_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status, body = await ask(handler_of(Buggy()), f"{M}/infer", "POST", BODY)
    assert (status, body) == (500, {"error": "internal error"})
    assert len(caplog.records) == 1
    assert "a secret" in caplog.text


async def test_paths_below_a_prefix_go_to_the_other_handler() -> None:
    async def other(request: HttpRequest) -> HttpResponse:
        if request.path.endswith("missing"):
            raise NotFound("no such blob")
        return HttpResponse(200, body=json.dumps(request.path).encode())

    handler = handler_of(extra={"/blobs": other})
    assert await ask(handler, "/blobs/a/b") == (200, "/blobs/a/b")
    assert await ask(handler, "/blobs") == (200, "/blobs")
    assert await ask(handler, "/blobs/missing") == (404, {"error": "no such blob"})
    assert (await ask(handler, "/blobsy"))[0] == 404


async def test_json_above_its_limit_is_413_before_any_model_is_asked() -> None:
    asked = FailingPredictor(NotFound("no such model"))
    assert (await ask(handler_of(asked), f"{M}/infer", "POST", BODY + b" " * MAX_JSON_BYTES))[0] == 413
    assert not asked.requests


async def test_a_head_that_comes_again_is_answered_for_its_own_numbers() -> None:
    body = (
        b'{"inputs":[{"name":"x","datatype":"UINT8","shape":[2],"parameters":{"binary_data_size":2}}]}',
        b"\1\2",
        b"\3\4",
    )
    seen: list[object] = []

    class Seeing(StaticPredictor):
        async def infer(self, request: InferRequest) -> InferResponse:
            seen.append(request.inputs["x"].tolist())
            return await super().infer(request)

    handler = handler_of(Seeing(Y))
    headers = {b"inference-header-content-length": b"%d" % len(body[0])}
    for data in body[1:]:
        assert (await ask(handler, f"{M}/infer", "POST", body[0] + data, headers))[0] == 200
    assert seen == [[1, 2], [3, 4]]
