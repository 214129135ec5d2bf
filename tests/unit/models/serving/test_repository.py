from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from onnx_writer import OnnxWriter
from package_writer import Package, desired_body, scale_package, write_package
from session_fake import FakeSession, loaded

from models.desired import Desired, encode_desired
from models.errors import (
    ContractBreach,
    EngineFailure,
    InvalidManifest,
    NotFound,
    NotReady,
    NoUsableVariant,
    PackageError,
)
from models.manifest import Confidence, encode_manifest
from models.serving.loaded import Loaded
from models.serving.local import Local
from models.serving.predictor import InferRequest
from models.serving.probe import Verdict
from models.serving.repository import Prepared, Repository

X = np.ones((1, 4), np.float32)


@pytest.fixture
async def repository(tmp_path: Path) -> AsyncIterator[Repository]:
    made = Repository(engines=("onnx",), verdicts=tmp_path / "verdicts")
    yield made
    await made.close()


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Probes pass without a child, and are counted: the child has its own tests."""
    asked: list[object] = []

    async def pass_all(requests: Sequence[object]) -> list[Verdict]:
        asked.extend(requests)
        return [Verdict(True) for _ in requests]

    monkeypatch.setattr("models.serving.verdicts.probe_files", pass_all)
    return asked


async def activate(repository: Repository, **packages: Package) -> None:
    await repository.commit(await repository.prepare(*desired_body(**packages)))


async def answer(repository: Repository, model: str = "m", version: str | None = None) -> float:
    local = Local(repository, "edge")
    response = await local.infer(InferRequest(model=model, version=version, inputs={"x": X}))
    await local.close()
    return float(response.outputs["y"][0, 0])


async def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


# --- activation ----------------------------------------------------------------------------------------------------


async def test_a_desired_document_is_probed_loaded_and_served(repository: Repository, tmp_path: Path) -> None:
    assert not repository.is_settled()
    package = scale_package(tmp_path, 0.0625, confidence=Confidence("y", threshold=0.7))
    body, blobs = desired_body(m=package)
    assert set(repository.plan(body, {"engines": ["onnx"]})) == set(blobs)
    token = await repository.prepare(body, blobs)
    assert repository.names() == []
    await repository.commit(token)
    assert repository.is_settled()
    assert await answer(repository) == 0.0625
    assert repository.running() == {"m": "scale/1"}
    description = repository.describe("m", None)
    assert (description.package, description.versions, description.platform) == ("scale", ("1",), "onnx_fp32")
    assert (description.inputs, description.outputs) == (package.manifest.inputs, package.manifest.outputs)
    assert repository.threshold("m") == 0.7
    assert repository.lookup("m", "1").inline


async def test_a_file_is_probed_once_also_across_restarts(tmp_path: Path, probes: list[object]) -> None:
    package = scale_package(tmp_path, 2.0)
    for _ in range(2):
        repository = Repository(engines=("onnx",), verdicts=tmp_path / "verdicts")
        await activate(repository, m=package)
        await repository.close()
    assert len(probes) == 1


async def test_a_known_bad_file_is_refused_without_a_child(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scale_package(tmp_path, 2.0).model
    package = write_package(model, {"x": X}, {"y": X * 3}, package="wrong")
    with pytest.raises(ContractBreach, match=r"model 'm' \(wrong/1\): output 'y': differs from the golden"):
        await repository.prepare(*desired_body(m=package))
    monkeypatch.setattr("models.serving.probe.sys.executable", "/nonexistent")
    with pytest.raises(ContractBreach, match="differs from the golden"):
        await repository.prepare(*desired_body(m=package))


async def test_golden_outputs_are_compared_in_this_process_too(
    repository: Repository, tmp_path: Path, probes: list[object]
) -> None:
    model = scale_package(tmp_path, 2.0).model
    package = write_package(model, {"x": X}, {"y": X * 3})
    with pytest.raises(ContractBreach, match="differs from the golden"):
        await repository.prepare(*desired_body(m=package))


async def test_a_bad_package_changes_nothing_that_is_served_and_leaves_nothing_open(
    repository: Repository, tmp_path: Path, probes: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = scale_package(tmp_path, 2.0)
    await activate(repository, m=good)
    before = repository.lookup("m", None)
    bad = scale_package(tmp_path, 3.0, version="2")
    bad.model.write_bytes(b"garbage")
    opened: list[Loaded] = []

    def note(made: Loaded) -> None:
        opened.append(made)

    monkeypatch.setattr(Loaded, "watch", note)
    with pytest.raises(ContractBreach):
        await repository.prepare(*desired_body(a=scale_package(tmp_path, 4.0), m=bad))
    assert [loaded.retired for loaded in opened] == [True]
    assert repository.lookup("m", None) is before
    assert await answer(repository) == 2.0
    assert repository.verdict() == "undecided"


@pytest.mark.parametrize("field", ["package", "version", "variants", "golden"])
async def test_a_manifest_that_contradicts_the_document_is_refused(
    repository: Repository, tmp_path: Path, probes: list[object], field: str
) -> None:
    package = scale_package(tmp_path, 2.0)
    changed: dict[str, Any] = {
        "package": "other",
        "version": "9",
        "variants": (replace(package.manifest.variants[0], tolerance=0.5),),
        "golden": package.manifest.variants[0].blob,
    }
    manifest_path = package.blobs[package.assignment.manifest.digest]
    manifest_path.write_bytes(encode_manifest(replace(package.manifest, **{field: changed[field]})))
    with pytest.raises(ContractBreach, match=f"the manifest's {field} is not"):
        await repository.prepare(*desired_body(m=package))
    assert probes == []


async def test_a_body_that_does_not_decode_names_the_field(repository: Repository) -> None:
    with pytest.raises(InvalidManifest, match="models"):
        await repository.prepare(b'{"models": 3}', {})


async def test_a_file_that_was_not_given_is_named(repository: Repository, tmp_path: Path) -> None:
    package = scale_package(tmp_path, 2.0)
    body, blobs = desired_body(m=package)
    digest = package.manifest.variants[0].blob.digest
    del blobs[digest]
    with pytest.raises(ContractBreach, match=digest):
        await repository.prepare(body, blobs)


async def test_a_package_without_a_variant_for_this_node_is_refused_when_planned(tmp_path: Path) -> None:
    repository = Repository(engines=("litert",))
    body, blobs = desired_body(m=scale_package(tmp_path, 2.0))
    with pytest.raises(NoUsableVariant, match="engines here: litert"):
        repository.plan(body, {"engines": ["litert"]})
    with pytest.raises(NoUsableVariant):
        await repository.prepare(body, blobs)


async def test_discarding_closes_what_was_loaded(repository: Repository, tmp_path: Path, probes: list[object]) -> None:
    token = await repository.prepare(*desired_body(m=scale_package(tmp_path, 2.0)))
    assert isinstance(token, Prepared)
    session = token.fresh[0].loaded.session
    await repository.discard(token)
    await repository.discard(token)
    await repository.close()
    with pytest.raises(EngineFailure, match="closed"):
        session.run({"x": X}, ())
    with pytest.raises(NotReady):
        await repository.commit(token)


# --- swapping ------------------------------------------------------------------------------------------------------


async def test_an_unchanged_version_keeps_its_session(
    repository: Repository, tmp_path: Path, probes: list[object]
) -> None:
    kept, old, new = (scale_package(tmp_path, factor) for factor in (2.0, 3.0, 4.0))
    await activate(repository, kept=kept, other=old)
    before = repository.lookup("kept", None)
    await activate(repository, kept=kept, renamed=kept, other=new)
    assert repository.lookup("kept", None) is before
    assert repository.lookup("renamed", None) is before
    assert await answer(repository, "other") == 4.0
    await activate(repository)
    assert repository.names() == []
    assert before.retired


async def test_a_token_that_outlived_its_sessions_is_not_committed(
    repository: Repository, tmp_path: Path, probes: list[object]
) -> None:
    package = scale_package(tmp_path, 2.0)
    await activate(repository, m=package)
    stale = await repository.prepare(*desired_body(m=package))
    await activate(repository)
    with pytest.raises(NotReady, match="prepare it again"):
        await repository.commit(stale)


async def test_a_swap_under_load_fails_no_request_and_mixes_no_versions(
    repository: Repository, tmp_path: Path, probes: list[object]
) -> None:
    packages = [scale_package(tmp_path, factor, version=str(factor)) for factor in (2.0, 3.0)]
    await activate(repository, m=packages[0])
    local = Local(repository, "edge", threads=2)
    stop = asyncio.Event()
    seen: set[str] = set()

    async def ask() -> None:
        while not stop.is_set():
            # Large enough to leave the event loop: these are the runs that a swap can catch under way.
            x = np.ones((20_000, 4), np.float32)
            response = await local.infer(InferRequest(model="m", inputs={"x": x}))
            assert response.outputs["y"][0, 0] == float(response.version)
            seen.add(response.version)

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    for turn in range(6):
        await activate(repository, m=packages[turn % 2])
        await asyncio.sleep(0)
    stop.set()
    await asyncio.gather(*asking)
    await local.close()
    assert seen == {"2.0", "3.0"}


async def test_an_old_version_is_closed_only_after_its_last_run() -> None:
    repository, old, new = Repository(engines=()), FakeSession(1.0), FakeSession(2.0)
    repository.install({"m": {"1": loaded(old)}})
    local = Local(repository, "edge")
    old.gate.clear()
    under_way = asyncio.create_task(local.infer(InferRequest(model="m", inputs={"x": X[:, :2]})))
    await asyncio.to_thread(old.started.acquire, timeout=5)
    repository.install({"m": {"2": loaded(new, version="2", inline=True)}})
    after = await local.infer(InferRequest(model="m", inputs={"x": X[:, :2]}))
    assert (after.version, old.closed.is_set()) == ("2", False)
    old.gate.set()
    assert (await under_way).version == "1"
    await eventually(old.closed.is_set)
    assert not old.closed_while_running
    await local.close()
    await repository.close()
    assert new.closed.is_set()


# --- what answers --------------------------------------------------------------------------------------------------


async def test_the_last_version_installed_answers_by_default(repository: Repository) -> None:
    versions = {name: loaded(FakeSession(float(name)), version=name, inline=True) for name in ("1", "2", "10")}
    repository.install({"m": versions})
    assert repository.running() == {"m": "fake/10"}
    assert repository.describe("m", "1").versions == ("1", "2", "10")
    assert repository.lookup("m", "2") is versions["2"]
    assert repository.is_ready("m", None)
    assert repository.has("m", None)
    assert repository.has("m", "1")
    assert not repository.has("m", "3")
    assert not repository.has("q", None)
    assert repository.threshold("q") == 0.0


@pytest.mark.parametrize(("model", "version", "reason"), [("q", None, "model 'q'"), ("m", "3", "'3' here; served: 1")])
async def test_what_is_not_served_is_named(
    repository: Repository, model: str, version: str | None, reason: str
) -> None:
    repository.install({"m": {"1": loaded(FakeSession())}})
    for ask in (repository.lookup, repository.describe, repository.is_ready):
        with pytest.raises(NotFound, match=reason):
            ask(model, version)


async def test_a_model_without_versions_is_not_installed(repository: Repository) -> None:
    with pytest.raises(ValueError, match="'m' has no version"):
        repository.install({"m": {}})


async def test_an_empty_document_is_settled_and_good(repository: Repository) -> None:
    await repository.commit(await repository.prepare(encode_desired(Desired({})), {}))
    assert repository.is_settled()
    assert repository.verdict() == "good"


# --- verdict -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "answers", "expected"),
    [(0, 19, "undecided"), (0, 20, "good"), (4, 0, "undecided"), (5, 0, "bad"), (1, 19, "undecided"), (1, 20, "good")],
)
async def test_the_verdict_follows_live_traffic(
    repository: Repository, failures: int, answers: int, expected: str
) -> None:
    session = FakeSession()
    repository.install({"m": {"1": loaded(session, inline=True)}})
    local = Local(repository, "edge")
    session.error = EngineFailure("broken")
    for _ in range(failures):
        with pytest.raises(EngineFailure):
            await local.infer(InferRequest(model="m", inputs={"x": X[:, :2]}))
    session.error = None
    for _ in range(answers):
        await local.infer(InferRequest(model="m", inputs={"x": X[:, :2]}))
    await local.close()
    assert repository.verdict().partition(":")[0] == expected


async def test_answers_that_are_not_finite_make_a_version_bad(
    repository: Repository, onnx_model: OnnxWriter, probes: list[object]
) -> None:
    package = write_package(onnx_model("nan"), {"x": X}, {"y": X * 0}, package="log")
    await activate(repository, m=package)
    local = Local(repository, "edge")
    for _ in range(5):
        await local.infer(InferRequest(model="m", inputs={"x": -X}))
    await local.close()
    assert repository.verdict() == "bad: model 'm' (log/1) failed or was not finite in 5 of 5 answers"


async def test_only_what_the_last_commit_changed_is_judged(
    repository: Repository, tmp_path: Path, probes: list[object]
) -> None:
    old, new = scale_package(tmp_path, 2.0), scale_package(tmp_path, 3.0)
    await activate(repository, old=old)
    for _ in range(10):
        repository.lookup("old", None).failed()
    repository.settled()
    await activate(repository, old=old, new=new)
    assert repository.verdict() == "undecided"
    for _ in range(20):
        await answer(repository, "new")
    assert repository.verdict() == "good"


async def test_every_refusal_is_a_package_error_that_names_the_model(
    repository: Repository, tmp_path: Path, probes: list[object]
) -> None:
    package = scale_package(tmp_path, 2.0)
    package.blobs[package.assignment.manifest.digest].write_bytes(b"{}")
    with pytest.raises(PackageError, match=r"model 'm' \(scale/1\): manifest"):
        await repository.prepare(*desired_body(m=package))
