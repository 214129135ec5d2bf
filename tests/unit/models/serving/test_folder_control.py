from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from onnx_writer import OnnxWriter

from models.engines import EngineOptions, Session, get_engine
from models.errors import NotFound, NotReady, Overloaded, PackageError
from models.serving import folder_control, verdicts
from models.serving.folder import Loading, VersionFolder
from models.serving.folder_control import FolderControl, probing
from models.serving.index import ModelState
from models.serving.local import Local
from models.serving.model_settings import ModelSettings
from models.serving.predictor import InferRequest
from models.serving.probe import ProbeRequest, Verdict
from models.serving.repository import Repository
from models.serving.verdicts import Verdicts

X = np.ones((1, 4), np.float32)
POLL = 0.005


class Shop:
    """A folder of `y = factor * x` models with what serves it."""

    def __init__(self, folder: Path, write: OnnxWriter) -> None:
        self.folder = folder
        self.write = write
        self.repository = Repository(engines=())
        self.control = self.make()
        self.opened: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def make(self, poll: float | None = None, probe: folder_control.Probe | None = None) -> FolderControl:
        self.control = FolderControl(
            self.repository, self.folder, engines=("onnx",), poll=poll, probe=probe, open_session=self._open
        )
        return self.control

    def _open(self, engine: str, file: Path, options: EngineOptions, settings: ModelSettings) -> Session:
        assert self.gate.wait(10)
        self.opened.append("/".join(file.parts[-3:-1]))
        return get_engine(engine).load(file, options)

    def put(self, model: str, version: int, factor: float | None = None) -> Path:
        path = self.folder / model / str(version) / "model.onnx"
        return self.write("scale", path, factor=float(version if factor is None else factor))

    def spoil(self, model: str, version: int) -> None:
        path = self.folder / model / str(version) / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"garbage")

    def settle(self, model: str, text: str) -> None:
        (self.folder / model / "model.toml").write_text(text)

    async def ask(self, model: str = "m", version: str | None = None) -> float:
        local = Local(self.repository, "edge")
        answer = await local.infer(InferRequest(model=model, version=version, inputs={"x": X}))
        await local.close()
        return float(answer.outputs["y"][0, 0])

    async def looked(self, name: str) -> None:
        """Return once polling has looked twice more: it has followed a model that was not there before."""
        self.put(name, 1)
        await eventually(lambda: self.states(name) == {"1": "READY"})

    def states(self, model: str = "m") -> dict[str, str]:
        return {each.version: each.state for each in self.control.states() if each.name == model}

    def reason(self, model: str, version: str) -> str:
        (found,) = (each.reason for each in self.control.states() if (each.name, each.version) == (model, version))
        return found


@pytest.fixture
async def shop(tmp_path: Path, onnx_model: OnnxWriter) -> AsyncIterator[Shop]:
    folder = tmp_path / "models"
    folder.mkdir()
    made = Shop(folder, onnx_model)
    yield made
    made.gate.set()
    await made.control.close()
    await made.repository.close()


async def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


# --- the first load ------------------------------------------------------------------------------------------------


async def test_every_version_is_served_and_the_highest_number_by_default(shop: Shop) -> None:
    for version in (1, 2, 10):
        shop.put("m", version)
    assert not shop.control.is_settled()
    assert await shop.control.start() == []
    assert shop.control.is_settled()
    assert [await shop.ask(), await shop.ask(version="2")] == [10.0, 2.0]
    assert shop.repository.describe("m", None).versions == ("1", "2", "10")
    assert shop.control.states() == [ModelState("m", version, "READY") for version in ("1", "2", "10")]


async def test_a_bad_model_is_named_and_the_others_are_served(shop: Shop) -> None:
    for model in ("good", "half", "lies", "odd"):
        shop.put(model, 1)
    (shop.folder / "lies" / "1" / "manifest.json").write_text("{}")
    shop.settle("odd", "colour = 1")
    for name in ("empty/1", "unversioned/latest", ".hidden/1"):
        (shop.folder / name).mkdir(parents=True)
    shop.spoil("half", 2)
    (shop.folder / "README").write_text("not a model")
    problems = await shop.control.start()
    assert shop.repository.names() == ["good", "half"]
    expected = {
        "empty/1": "holds none of model.onnx, model.tflite",
        "half/2": "onnxruntime refuses",
        "lies/1": "manifest",
        "odd": "odd/model.toml: Object contains unknown field `colour`",
        "unversioned": "has no version folder",
    }
    assert len(problems) == len(expected)
    for problem, (place, reason) in zip(sorted(problems), sorted(expected.items()), strict=True):
        assert problem.startswith(f"{shop.folder / place}: ")
        assert reason in problem
        model, _, version = place.partition("/")
        assert shop.states(model)[version] == "UNAVAILABLE"
        assert reason in shop.reason(model, version)
    assert shop.states("half") == {"1": "READY", "2": "UNAVAILABLE"}


