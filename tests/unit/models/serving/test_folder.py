from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from onnx_writer import Node, OnnxWriter, Value, write_model

from models.engines import EngineOptions, Session, get_engine
from models.errors import NotFound, NotReady, NoUsableVariant, PackageError
from models.serving.folder import Loading, ModelFolder, VersionFolder, find_model, load_folder, look, model_names
from models.serving.model_settings import ModelSettings
from models.zoo.digits import package_folder

LOADING = Loading(("onnx", "litert"))


def write_gather(path: Path) -> None:
    """Row x - 4 of a table of three: zeros ask for row -4, which does not exist."""
    nodes = [Node("Sub", ["x", "four"], ["i"]), Node("Gather", ["table", "i"], ["y"])]
    weights = {"four": np.array(4, np.int64), "table": np.arange(3, dtype=np.float32)}
    x, y = Value("x", "INT64", ["n"]), Value("y", "FP32", ["n"])
    write_model(path, nodes, [x], [y], weights)


@pytest.fixture
def version(tmp_path: Path, onnx_model: OnnxWriter) -> Path:
    return onnx_model("scale", tmp_path / "scale" / "1" / "model.onnx", factor=2.0).parent


def read(path: Path, settings: ModelSettings | None = None) -> VersionFolder:
    return VersionFolder("scale", path, settings or ModelSettings(), LOADING)


def test_a_version_is_loaded_warm_and_measured(version: Path) -> None:
    made = read(version).open(False)
    assert made.session.run({"x": np.ones((1, 4), np.float32)}, ())[0][0, 0] == 2.0
    assert (made.identity.package, made.identity.version, made.identity.platform) == ("scale", "1", "onnx")
    assert made.inline
    assert made.batching.rows > 1


@pytest.mark.parametrize(("suffix", "platform"), [(".onnx", "onnx_int8"), (".tflite", "litert_int8")])
def test_a_manifest_beside_the_file_adds_confidence(tmp_path: Path, suffix: str, platform: str) -> None:
    source, place = package_folder("device", "1"), tmp_path / "digits" / "3"
    place.mkdir(parents=True)
    for name in ("manifest.json", f"model{suffix}"):
        shutil.copy(source / name, place / name)
    made = read(place).open(False)
    assert made.confidence is not None
    assert (made.identity.package, made.identity.version, made.identity.platform) == ("digits-int8", "3", platform)
    assert made.inputs[0].name == "image"


def test_the_identity_follows_the_content_of_all_files(version: Path, onnx_model: OnnxWriter) -> None:
    first = read(version).open(False).identity
    assert read(version).open(True).identity == first
    onnx_model("scale", version / "model.onnx", factor=3.0)
    second = read(version).open(False).identity
    assert second != first
    (version / "labels.txt").write_text("one\n")
    assert read(version).open(False).identity not in (first, second)


def test_settings_reach_what_is_loaded(version: Path) -> None:
    asked: list[tuple[str, EngineOptions, str]] = []

    def open_session(engine: str, file: Path, options: EngineOptions, settings: ModelSettings) -> Session:
        asked.append((engine, options, settings.isolation))
        return get_engine(engine).load(file, options)

    settings = ModelSettings(batching="off", max_run_seconds=3.0, threads=2, isolation="process", warmup=False)
    made = VersionFolder("scale", version, settings, Loading(("onnx",), open_session=open_session)).open(False)
    assert asked == [("onnx", EngineOptions(threads=2), "process")]
    assert (made.batching.rows, made.max_run_seconds, made.inline) == (1, 3.0, False)
    assert read(version, ModelSettings(batching=4)).open(False).batching.rows == 4
    off = VersionFolder("scale", version, ModelSettings(batching=4), Loading(("onnx",), batching=False))
    assert off.open(False).batching.rows == 1


def test_a_model_that_zeros_do_not_suit_is_served_outside_the_loop(tmp_path: Path) -> None:
    write_gather(tmp_path / "gather" / "1" / "model.onnx")
    assert not read(tmp_path / "gather" / "1").open(False).inline


def test_files_that_changed_since_they_were_looked_at_are_not_loaded(version: Path, onnx_model: OnnxWriter) -> None:
    found = read(version)
    onnx_model("scale", version / "model.onnx", factor=3.0)
    os.utime(version / "model.onnx", ns=(1, 1))
    with pytest.raises(NotReady, match="have changed"):
        found.open(False)


