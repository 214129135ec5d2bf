"""Jobs over HTTP: right status, right body, and the result byte by byte what inferring answers."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import EngineFailure, NotFound, Overloaded, TierlineError
from models.serving.caller import Caller, Peer
from models.serving.exchange import HttpHead, HttpRequest, HttpResponse, error_response
from models.serving.index import ModelDescription
from models.serving.jobs.desk import Jobs
from models.serving.jobs.job import JobLimits
from models.serving.jobs.routes import PREFIX, job_handler, submit
from models.serving.jobs.runner import RunnerSettings
from models.serving.jobs.sqlite import SqliteJobs
from models.serving.plane import DataPlane
from models.serving.predictor import InferRequest, InferResponse
from models.serving.rest import RestHandler
from models.testing import StaticPredictor

BODY = b'{"id":"mine","inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}'
BINARY = BODY.replace(b'"data":[1]', b'"parameters":{"binary_data_size":4}') + np.float32([1]).tobytes()
BINARY = BINARY.replace(b'"id"', b'"parameters":{"binary_data_output":true},"id"')


class ByName:
    """A credential is a client's name; 'stranger' may not use the model."""

    revision = 0

    def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
        return Caller((authorization or b"").decode() or None, "acme")

    def may_use(self, caller: Caller, model: str) -> bool:
        return caller.client != "stranger"


class Either:
    """Answers; fails for the model 'broken'; never answers for 'slow'."""

    async def infer(self, request: InferRequest) -> InferResponse:
        if request.model == "broken":
            raise EngineFailure("the engine failed")
        if request.model == "slow":
            await asyncio.Event().wait()
        return await StaticPredictor({"y": np.float32([1, 2])}, confidence=0.5).infer(request)


class Server:
    """The handler under `/v2/jobs`, and submission as the routes would call it."""

    def __init__(self, plane: DataPlane, jobs: Jobs) -> None:
        self.plane, self.jobs = plane, jobs
        self.rest = RestHandler(plane, extra={PREFIX: job_handler(plane, jobs)})

    async def ask(self, method: str, path: str, who: bytes = b"me", query: str = "", **headers: bytes) -> HttpResponse:
        return await self.rest(HttpRequest(HttpHead(method, path, query, {b"authorization": who, **_names(headers)})))

    async def submit(self, body: bytes = BODY, model: str = "m", who: bytes = b"me", **headers: bytes) -> HttpResponse:
        request = HttpRequest(HttpHead("POST", f"/v2/models/{model}/submit", "", _names(headers)), body)
        caller = self.plane.access.identify(request.peer, who)
        try:
            return await submit(self.plane, self.jobs, caller, request, model, None)
        except TierlineError as error:
            return error_response(error)

    async def submitted(self, **options: Any) -> str:
        response = await self.submit(**options)
        assert response.status == 202, response
        return str(read(response)["job"])

    async def ended(self, job_id: str) -> None:
        done = asyncio.Event()
        self.jobs.subscribe(job_id, lambda job: done.set())
        async with asyncio.timeout(5):
            await done.wait()


def _names(headers: dict[str, bytes]) -> dict[bytes, bytes]:
    return {name.replace("_", "-").encode(): value for name, value in headers.items()}


def read(response: HttpResponse) -> Any:
    assert isinstance(response.body, bytes)
    return json.loads(response.body)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    plane = DataPlane(Either(), None, ready=lambda: True, access=ByName())  # type: ignore[arg-type]
    limits = JobLimits(queued=4, tenant_share=1.0)
    settings = RunnerSettings(poll=0.01)
    jobs = Jobs(SqliteJobs(tmp_path / "j.db"), plane.predictor, ready=plane.is_ready, limits=limits, settings=settings)
    async with jobs.running():
        yield Server(plane, jobs)