@pytest.mark.parametrize("place", ["missing", "empty", "file"])
async def test_a_folder_with_nothing_to_serve_is_an_error_that_names_it(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(PackageError, match=str(tmp_path / place)):
        await FolderControl(Repository(engines=()), tmp_path / place).start()


async def test_a_model_that_is_not_preloaded_is_tried_and_closed_until_it_is_asked_for(shop: Shop) -> None:
    shop.put("m", 2)
    shop.settle("m", "preload = false")
    await shop.control.start()
    assert shop.states() == {"2": "READY"}
    assert shop.repository.residency.use().resident == 0
    assert shop.control.config("m", None)["parameters"]["resident"] == {"string_value": "false"}  # type: ignore[index]
    loaded = await shop.repository.resident("m", None, None)
    assert loaded.session.run({"x": X}, ())[0][0, 0] == 2.0


async def test_what_a_framework_sets_up_once_is_charged_to_no_model(shop: Shop) -> None:
    for model in "ab":
        shop.put(model, 1)
    shop.repository = Repository(engines=(), memory_budget=1 << 40)
    await shop.make().start()
    assert shop.repository.residency.use().loads == 2
    assert shop.repository.registered("a", None).cost < 8e6


# --- load ----------------------------------------------------------------------------------------------------------


async def test_a_load_takes_in_what_is_new_changed_and_gone_and_leaves_the_rest_alone(shop: Shop) -> None:
    for version in (1, 2, 3):
        shop.put("m", version)
    await shop.control.start()
    kept = shop.repository.lookup("m", "2")
    shutil.rmtree(shop.folder / "m" / "1")
    shop.put("m", 3, 33.0)
    shop.put("m", 4)
    await shop.control.load("m")
    assert shop.repository.describe("m", None).versions == ("2", "3", "4")
    assert [await shop.ask(), await shop.ask(version="3")] == [4.0, 33.0]
    assert shop.repository.lookup("m", "2") is kept
    loads = shop.repository.residency.use().loads
    await shop.control.load("m")
    assert shop.repository.residency.use().loads == loads


async def test_a_load_that_fails_changes_nothing_and_is_told(shop: Shop) -> None:
    shop.put("m", 1)
    await shop.control.start()
    before = shop.repository.lookup("m", None)
    shop.put("m", 2)
    shop.spoil("m", 3)
    with pytest.raises(PackageError, match=r"model 'm' version '3': onnxruntime refuses"):
        await shop.control.load("m")
    assert shop.repository.lookup("m", None) is before
    assert shop.states() == {"1": "READY", "3": "UNAVAILABLE"}
    assert shop.repository.residency.use().registered == 1
    shop.settle("m", "batching = 0")
    with pytest.raises(PackageError, match=r"model 'm': m/model\.toml: .*batching"):
        await shop.control.load("m")
    assert await shop.ask() == 1.0
    shop.settle("m", "")
    shop.put("m", 3)
    await shop.control.load("m")
    assert shop.states() == {"1": "READY", "2": "READY", "3": "READY"}


async def test_what_served_before_serves_until_the_new_is_ready(shop: Shop) -> None:
    shop.put("m", 1)
    await shop.control.start()
    shop.put("m", 2)
    shop.gate.clear()
    loading = asyncio.create_task(shop.control.load("m"))
    await eventually(lambda: shop.states() == {"1": "READY", "2": "LOADING"})
    assert await shop.ask() == 1.0
    shop.gate.set()
    await loading
    assert await shop.ask() == 2.0


async def test_a_caller_who_leaves_does_not_break_a_load_off(shop: Shop) -> None:
    shop.put("m", 1)
    await shop.control.start()
    shop.put("m", 2)
    shop.gate.clear()
    loading = asyncio.create_task(shop.control.load("m"))
    await eventually(lambda: "2" in shop.states())
    loading.cancel()
    shop.gate.set()
    await eventually(lambda: shop.states() == {"1": "READY", "2": "READY"})


async def test_closing_ends_a_load_under_way_and_leaves_nothing_open(shop: Shop) -> None:
    shop.put("m", 1)
    await shop.control.start()
    shop.put("m", 2)
    shop.gate.clear()
    loading = asyncio.create_task(shop.control.load("m"))
    await eventually(lambda: "2" in shop.states())
    await shop.control.close()
    shop.gate.set()
    with pytest.raises(NotReady, match="stopping"):
        await loading
    assert shop.states() == {"1": "READY"}


async def test_changed_settings_reload_a_version_and_are_in_force_with_it(shop: Shop) -> None:
    shop.put("m", 1)
    await shop.control.start()
    before = shop.repository.lookup("m", None)
    assert before.batching.rows > 1
    assert not shop.repository.settings("m").cache
    shop.settle("m", 'batching = "off"\ncache = true')
    await shop.control.load("m")
    assert shop.repository.lookup("m", None).batching.rows == 1
    assert shop.repository.settings("m").cache
    assert shop.repository.settings("nobody") == ModelSettings()


async def test_a_version_policy_decides_what_is_loaded(shop: Shop) -> None:
    for version in (1, 2, 3):
        shop.put("m", version)
    shop.settle("m", 'version_policy = "latest"')
    await shop.control.start()
    assert shop.states() == {"1": "UNAVAILABLE", "2": "UNAVAILABLE", "3": "READY"}
    assert shop.reason("m", "1") == "left out by its version policy"
    kept = shop.repository.lookup("m", None)
    shop.settle("m", "version_policy = { specific = [1, 3] }")
    await shop.control.load("m")
    assert shop.states() == {"1": "READY", "2": "UNAVAILABLE", "3": "READY"}
    assert shop.repository.lookup("m", "3") is kept


@pytest.mark.parametrize("name", ["nobody", "..", "../models/m", "m/1", ""])
async def test_a_model_that_the_folder_does_not_hold_is_not_found(shop: Shop, name: str) -> None:
    shop.put("m", 1)
    await shop.control.start()
    for change in (shop.control.load, shop.control.unload):
        with pytest.raises(NotFound):
            await change(name)
    with pytest.raises(NotFound):
        shop.control.config(name, None)
    assert shop.states() == {"1": "READY"}


async def test_only_so_many_changes_may_wait(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_control, "MAX_PENDING", 2)
    shop.put("m", 1)
    await shop.control.start()
    shop.put("m", 2)
    shop.gate.clear()
    loading = [asyncio.create_task(shop.control.load("m")) for _ in range(2)]
    await eventually(lambda: "2" in shop.states())
    with pytest.raises(Overloaded):
        await shop.control.load("m")
    shop.gate.set()
    await asyncio.gather(*loading)


# --- unload --------------------------------------------------------------------------------------------------------


async def test_an_unloaded_model_is_gone_until_it_is_loaded_again(shop: Shop) -> None:
    shop.put("m", 1)
    shop.put("other", 1)
    await shop.control.start()
    before = shop.repository.lookup("m", None)
    before.acquire()
    await shop.control.unload("m")
    assert shop.states() == {"1": "UNLOADING"}
    before.release()
    assert shop.states() == {"1": "UNAVAILABLE"}
    assert shop.reason("m", "1") == "unloaded"
    with pytest.raises(NotFound):
        await shop.ask()
    await shop.control.unload("m")
    assert await shop.ask("other") == 1.0
    await shop.control.load("m")
    assert await shop.ask() == 1.0


async def test_those_who_watch_hear_of_every_change_and_no_other(shop: Shop) -> None:
    shop.put("m", 1)
    shop.put("other", 1)
    heard: list[str] = []

    def fail(model: str) -> None:
        raise RuntimeError(model)

    end = shop.control.watch(heard.append)
    shop.control.watch(fail)
    await shop.control.start()
    assert sorted(heard) == ["m", "other"]
    heard.clear()
    await shop.control.load("m")
    assert heard == []
    shop.put("m", 1, 7.0)
    await shop.control.load("m")
    await shop.control.unload("other")
    assert heard == ["m", "other"]
    end()
    end()
    await shop.control.unload("m")
    assert heard == ["m", "other"]


# --- probe ---------------------------------------------------------------------------------------------------------


async def test_files_are_probed_before_they_are_loaded_and_only_those_that_are_new(shop: Shop) -> None:
    asked: list[list[str]] = []

    async def probe(versions: Sequence[VersionFolder]) -> Sequence[Verdict]:
        asked.append([f"{each.model}/{each.version}" for each in versions])
        return [Verdict(each.version != "2", "it killed the probe") for each in versions]

    shop.put("m", 1)
    shop.put("n", 1)
    shop.put("n", 2)
    control = shop.make(probe=probe)
    problems = await control.start()
    assert problems == [f"{shop.folder / 'n' / '2'}: it killed the probe"]
    shop.put("m", 2)
    with pytest.raises(PackageError, match="'m' version '2': it killed the probe"):
        await control.load("m")
    shutil.rmtree(shop.folder / "m" / "2")
    shop.put("m", 3)
    await control.load("m")
    assert asked == [["m/1", "n/1", "n/2"], ["m/2"], ["m/3"]]
    assert shop.states() == {"1": "READY", "3": "READY"}


async def test_a_real_child_tries_the_files(shop: Shop, tmp_path: Path) -> None:
    shop.put("m", 1)
    shop.spoil("m", 2)
    shop.put("m", 3)
    (shop.folder / "m" / "3" / "manifest.json").write_text("{}")
    problems = await shop.make(probe=probing(Verdicts(tmp_path / "verdicts"))).start()
    assert [problem.partition(": ")[0] for problem in problems] == [str(shop.folder / "m" / each) for each in "23"]
    assert "manifest" in problems[1]
    assert shop.states() == {"1": "READY", "2": "UNAVAILABLE", "3": "UNAVAILABLE"}


async def test_what_lies_beside_a_file_is_part_of_what_was_tried(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    async def probe_files(requests: Sequence[ProbeRequest]) -> list[Verdict]:
        found = [Path(each.path).with_name("weights.data") for each in requests]
        tried.extend(file.read_text() if file.exists() else "missing" for file in found)
        return [Verdict(file.exists(), "" if file.exists() else "its weights are missing") for file in found]

    monkeypatch.setattr(verdicts, "probe_files", probe_files)
    shop.put("m", 1)
    weights = shop.folder / "m" / "1" / "weights.data"
    outcomes: list[str] = []
    for content in ("good", None, "good", "other", "good"):
        weights.unlink(missing_ok=True)
        if content is not None:
            weights.write_text(content)
        control, repository = shop.make(probe=probing(Verdicts(tmp_path / "verdicts"))), shop.repository
        try:
            await control.load("m")
            outcomes.append("served")
        except PackageError as error:
            outcomes.append(str(error))
        repository.put("m", {}, ModelSettings())
    refused = "model 'm' version '1': its weights are missing"
    assert outcomes == ["served", refused, "served", "served", "served"]
    assert tried == ["good", "missing", "other"]


async def test_a_probe_may_use_memory_for_all_files(shop: Shop) -> None:
    weights = shop.put("m", 1).with_name("weights.data")
    alone = VersionFolder("m", weights.parent, ModelSettings(), Loading(("onnx",))).probe_request()
    weights.write_bytes(bytes(1000))
    beside = VersionFolder("m", weights.parent, ModelSettings(), Loading(("onnx",))).probe_request()
    assert beside.limits.memory_bytes == alone.limits.memory_bytes + 5 * 1000


async def test_a_model_that_is_stuck_is_not_ready_and_another_load_replaces_it(shop: Shop) -> None:
    shop.put("m", 1)
    await shop.control.start()
    stuck = shop.repository.lookup("m", None)
    stuck.stuck = True
    assert shop.states() == {"1": "UNAVAILABLE"}
    assert shop.reason("m", "1") == "it is stuck in a run that cannot be stopped"
    assert not shop.repository.is_ready("m", None)
    await shop.control.load("m")
    assert shop.states() == {"1": "READY"}
    assert shop.repository.lookup("m", None) is not stuck


# --- polling -------------------------------------------------------------------------------------------------------


async def test_polling_follows_what_changes_on_disk(shop: Shop) -> None:
    shop.put("m", 1)
    shop.put("stays", 1)
    await shop.make(poll=POLL).start()
    stays = shop.repository.lookup("stays", None)
    shop.put("m", 2)
    shop.put("fresh", 1)
    await eventually(lambda: shop.states() == {"1": "READY", "2": "READY"} and shop.states("fresh") == {"1": "READY"})
    shutil.rmtree(shop.folder / "m")
    await eventually(lambda: shop.states() == {})
    assert shop.repository.names() == ["fresh", "stays"]
    assert shop.repository.lookup("stays", None) is stays


async def test_polling_tries_a_bad_file_once_until_it_changes(shop: Shop) -> None:
    shop.put("m", 1)
    await shop.make(poll=POLL).start()
    shop.spoil("m", 2)
    await eventually(lambda: shop.states() == {"1": "READY", "2": "UNAVAILABLE"})
    tried = shop.opened.count("m/2")
    await shop.looked("first")
    await shop.looked("second")
    assert shop.opened.count("m/2") == tried
    shop.put("m", 2)
    await eventually(lambda: shop.states() == {"1": "READY", "2": "READY"})


async def test_polling_leaves_alone_what_was_unloaded_until_it_changes(shop: Shop) -> None:
    shop.put("m", 1)
    await shop.make(poll=POLL).start()
    await shop.looked("first")
    await shop.control.unload("m")
    await shop.looked("second")
    assert shop.states() == {"1": "UNAVAILABLE"}
    shop.put("m", 1, 5.0)
    await eventually(lambda: shop.states() == {"1": "READY"})


async def test_a_folder_that_is_away_takes_nothing_out_of_service(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.put("m", 1)
    await shop.make(poll=POLL).start()
    shop.folder.rename(shop.folder.with_name("away"))
    await eventually(lambda: "could not be looked through" in caplog.text)
    assert await shop.ask() == 1.0
    shop.folder.with_name("away").rename(shop.folder)
    shop.put("m", 2)
    await eventually(lambda: shop.states() == {"1": "READY", "2": "READY"})
