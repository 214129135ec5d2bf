from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from onnx_writer import Node, OnnxWriter, Value, write_model

from models.errors import PackageError
from models.serving.folder import load_folder
from models.serving.local import Local
from models.serving.predictor import InferRequest
from models.serving.repository import Repository
from models.zoo.digits import package_folder


async def test_every_version_is_served_and_the_highest_number_by_default(
    tmp_path: Path, onnx_model: OnnxWriter
) -> None:
    for version in ("1", "2", "10"):
        onnx_model("scale", tmp_path / "scale" / version / "model.onnx", factor=float(version))
    models, problems = load_folder(tmp_path)
    assert problems == []
    repository = Repository()
    repository.install(models)
    local = Local(repository, "edge")
    x = np.ones((1, 4), np.float32)
    for version, factor in ((None, 10.0), ("2", 2.0)):
        answer = await local.infer(InferRequest(model="scale", version=version, inputs={"x": x}))
        assert (answer.outputs["y"][0, 0], answer.version) == (factor, str(int(factor)))
    assert repository.describe("scale", None).versions == ("1", "2", "10")
    assert repository.describe("scale", None).platform == "onnx"
    await local.close()
    await repository.close()


@pytest.mark.parametrize(("suffix", "platform"), [(".onnx", "onnx_int8"), (".tflite", "litert_int8")])
def test_a_manifest_beside_the_file_adds_confidence(tmp_path: Path, suffix: str, platform: str) -> None:
    source, place = package_folder("device", "1"), tmp_path / "digits" / "3"
    place.mkdir(parents=True)
    for name in ("manifest.json", f"model{suffix}"):
        shutil.copy(source / name, place / name)
    (made,) = load_folder(tmp_path)[0]["digits"].values()
    assert made.confidence is not None
    assert (made.identity.package, made.identity.version, made.identity.platform) == ("digits-int8", "3", platform)
    assert made.inputs[0].name == "image"


def test_a_bad_model_is_named_and_the_others_are_served(tmp_path: Path, onnx_model: OnnxWriter) -> None:
    onnx_model("scale", tmp_path / "good" / "1" / "model.onnx")
    onnx_model("scale", tmp_path / "half" / "1" / "model.onnx")
    onnx_model("scale", tmp_path / "lies" / "1" / "model.onnx")
    (tmp_path / "lies" / "1" / "manifest.json").write_text("{}")
    for name in ("half/2", "empty/1", "unversioned/latest", ".hidden/1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "half" / "2" / "model.onnx").write_bytes(b"garbage")
    (tmp_path / "README").write_text("not a model")
    models, problems = load_folder(tmp_path)
    assert {name: list(versions) for name, versions in models.items()} == {"good": ["1"], "half": ["1"]}
    expected = {
        "empty/1": "holds none of model.onnx, model.tflite",
        "half/2": "onnxruntime refuses",
        "lies/1": "manifest",
        "unversioned": "has no version folder",
    }
    assert len(problems) == len(expected)
    for problem, (place, reason) in zip(sorted(problems), sorted(expected.items()), strict=True):
        assert problem.startswith(f"{tmp_path / place}: ")
        assert reason in problem


def test_a_model_that_zeros_do_not_suit_is_served_outside_the_loop(tmp_path: Path) -> None:
    # Row x - 4 of a table of three: zeros ask for row -4, which does not exist.
    nodes = [Node("Sub", ["x", "four"], ["i"]), Node("Gather", ["table", "i"], ["y"])]
    weights = {"four": np.array(4, np.int64), "table": np.arange(3, dtype=np.float32)}
    x, y = Value("x", "INT64", ["n"]), Value("y", "FP32", ["n"])
    write_model(tmp_path / "gather" / "1" / "model.onnx", nodes, [x], [y], weights)
    models, problems = load_folder(tmp_path)
    assert problems == []
    assert not models["gather"]["1"].inline


def test_a_missing_framework_is_named(tmp_path: Path, onnx_model: OnnxWriter) -> None:
    onnx_model("scale", tmp_path / "m" / "1" / "model.onnx")
    with pytest.raises(PackageError, match="needs onnxruntime, which is not installed"):
        load_folder(tmp_path, engines=("litert",))


@pytest.mark.parametrize("place", ["missing", "empty", "file"])
def test_a_folder_with_nothing_to_serve_is_an_error_that_names_it(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(PackageError, match=str(tmp_path / place)):
        load_folder(tmp_path / place)