async def test_submitting_answers_202_with_where_to_ask(server: Server) -> None:
    response = await server.submit()
    status = read(response)
    assert (response.status, status["status"], status["model"], status["attempts"]) == (202, "queued", "m", 0)
    assert f"location: /v2/jobs/{status['job']}\r\n".encode() in response.headers
    await server.ended(status["job"])
    done = read(await server.ask("GET", f"/v2/jobs/{status['job']}"))
    assert (done["status"], done["result"]) == ("succeeded", f"/v2/jobs/{status['job']}/result")


@pytest.mark.parametrize("form", ["json", "binary", "gzip"])
async def test_the_result_is_what_inferring_answers(server: Server, form: str) -> None:
    body, headers = BODY, {}
    if form != "json":
        body, headers = BINARY, {"inference_header_content_length": b"%d" % (len(BINARY) - 4)}
    now = await server.rest(HttpRequest(HttpHead("POST", "/v2/models/m/infer", "", _names(headers)), body))
    if form == "gzip":
        body, headers = gzip.compress(body), {**headers, "content_encoding": b"gzip"}
    job_id = await server.submitted(body=body, **headers)
    await server.ended(job_id)
    later = await server.ask("GET", f"/v2/jobs/{job_id}/result")
    assert isinstance(now.body, list)
    assert (later.status, later.headers, later.body) == (now.status, now.headers, b"".join(now.body))


async def test_an_error_is_answered_with_its_own_status(server: Server) -> None:
    job_id = await server.submitted(model="broken")
    await server.ended(job_id)
    response = await server.ask("GET", f"/v2/jobs/{job_id}/result")
    assert (response.status, read(response)) == (500, {"error": "the engine failed"})
    status = read(await server.ask("GET", f"/v2/jobs/{job_id}"))
    assert (status["status"], status["error"]) == ("failed", {"error": "the engine failed", "status": 500})


async def test_an_unfinished_job_has_no_result_yet_and_can_be_cancelled(server: Server) -> None:
    job_id = await server.submitted(model="slow")
    response = await server.ask("GET", f"/v2/jobs/{job_id}/result")
    assert response.status == 409
    assert read(response)["status"] in ("queued", "running")
    async with asyncio.timeout(5):
        while read(await server.ask("GET", f"/v2/jobs/{job_id}"))["status"] != "running":
            await asyncio.sleep(0.002)
    assert read(await server.ask("DELETE", f"/v2/jobs/{job_id}"))["status"] == "cancelled"
    assert (await server.ask("GET", f"/v2/jobs/{job_id}/result")).status == 409


async def test_the_listing_is_the_callers_own_and_bounded(server: Server) -> None:
    jobs = [await server.submitted() for _ in range(3)]
    await server.submitted(who=b"another")
    for job_id in jobs:
        await server.ended(job_id)
    listed = read(await server.ask("GET", "/v2/jobs"))["jobs"]
    assert [job["job"] for job in listed] == jobs[::-1]
    assert len(read(await server.ask("GET", "/v2/jobs/", query="limit=2"))["jobs"]) == 2


@pytest.mark.parametrize(
    ("method", "path", "query", "status"),
    [
        ("GET", "/v2/jobs/nothing", "", 404),
        ("GET", f"/v2/jobs/{'0' * 32}", "", 404),
        ("GET", f"/v2/jobs/{'0' * 32}/result", "", 404),
        ("DELETE", f"/v2/jobs/{'0' * 32}", "", 404),
        ("GET", f"/v2/jobs/{'0' * 32}/other", "", 404),
        ("GET", "/v2/jobs/a/b/c", "", 404),
        ("POST", "/v2/jobs", "", 405),
        ("DELETE", "/v2/jobs", "", 405),
        ("PUT", f"/v2/jobs/{'0' * 32}", "", 405),
        ("DELETE", f"/v2/jobs/{'0' * 32}/result", "", 405),
        ("GET", "/v2/jobs", "limit=0", 400),
        ("GET", "/v2/jobs", "limit=-1", 400),
        ("GET", "/v2/jobs", "limit=1001", 400),
        ("GET", "/v2/jobs", "limit=" + "9" * 5000, 400),
        ("GET", "/v2/jobs", "limit=\u0663", 400),
        ("GET", "/v2/jobs", "limit=", 400),
    ],
)
async def test_bad_requests(server: Server, method: str, path: str, query: str, status: int) -> None:
    response = await server.ask(method, path, query=query)
    assert response.status == status
    assert list(read(response)) == ["error"]


