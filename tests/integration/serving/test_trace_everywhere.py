"""A traceparent that comes in goes back out, whichever way the request came; its trace id is kept, its span is ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from onnx_writer import mlp_model
from websockets.asyncio.client import connect

from models.serving.assembly import Listening, Serving, caching, serving
from models.serving.folder_control import FolderControl
from models.serving.grpc import inference_pb2 as pb
from models.serving.local import Local
from models.serving.repository import Repository

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SENT = f"00-{TRACE}-00f067aa0ba902b7-01"
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}]}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Serving]:
    mlp_model(tmp_path / "mlp" / "1" / "model.onnx")
    repository = Repository()
    control = FolderControl(repository, tmp_path)
    local = Local(repository, "edge")
    listening = Listening(port=0, grpc_port=0, trace_share=0.0)
    try:
        await control.start()
        async with (
            caching(listening, local, repository) as cache,
            serving(
                listening, cache, repository, tier="edge", node="n", local=local, cache=cache, ready=control.is_settled
            ) as running,
        ):
            yield running
    finally:
        await control.close()
        await local.close()
        await repository.close()


def check(returned: str | None) -> None:
    assert returned is not None
    version, trace, span, flags = returned.split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span != "00f067aa0ba902b7"


async def test_over_http(served: Serving) -> None:
    async with httpx.AsyncClient() as client:
        url = f"{served.addresses['http']}/v2/models/mlp/infer"
        check((await client.post(url, json=BODY, headers={"traceparent": SENT})).headers.get("traceparent"))
        assert "traceparent" not in (await client.post(url, json=BODY)).headers
        broken = await client.post(url, json=BODY, headers={"traceparent": "00-zz"})
        assert broken.status_code == 200


async def test_over_grpc(served: Serving) -> None:
    request = pb.ModelInferRequest(model_name="mlp")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 64]).contents.fp32_contents.extend([0.5] * 64)
    async with grpc.aio.insecure_channel(served.addresses["grpc"].removeprefix("grpc://")) as channel:
        infer: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        call = infer(request.SerializeToString(), metadata=(("traceparent", SENT),), timeout=10)
        await call
        check(dict(await call.initial_metadata()).get("traceparent"))


async def test_over_a_websocket(served: Serving) -> None:
    url = served.addresses["http"].replace("http", "ws") + "/v2/ws"
    async with connect(url, subprotocols=["tierline.v2"]) as socket:  # type: ignore[list-item]
        await socket.send(json.dumps({"op": "infer", "id": "1", "model": "mlp", "traceparent": SENT, "request": BODY}))
        answer = json.loads(await asyncio.wait_for(socket.recv(), 10))
    assert answer["op"] == "answer"
    check(answer.get("traceparent"))
