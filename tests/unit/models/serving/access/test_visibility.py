"""A tenant sees its own models through the protocol; the others answer as if they did not exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from access_writer import AccessWriter

from models.errors import NotFound
from models.serving.access.checked import CheckedAccess
from models.serving.caller import Caller, Peer
from models.serving.exchange import HttpHead, HttpRequest
from models.serving.index import ModelDescription, ModelStatistics
from models.serving.plane import DataPlane
from models.serving.rest import RestHandler
from models.tensor import TensorSpec
from models.testing import StaticPredictor

AWAY = Peer("192.0.2.7", encrypted=True)
TENANTS = '[tenants.acme]\nmodels = ["acme-*"]\n[tenants.bolt]\nmodels = ["bolt-*"]\n'
BODY = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}'


class Index:
    def names(self) -> list[str]:
        return ["acme-1", "bolt-1"]

    def describe(self, model: str, version: str | None) -> ModelDescription:
        if model not in self.names():
            raise NotFound(f"model '{model}' is not served here")
        spec = TensorSpec("x", "FP32", (-1,))
        return ModelDescription(model, "p", ("1",), "onnx_fp32", (spec,), (spec,))

    def is_ready(self, model: str, version: str | None) -> bool:
        return self.describe(model, version) is not None


class Counters:
    """As the meter: of every model when none is named, with an error for a version that one of them has not."""

    def statistics(self, model: str | None, version: str | None) -> list[ModelStatistics]:
        versions = {"acme-1": ("1", "2"), "acme-2": ("2",), "bolt-1": ("3",)}
        found = []
        for name in versions if model is None else (model,):
            if version is not None and version not in versions[name]:
                raise NotFound(f"model '{name}' has no version '{version}' here; served: {', '.join(versions[name])}")
            found += [ModelStatistics(name, each) for each in versions[name] if version in (None, each)]
        return found


class Server:
    def __init__(self, folder: Path) -> None:
        self.writer = AccessWriter(folder, TENANTS)
        self.access = CheckedAccess(self.writer.path, listening=("0.0.0.0",))
        self.predictor = StaticPredictor({"y": np.ones(1, np.float32)})
        self.plane = DataPlane(self.predictor, Index(), ready=lambda: True, access=self.access)
        self.handler = RestHandler(self.plane)

    async def ask(self, method: str, path: str, bearer: bytes | None, body: bytes = b"") -> tuple[int, Any, bytes]:
        headers = {} if bearer is None else {b"authorization": bearer}
        response = await self.handler(HttpRequest(HttpHead(method, path, "", headers, AWAY), body))
        raw = b"".join(response.body) if isinstance(response.body, list) else response.body
        assert isinstance(raw, bytes)
        return response.status, json.loads(raw), response.headers


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


ROUTES = [("GET", ""), ("GET", "/ready"), ("GET", "/versions/1"), ("POST", "/infer"), ("POST", "/versions/1/infer")]


@pytest.mark.parametrize(("method", "rest"), ROUTES)
async def test_a_tenant_reaches_its_own_models_and_no_others(server: Server, method: str, rest: str) -> None:
    bearer = server.writer.bearer(tenant="acme")
    own, _, _ = await server.ask(method, f"/v2/models/acme-1{rest}", bearer, BODY)
    assert own == 200
    status, body, _ = await server.ask(method, f"/v2/models/bolt-1{rest}", bearer, BODY)
    unknown = await server.ask(method, f"/v2/models/bolt-2{rest}", bearer, BODY)
    assert (status, body["error"].replace("bolt-1", "bolt-2")) == (unknown[0], unknown[1]["error"])
    assert status == 404


async def test_what_is_inferred_carries_tenant_and_client(server: Server) -> None:
    await server.ask("POST", "/v2/models/bolt-1/infer", server.writer.bearer(tenant="bolt", sub="pump"), BODY)
    (request,) = server.predictor.requests
    assert (request.tenant, request.client) == ("bolt", "pump")


def test_the_index_lists_a_tenants_models_alone(server: Server) -> None:
    caller = server.access.identify(AWAY, server.writer.bearer(tenant="acme"))
    assert server.plane.names(caller) == ["acme-1"]
    assert [state.name for state in server.plane.states(caller)] == ["acme-1"]
    assert server.plane.names(Caller(admin=True)) == ["acme-1", "bolt-1"]


@pytest.mark.parametrize(
    ("version", "found"),
    [
        (None, [("acme-1", "1"), ("acme-1", "2"), ("acme-2", "2")]),
        ("1", [("acme-1", "1")]),
        ("2", [("acme-1", "2"), ("acme-2", "2")]),
        ("3", []),
        ("9", []),
    ],
)
def test_statistics_of_all_models_are_of_a_tenants_own_whatever_version_is_asked_for(
    server: Server, version: str | None, found: list[tuple[str, str]]
) -> None:
    class Three(Index):
        def names(self) -> list[str]:
            return ["acme-1", "bolt-1", "acme-2"]

    plane = DataPlane(server.predictor, Three(), ready=lambda: True, access=server.access, statistics=Counters())
    caller = server.access.identify(AWAY, server.writer.bearer(tenant="acme"))
    assert [(each.name, each.version) for each in plane.statistics(caller, None, version)] == found


@pytest.mark.parametrize(("method", "rest"), ROUTES)
async def test_nobody_asks_for_a_model_without_a_credential(server: Server, method: str, rest: str) -> None:
    status, body, headers = await server.ask(method, f"/v2/models/acme-1{rest}", None, BODY)
    assert status == 401
    assert "bearer token" in body["error"]
    assert b"www-authenticate: Bearer" in headers
    assert (await server.ask(method, f"/v2/models/absent{rest}", None, BODY))[:2] == (status, body)


async def test_a_connection_that_repeats_its_head_is_refused_once_its_token_is_revoked(server: Server) -> None:
    head = HttpHead(
        "POST", "/v2/models/acme-1/infer", "", {b"authorization": server.writer.bearer(tenant="acme")}, AWAY
    )
    assert (await server.handler(HttpRequest(head, BODY))).status == 200
    assert (await server.handler(HttpRequest(head, BODY))).status == 200
    server.writer.revoked.write_text("jti j1\n")
    server.access._files.due = 0.0  # a second has passed
    assert (await server.handler(HttpRequest(head, BODY))).status == 401