def test_files_that_change_while_they_load_are_not_served(version: Path) -> None:
    closed: list[bool] = []

    def open_session(engine: str, file: Path, options: EngineOptions, settings: ModelSettings) -> Session:
        session = get_engine(engine).load(file, options)
        os.utime(file, ns=(1, 1))
        session.close = lambda: closed.append(True)  # type: ignore[method-assign]
        return session

    found = VersionFolder("scale", version, ModelSettings(), Loading(("onnx",), open_session=open_session))
    with pytest.raises(NotReady, match="have changed"):
        found.open(False)
    assert closed == [True]


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        (ModelSettings(), True),
        (ModelSettings(preload=False), True),
        (ModelSettings(batching="off"), False),
        (ModelSettings(isolation="process"), False),
    ],
)
def test_only_settings_that_change_a_session_ask_for_another(
    version: Path, settings: ModelSettings, same: bool
) -> None:
    assert read(version).is_same(read(version, settings)) == same
    assert not read(version).is_same(None)


def test_a_missing_framework_is_named(version: Path) -> None:
    with pytest.raises(NoUsableVariant, match="needs onnxruntime, which is not installed"):
        VersionFolder("scale", version, ModelSettings(), Loading(("litert",)))


def test_a_version_policy_chooses_and_says_what_it_left(tmp_path: Path, onnx_model: OnnxWriter) -> None:
    for version in ("1", "2", "10"):
        onnx_model("scale", tmp_path / "m" / version / "model.onnx")
    (tmp_path / "m" / "notes").mkdir()
    (tmp_path / "m" / "model.toml").write_text("version_policy = { latest = 2 }")
    found = ModelFolder(tmp_path / "m", LOADING)
    assert (list(found.versions), found.left_out, found.problems) == (["2", "10"], ["1"], {})
    (tmp_path / "m" / "model.toml").write_text("version_policy = { specific = [7] }")
    with pytest.raises(PackageError, match="chooses none of the versions 1, 10, 2"):
        ModelFolder(tmp_path / "m", LOADING)


def test_names_are_those_that_the_folder_lists(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "README").write_text("not a model")
    assert model_names(tmp_path) == ["a", "b"]
    assert find_model(tmp_path, "a") == tmp_path / "a"
    for name in ("c", "../" + tmp_path.name, ".", "..", "", "a/../b", "/", ".hidden", "a\0", "a" * 5000, "README"):
        with pytest.raises(NotFound):
            find_model(tmp_path, name)


def test_a_look_sees_every_change_of_files(version: Path, onnx_model: OnnxWriter) -> None:
    folder = version.parents[1]
    before = look(folder)
    assert look(folder) == before
    onnx_model("scale", folder / "scale" / "2" / "model.onnx")
    added = look(folder)
    (folder / "scale" / "model.toml").write_text("")
    assert len({before["scale"], added["scale"], look(folder)["scale"]}) == 3
    shutil.rmtree(folder / "scale")
    assert look(folder) == {}


def test_all_models_can_be_loaded_at_once_for_measuring(tmp_path: Path, onnx_model: OnnxWriter) -> None:
    for place in ("good/1", "good/2", "half/1"):
        onnx_model("scale", tmp_path / place / "model.onnx")
    for place in ("half/2", "empty/1", "unversioned/latest"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "half" / "2" / "model.onnx").write_bytes(b"garbage")
    models, problems = load_folder(tmp_path)
    assert {name: list(versions) for name, versions in models.items()} == {"good": ["1", "2"], "half": ["1"]}
    named = {problem.partition(": ")[0] for problem in problems}
    assert named == {str(tmp_path / place) for place in ("empty/1", "half/2", "unversioned")}
    shutil.rmtree(tmp_path / "good")
    shutil.rmtree(tmp_path / "half")
    with pytest.raises(PackageError, match=r"holds no model that can be served(.|\n)*unversioned"):
        load_folder(tmp_path)


@pytest.mark.parametrize("place", ["missing", "file"])
def test_what_is_no_folder_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PackageError, match=f"{tmp_path / place} is not a folder"):
        model_names(tmp_path / place)
