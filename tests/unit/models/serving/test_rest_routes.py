"""Triton's extensions over REST: repository, configuration, statistics, logging, and clear words for what is not there."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from models.errors import ContractBreach, InvalidRequest, NotFound
from models.serving.caller import Caller, Peer
from models.serving.exchange import HttpHead, HttpRequest
from models.serving.index import Duration, ModelDescription, ModelState, ModelStatistics
from models.serving.logs import LogSettings
from models.serving.plane import DataPlane
from models.serving.rest import RestHandler
from models.serving.rest_routes import MAX_SETTINGS_BYTES
from models.tensor import TensorSpec
from models.testing import StaticPredictor


class Index:
    def names(self) -> list[str]:
        return ["a", "b"]

    def describe(self, model: str, version: str | None) -> ModelDescription:
        if model not in self.names() or version not in (None, "1"):
            raise NotFound(f"no model '{model}' version {version}")
        spec = TensorSpec("x", "FP32", (4,))
        return ModelDescription(model, "p", ("1",), "onnx_fp32", (spec,), (spec,))

    def is_ready(self, model: str, version: str | None) -> bool:
        return True


class Control:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def states(self) -> Sequence[ModelState]:
        return [ModelState("a", "1", "READY"), ModelState("b", "2", "UNAVAILABLE", "its file is damaged")]

    async def load(self, model: str) -> None:
        if model == "bad":
            raise ContractBreach("model 'bad': golden output 'y' is out of tolerance")
        if model not in ("a", "b"):
            raise NotFound(f"model '{model}' is not in the repository")
        self.calls.append(("load", model))

    async def unload(self, model: str) -> None:
        self.calls.append(("unload", model))

    def config(self, model: str, version: str | None) -> Mapping[str, object]:
        return {"name": model, "platform": "onnx_fp32", "version": version}

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        raise NotImplementedError


class Counters:
    def statistics(self, model: str | None, version: str | None) -> Sequence[ModelStatistics]:
        one = ModelStatistics("a", "1", last_inference=5, inference_count=3, execution_count=2)
        one.inference_stats["success"] = Duration(2, 1000)
        return [each for each in (one, ModelStatistics("b", "1")) if model in (None, each.name)]


class Logs(LogSettings):
    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, object] = {"log_info": True}

    def values(self) -> Mapping[str, object]:
        return self.settings

    def update(self, settings: Mapping[str, object]) -> Mapping[str, object]:
        if "log_file" in settings:
            raise InvalidRequest("log_file cannot be set")
        self.settings |= settings
        return self.settings


class Guests:
    """Everybody may use model a; nobody is an administrator."""

    revision = 0

    def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
        return Caller()

    def may_use(self, caller: Caller, model: str) -> bool:
        return model == "a"


@pytest.fixture
def control() -> Control:
    return Control()


@pytest.fixture
def handler(control: Control) -> RestHandler:
    return handler_of(control=control)


def handler_of(**options: Any) -> RestHandler:
    plane = DataPlane(StaticPredictor({}), Index(), ready=lambda: True, statistics=Counters(), logs=Logs(), **options)
    return RestHandler(plane)


async def ask(
    handler: RestHandler, method: str, path: str, body: bytes = b"", headers: dict[bytes, bytes] | None = None
) -> tuple[int, Any]:
    response = await handler(HttpRequest(HttpHead(method, path, "", headers or {}), body))
    assert isinstance(response.body, bytes)
    return response.status, json.loads(response.body)


@pytest.mark.parametrize(
    ("body", "names"),
    [(b"", ["a", "b"]), (b"{}", ["a", "b"]), (b'{"ready":false}', ["a", "b"]), (b'{"ready":true}', ["a"])],
)
async def test_the_index_lists_all_or_only_the_ready(handler: RestHandler, body: bytes, names: list[str]) -> None:
    status, index = await ask(handler, "POST", "/v2/repository/index", body)
    assert status == 200
    assert [each["name"] for each in index] == names
    assert index[0] == {"name": "a", "version": "1", "state": "READY", "reason": ""}


async def test_models_are_loaded_and_unloaded_by_name(handler: RestHandler, control: Control) -> None:
    for act, body in (("load", b""), ("load", b"{}"), ("unload", b'{"parameters":{"unload_dependents":true}}')):
        assert await ask(handler, "POST", f"/v2/repository/models/a/{act}", body) == (200, {})
    assert control.calls == [("load", "a"), ("load", "a"), ("unload", "a")]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("models/none/load", b"", 404, "none"),
        ("models/bad/load", b"", 422, "out of tolerance"),
        ("models/a/load", b'{"parameters":{"config":"{}"}}', 400, "parameters.config is not supported"),
        ("models/a/load", b'{"parameters":{"file:1/model.onnx":"QQ=="}}', 400, "parameters.file:1/model.onnx"),
        ("models/a/load", b'{"parameters":1}', 400, "parameters"),
        ("models/a/unload", b'{"parameters":{"force":true}}', 400, "parameters.force is not known"),
        ("models/a/load", b"{", 400, "not valid"),
        ("models/a/load", b"\xff", 400, "not valid"),
        ("models/a/load", b"[" * 30_000, 400, "not valid"),
        ("models/a/load", b" " * (MAX_SETTINGS_BYTES + 1), 413, "exceeds"),
        ("index", b'{"ready":"yes"}', 400, "ready"),
        ("index", b"[]", 400, "not valid"),
        ("models/a/reload", b"", 404, "nothing"),
        ("models//load", b"", 404, "nothing"),
        ("models/%ff/load", b"", 400, "UTF-8"),
    ],
)
async def test_what_cannot_be_done_is_said_and_changes_nothing(
    handler: RestHandler, control: Control, path: str, body: bytes, status: int, message: str
) -> None:
    got, answer = await ask(handler, "POST", f"/v2/repository/{path}", body)
    assert (got, list(answer)) == (status, ["error"])
    assert message in answer["error"]
    assert not control.calls


async def test_a_node_with_a_hub_says_who_decides() -> None:
    status, answer = await ask(handler_of(), "POST", "/v2/repository/models/a/load")
    assert status == 409
    assert "hub" in answer["error"]
    assert [each["state"] for each in (await ask(handler_of(), "POST", "/v2/repository/index"))[1]] == ["READY"] * 2


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/models/a/load"),
        ("POST", "/v2/repository/models/a/unload"),
        ("POST", "/v2/repository/models/hidden/load"),
        ("GET", "/v2/logging"),
        ("POST", "/v2/logging"),
    ],
)
async def test_only_an_administrator_changes_anything(control: Control, method: str, path: str) -> None:
    handler = handler_of(control=control, access=Guests())
    assert (await ask(handler, method, path))[0] == 403
    assert not control.calls


async def test_a_caller_sees_nothing_of_other_models(control: Control) -> None:
    handler = handler_of(control=control, access=Guests())
    assert [each["name"] for each in (await ask(handler, "POST", "/v2/repository/index"))[1]] == ["a"]
    assert [each["name"] for each in (await ask(handler, "GET", "/v2/models/stats"))[1]["model_stats"]] == ["a"]
    for path in ("config", "stats", "versions/1/config", "versions/1/stats"):
        assert (await ask(handler, "GET", f"/v2/models/a/{path}"))[0] == 200
        assert (await ask(handler, "GET", f"/v2/models/b/{path}"))[0] == 404


@pytest.mark.parametrize("version", [None, "1"])
async def test_configuration_is_told_by_version(handler: RestHandler, version: str | None) -> None:
    where = "a" if version is None else f"a/versions/{version}"
    expected = {"name": "a", "platform": "onnx_fp32", "version": version}
    assert await ask(handler, "GET", f"/v2/models/{where}/config") == (200, expected)
    assert (await ask(handler_of(), "GET", f"/v2/models/{where}/config"))[1]["backend"] == "onnx"


async def test_statistics_have_tritons_form(handler: RestHandler) -> None:
    status, answer = await ask(handler, "GET", "/v2/models/a/versions/1/stats")
    (stats,) = answer["model_stats"]
    assert status == 200
    phases = stats.pop("inference_stats")
    assert stats == {
        "name": "a",
        "version": "1",
        "last_inference": 5,
        "inference_count": 3,
        "execution_count": 2,
        "batch_stats": [],
    }
    assert phases["success"] == {"count": 2, "ns": 1000}
    assert {"success", "fail", "queue", "compute_input", "compute_infer", "compute_output"} <= phases.keys()
    assert [each["name"] for each in (await ask(handler, "GET", "/v2/models/stats"))[1]["model_stats"]] == ["a", "b"]
    assert (await ask(handler, "GET", "/v2/models/none/stats"))[0] == 404
    assert (await ask(handler, "GET", "/v2/models/a/versions/9/stats"))[0] == 404


async def test_log_settings_are_read_and_set(handler: RestHandler) -> None:
    assert await ask(handler, "GET", "/v2/logging") == (200, {"log_info": True})
    assert await ask(handler, "POST", "/v2/logging", b'{"log_info":false}') == (200, {"log_info": False})
    assert await ask(handler, "GET", "/v2/logging") == (200, {"log_info": False})
    assert (await ask(handler, "POST", "/v2/logging", b'{"log_file":"/etc/passwd"}'))[0] == 400
    assert (await ask(handler, "POST", "/v2/logging", b"[1]"))[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("GET", "trace/setting", "trace settings"),
        ("POST", "trace/setting", "trace settings"),
        ("POST", "models/a/trace/setting", "trace settings"),
        ("GET", "systemsharedmemory/status", "shared memory"),
        ("POST", "systemsharedmemory/region/r/register", "shared memory"),
        ("POST", "systemsharedmemory/unregister", "shared memory"),
        ("GET", "cudasharedmemory/region/r/status", "shared memory"),
    ],
)
async def test_extensions_that_are_not_here_say_so(handler: RestHandler, method: str, path: str, message: str) -> None:
    status, answer = await ask(handler, method, f"/v2/{path}")
    assert status == 400
    assert message in answer["error"]


@pytest.mark.parametrize(
    "path", ["", "/health/live", "/models/a", "/models/a/config", "/models/a/stats", "/models/stats", "/logging"]
)
async def test_head_is_answered_as_get(handler: RestHandler, path: str) -> None:
    assert await ask(handler, "HEAD", f"/v2{path}") == await ask(handler, "GET", f"/v2{path}")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "repository/index"),
        ("GET", "repository/models/a/load"),
        ("POST", "models/a/config"),
        ("POST", "models/stats"),
        ("DELETE", "logging"),
    ],
)
async def test_a_method_that_does_not_apply_is_refused(handler: RestHandler, method: str, path: str) -> None:
    assert (await ask(handler, method, f"/v2/{path}"))[0] == 405


async def test_bodies_of_these_routes_may_be_compressed_too(handler: RestHandler) -> None:
    packed = {b"content-encoding": b"gzip"}
    ready = gzip.compress(b'{"ready":true}')
    assert len((await ask(handler, "POST", "/v2/repository/index", ready, packed))[1]) == 1
    assert (await ask(handler, "POST", "/v2/repository/index", ready[:-1], packed))[0] == 400
    bomb = gzip.compress(bytes(MAX_SETTINGS_BYTES + 1))
    assert (await ask(handler, "POST", "/v2/repository/index", bomb, packed))[0] == 413
