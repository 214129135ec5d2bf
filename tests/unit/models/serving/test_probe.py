from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from onnx_writer import Node, OnnxWriter, Value, write_model
from package_writer import Package, scale_package, write_package

from models.engines import EngineOptions
from models.errors import NotReady
from models.serving.probe import ProbeLimits, ProbeRequest, Verdict, probe

X = np.ones((1, 4), np.float32)


def request(package: Package, **limits: Any) -> ProbeRequest:
    variant = package.manifest.variants[0]
    options = EngineOptions(), ProbeLimits(**limits)
    return ProbeRequest(str(package.model), str(package.golden), variant, package.manifest, *options)


def script(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shell script stand in for the child."""
    path = folder / "child.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    monkeypatch.setattr("models.serving.probe.sys.executable", str(path))


async def test_a_good_file_passes(tmp_path: Path) -> None:
    assert await probe(request(scale_package(tmp_path, 2.0))) == Verdict(True)


async def test_garbage_is_refused_for_good(tmp_path: Path) -> None:
    package = scale_package(tmp_path, 2.0)
    package.model.write_bytes(b"garbage")
    verdict = await probe(request(package))
    assert (verdict.ok, verdict.final) == (False, True)
    assert "onnxruntime refuses" in verdict.reason


async def test_a_golden_output_missed_is_refused_for_good(tmp_path: Path) -> None:
    model = scale_package(tmp_path, 2.0).model
    verdict = await probe(request(write_package(model, {"x": X}, {"y": X * 3})))
    assert (verdict.ok, verdict.final) == (False, True)
    assert "differs from the golden output by 1" in verdict.reason


async def test_an_answer_that_is_not_finite_is_refused_for_good(onnx_model: OnnxWriter) -> None:
    verdict = await probe(request(write_package(onnx_model("nan"), {"x": -X}, {"y": X})))
    assert (verdict.ok, verdict.final) == (False, True)
    assert "not finite" in verdict.reason


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"wall_seconds": 0.8}, "stopped after 0.8 s"), ({"cpu_seconds": 1}, "used up its processor time")],
)
async def test_a_file_that_never_ends_is_stopped_and_may_be_tried_again(
    onnx_model: OnnxWriter, limits: dict[str, Any], reason: str
) -> None:
    package = write_package(onnx_model("endless"), {"x": X[0]}, {"y": X[0]})
    package_request = request(package, **limits)
    fixed = replace(package.manifest.inputs[0], shape=(4,)), replace(package.manifest.outputs[0], shape=(4,))
    manifest = replace(package.manifest, inputs=fixed[:1], outputs=fixed[1:])
    start = time.monotonic()
    verdict = await probe(replace(package_request, manifest=manifest))
    assert (verdict.ok, verdict.final) == (False, False)
    assert reason in verdict.reason
    assert time.monotonic() - start < 10


async def test_a_file_that_wants_more_memory_than_allowed_is_refused_for_now(tmp_path: Path) -> None:
    shape = np.array([3 << 26, 4], np.int64)  # 3 GiB, the default limit is 2
    nodes = [Node("ConstantOfShape", ["shape"], ["big"]), Node("Add", ["x", "big"], ["y"])]
    x, y = Value("x", "FP32", ["n", 4]), Value("y", "FP32", ["n", 4])
    model = write_model(tmp_path / "m" / "model.onnx", nodes, [x], [y], {"shape": shape})
    verdict = await probe(request(write_package(model, {"x": X}, {"y": X})))
    assert (verdict.ok, verdict.final) == (False, False), verdict


@pytest.mark.parametrize(
    ("text", "reason", "final"),
    [
        ("kill -SEGV $$", "killed the probe with SIGSEGV", True),
        ("kill -KILL $$", "killed the probe with SIGKILL", False),
        ("exit 3", "ended with status 3", False),
        ("echo nonsense", "no readable answer", False),
        ("head -c 200000 /dev/zero", "no readable answer", False),
        ("exec 0<&-; exit 1", "ended with status 1", False),
    ],
)
async def test_however_the_child_dies_there_is_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str, final: bool
) -> None:
    package = scale_package(tmp_path, 2.0)
    script(tmp_path, text, monkeypatch)
    verdict = await probe(request(package))
    assert (verdict.ok, verdict.final) == (False, final)
    assert reason in verdict.reason


async def test_a_child_that_cannot_be_started_says_nothing_about_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = scale_package(tmp_path, 2.0)
    monkeypatch.setattr("models.serving.probe.sys.executable", str(tmp_path / "missing"))
    with pytest.raises(NotReady, match="no process could be started"):
        await probe(request(package))


async def test_the_child_sees_no_secret_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = scale_package(tmp_path, 2.0)
    monkeypatch.setenv("NODE_TOKEN", "secret")
    script(tmp_path, f"env > {tmp_path}/env; exit 1", monkeypatch)
    await probe(request(package))
    seen = (tmp_path / "env").read_text()
    assert "PYTHONPATH=" in seen
    assert "secret" not in seen


async def test_a_folder_called_models_in_the_working_folder_does_not_shadow_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = scale_package(tmp_path, 2.0)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert (await probe(request(package))).ok
