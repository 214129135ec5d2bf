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
from models.manifest import Manifest
from models.serving import probe as probing
from models.serving.probe import ProbeLimits, ProbeRequest, Verdict, file_request, probe, probe_files
from models.tensor import TensorSpec

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
    model = huge_model(tmp_path / "m" / "model.onnx")
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


# --- files without golden arrays -----------------------------------------------------------------------------------------


def alone(path: Path, manifest: Manifest | None = None, **limits: Any) -> ProbeRequest:
    return file_request(path, "onnx", manifest=manifest, limits=ProbeLimits(**limits))


def huge_model(path: Path) -> Path:
    """Wants 3 GiB on its first run; the default limit is 2."""
    shape = np.array([3 << 26, 4], np.int64)
    nodes = [Node("ConstantOfShape", ["shape"], ["big"]), Node("Add", ["x", "big"], ["y"])]
    x, y = Value("x", "FP32", ["n", 4]), Value("y", "FP32", ["n", 4])
    return write_model(path, nodes, [x], [y], {"shape": shape})


def gather_model(path: Path) -> Path:
    """Row x - 4 of a table of three: zeros ask for row -4, which does not exist."""
    nodes = [Node("Sub", ["x", "four"], ["i"]), Node("Gather", ["table", "i"], ["y"])]
    weights = {"four": np.array(4, np.int64), "table": np.arange(3, dtype=np.float32)}
    return write_model(path, nodes, [Value("x", "INT64", ["n"])], [Value("y", "FP32", ["n"])], weights)


async def test_a_file_without_a_manifest_need_only_load_and_survive_a_run(
    tmp_path: Path, onnx_model: OnnxWriter
) -> None:
    texts = onnx_model("identity", datatype="BYTES")
    for path in (onnx_model("mlp"), texts, gather_model(tmp_path / "gather.onnx")):
        assert await probe(alone(path)) == Verdict(True)


async def test_a_file_without_a_manifest_that_does_not_load_or_survive_is_refused(
    tmp_path: Path, onnx_model: OnnxWriter
) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    cases = (
        (alone(garbage), "onnxruntime refuses", True),
        (alone(onnx_model("endless"), wall_seconds=1.0), "stopped after 1 s", False),
        (alone(huge_model(tmp_path / "huge.onnx")), "more memory than a probe may use", False),
    )
    for asked, reason, final in cases:
        verdict = await probe(asked)
        assert (verdict.ok, verdict.final) == (False, final)
        assert reason in verdict.reason


async def test_a_manifest_without_golden_arrays_is_held_to_its_interface(tmp_path: Path) -> None:
    package = scale_package(tmp_path, 2.0)
    assert (await probe(alone(package.model, package.manifest))).ok
    lying = replace(package.manifest, inputs=(TensorSpec("x", "FP32", (-1, 5)),))
    verdict = await probe(alone(package.model, lying))
    assert (verdict.ok, verdict.final) == (False, True)
    assert "promised is [-1, 5]" in verdict.reason


# --- several files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many files each child was given."""
    counted: list[int] = []
    real = probing.try_in_turn

    async def count(requests: Any, patience: float) -> Any:
        counted.append(len(requests))
        return await real(requests, patience)

    monkeypatch.setattr(probing, "try_in_turn", count)
    return counted


async def test_good_files_share_one_child(onnx_model: OnnxWriter, tmp_path: Path, children: list[int]) -> None:
    files = [alone(onnx_model(name)) for name in ("scale", "mlp", "sum")]
    assert await probe_files([*files, request(scale_package(tmp_path, 2.0))]) == [Verdict(True)] * 4
    assert children == [4]


async def test_no_file_is_no_child(children: list[int]) -> None:
    assert await probe_files([]) == []
    assert children == []


async def test_a_bad_file_among_others_is_tried_alone_and_only_it_is_refused(
    tmp_path: Path, onnx_model: OnnxWriter, children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "SHARED_SECONDS", 2.0)
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    files = [
        alone(onnx_model("scale")),
        alone(garbage),
        alone(huge_model(tmp_path / "huge.onnx")),
        alone(onnx_model("endless"), wall_seconds=2.0),
        alone(onnx_model("mlp")),
    ]
    verdicts = await probe_files(files)
    assert [verdict.ok for verdict in verdicts] == [True, False, False, False, True]
    assert [verdict.final for verdict in verdicts[1:4]] == [True, False, False]
    assert children[0] == 5
    assert set(children[1:]) == {1}


async def test_a_file_that_kills_the_child_leaves_the_others_their_verdicts(
    onnx_model: OnnxWriter, children: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = onnx_model("sum")
    hook = tmp_path / "hook"
    hook.mkdir()
    # Found by the child on its path: loading a file of this very digest kills it, as a crash in native code would.
    (hook / "sitecustomize.py").write_text(
        "import onnxruntime, os, signal\n"
        "made = onnxruntime.InferenceSession.__init__\n"
        "def init(self, path, *a, **k):\n"
        f"    if path == {str(killer)!r}: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    made(self, path, *a, **k)\n"
        "onnxruntime.InferenceSession.__init__ = init\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(hook))
    verdicts = await probe_files([alone(onnx_model("scale")), alone(killer), alone(onnx_model("mlp"))])
    assert [verdict.ok for verdict in verdicts] == [True, False, True]
    assert verdicts[1] == Verdict(False, "the file killed the probe with SIGSEGV", final=True)
    assert children == [3, 1, 1]


async def test_what_a_shared_child_refuses_is_only_refused_once_it_was_tried_alone(
    onnx_model: OnnxWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def harmed(requests: Any, _: float) -> Any:
        """A child in which the first file did harm to what the others find."""
        alone = len(requests) == 1
        return [Verdict(alone or index == 0, "" if alone else "harmed") for index in range(len(requests))], None

    monkeypatch.setattr(probing, "try_in_turn", harmed)
    verdicts = await probe_files([alone(onnx_model("scale")), alone(onnx_model("mlp"))])
    assert [verdict.ok for verdict in verdicts] == [True, True]
