"""A server as it is put together: no page of a browser reaches it, and its metrics are this machine's alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from onnx_writer import scale_model

from models.serving.assembly import Listening, Serving, caching, serving
from models.serving.folder_control import FolderControl
from models.serving.local import Local
from models.serving.repository import Repository

PAGE = "https://app.example"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Serving]:
    scale_model(tmp_path / "models" / "m" / "1" / "model.onnx", 2.0)
    repository = Repository()
    control = FolderControl(repository, tmp_path / "models")
    local = Local(repository, "edge")
    listening = Listening(
        host="127.0.0.2", port=0, metrics_port=0, origins=(PAGE,), jobs=tmp_path / "jobs.db", trace_share=0.0
    )
    try:
        await control.start()
        async with (
            caching(listening, local, repository) as cache,
            serving(
                listening,
                cache,
                repository,
                tier="edge",
                node="n",
                local=local,
                cache=cache,
                ready=control.is_settled,
                control=control,
            ) as running,
        ):
            yield running
    finally:
        await control.close()
        await local.close()
        await repository.close()


async def test_a_page_unloads_no_model_and_a_listed_one_may(served: Serving) -> None:
    async with httpx.AsyncClient(base_url=served.addresses["http"]) as client:
        unload = "/v2/repository/models/m/unload"
        for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"host": "evil.example"}):
            assert (await client.post(unload, headers=headers)).status_code == 403
            assert (await client.post("/v2/logging", json={"log_info": False}, headers=headers)).status_code == 403
            assert (await client.get("/v2/jobs", headers=headers)).status_code == 403
        assert (await client.get("/v2/models/m/ready")).status_code == 200
        assert (await client.get("/v2/models/m/ready", headers={"origin": PAGE})).status_code == 200


async def test_metrics_are_on_loopback_wherever_the_models_are_and_not_for_pages(served: Serving) -> None:
    url = httpx.URL(served.addresses["metrics"])
    assert (url.host, httpx.URL(served.addresses["http"]).host) == ("127.0.0.1", "127.0.0.2")
    async with httpx.AsyncClient() as client:
        for path in ("/metrics", "/traces"):
            assert (await client.get(url.copy_with(path=path))).status_code == 200
            for headers in ({"origin": "null"}, {"host": "evil.example"}):
                assert (await client.get(url.copy_with(path=path), headers=headers)).status_code == 403
    with pytest.raises(OSError, match=r"(?i)connect"):
        await asyncio.open_connection("127.0.0.2", url.port)