@pytest.mark.parametrize(
    ("options", "status", "named"),
    [
        ({"body": b"no json"}, 400, "request"),
        ({"body": b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1]}]}'}, 400, "input 'x'"),
        ({"inference_header_content_length": b"+5"}, 400, "inference-header-content-length"),
        ({"inference_header_content_length": b"100000"}, 400, "inference-header-content-length"),
        ({"tierline_deadline_ms": b"soon"}, 400, "tierline-deadline-ms"),
        ({"tierline_deadline_ms": b"nan"}, 400, "tierline-deadline-ms"),
        ({"tierline_job_ttl_s": b"inf"}, 400, "tierline-job-ttl-s"),
        ({"tierline_job_ttl_s": b"0"}, 400, "tierline-job-ttl-s"),
        ({"tierline_webhook": b"https://hooks.example.com"}, 403, "no target is configured"),
        ({"tierline_webhook": b"javascript:alert(1)"}, 400, "tierline-webhook"),
        ({"content_encoding": b"gzip"}, 400, "gzip"),
        ({"content_encoding": b"br"}, 415, "br"),
        ({"who": b"stranger"}, 404, "model 'm'"),
    ],
)
async def test_a_submission_that_cannot_work_is_refused_at_once(
    server: Server, options: dict[str, Any], status: int, named: str
) -> None:
    response = await server.submit(**options)
    assert response.status == status
    assert named in read(response)["error"]
    assert read(await server.ask("GET", "/v2/jobs"))["jobs"] == []
    assert server.jobs.expander.held == 0


async def test_too_many_jobs_are_refused_with_when_to_come_back(server: Server) -> None:
    for _ in range(4):
        await server.submitted(model="slow")
    response = await server.submit(model="slow")
    assert response.status == 429
    assert b"retry-after: " in response.headers


async def test_who_may_no_longer_use_the_model_is_not_given_its_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await server.submitted()
    await server.ended(job_id)
    monkeypatch.setattr(ByName, "may_use", lambda self, caller, model: False)
    assert (await server.ask("GET", f"/v2/jobs/{job_id}/result")).status == NotFound.http


async def test_every_request_about_jobs_counts_towards_its_callers_limit(server: Server) -> None:
    job_id = await server.submitted()
    await server.ended(job_id)
    asked: list[str | None] = []

    def admit(caller: Caller) -> None:
        asked.append(caller.client)
        if caller.client == "greedy":
            raise Overloaded("once a second", 0.5)

    server.jobs.admit = admit
    for who, status in ((b"me", 200), (b"greedy", 429)):
        for method, path in (
            ("GET", PREFIX),
            ("GET", f"{PREFIX}/{job_id}"),
            ("GET", f"{PREFIX}/{job_id}/result"),
            ("DELETE", f"{PREFIX}/{job_id}"),
        ):
            assert (await server.ask(method, path, who)).status == status
        assert (await server.submit(who=who)).status == (202 if status == 200 else status)
    assert asked == ["me"] * 5 + ["greedy"] * 5


async def test_a_job_for_a_model_that_does_not_exist_is_refused_where_that_is_known(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ModelDescription("m", "p", ("1",), "onnx_fp32", (), ())

    class Index:
        def describe(self, model: str, version: str | None) -> ModelDescription:
            if (model, version) not in (("m", None), ("m", "1")):
                raise NotFound(f"model '{model}' is not served here")
            return known

    monkeypatch.setattr(server.plane, "_index", Index())
    # Decided elsewhere: a tier above may have it.
    assert (await server.submit(model="slow")).status == 202
    monkeypatch.setattr(server.plane, "control", object())
    assert (await server.submit(model="none")).status == 404
    assert (await server.submit()).status == 202
