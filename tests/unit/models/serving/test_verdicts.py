from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from package_writer import scale_package

from models.engines import EngineOptions
from models.serving import verdicts
from models.serving.probe import ProbeLimits, ProbeRequest, Verdict, file_request
from models.serving.verdicts import Verdicts
from models.tensor import TensorSpec

BAD = Verdict(False, "differs")


def request(folder: Path, factor: float = 2.0) -> ProbeRequest:
    package = scale_package(folder, factor)
    variant = package.manifest.variants[0]
    return ProbeRequest(
        str(package.model), str(package.golden), variant, package.manifest, EngineOptions(), ProbeLimits()
    )


def with_variant(asked: ProbeRequest, **changes: Any) -> ProbeRequest:
    return replace(asked, variant=replace(asked.variant, **changes))


def test_a_final_verdict_outlives_the_process(tmp_path: Path) -> None:
    asked = request(tmp_path)
    Verdicts(tmp_path / "kept").keep(asked, BAD)
    assert Verdicts(tmp_path / "kept").find(asked) == BAD


def changed(asked: ProbeRequest, other: ProbeRequest) -> dict[str, ProbeRequest]:
    assert asked.manifest is not None
    assert other.manifest is not None
    manifest = asked.manifest
    return {
        "another file": with_variant(asked, blob=other.variant.blob),
        "another tolerance": with_variant(asked, tolerance=0.5),
        "another engine": with_variant(asked, engine="litert"),
        "other golden arrays": replace(asked, manifest=replace(manifest, golden=other.manifest.golden)),
        "another interface": replace(asked, manifest=replace(manifest, inputs=(TensorSpec("x", "FP32", (-1,)),))),
        "without its golden run": replace(asked, golden=None),
        "without a manifest": replace(asked, golden=None, manifest=None),
        "other options": replace(asked, options=EngineOptions(threads=2)),
    }


def test_a_verdict_is_for_one_file_under_one_promise(tmp_path: Path) -> None:
    kept, asked = Verdicts(tmp_path / "kept"), request(tmp_path)
    kept.keep(asked, BAD)
    for case, other in changed(asked, request(tmp_path / "other", 3.0)).items():
        assert kept.find(other) is None, case


def test_where_a_file_lies_and_how_it_is_bounded_is_no_part_of_its_verdict(tmp_path: Path) -> None:
    kept, asked = Verdicts(tmp_path / "kept"), request(tmp_path)
    kept.keep(asked, BAD)
    assert kept.find(replace(asked, path="/elsewhere", limits=ProbeLimits(cpu_seconds=1))) == BAD


def test_what_may_change_is_not_kept(tmp_path: Path) -> None:
    kept, asked = Verdicts(tmp_path / "kept"), request(tmp_path)
    kept.keep(asked, Verdict(False, "stopped", final=False))
    assert kept.find(asked) is None


@pytest.mark.parametrize("damage", [b"", b'{"ok": tr', b'{"ok": "yes"}'])
def test_a_torn_verdict_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    kept, asked = Verdicts(tmp_path / "kept"), request(tmp_path)
    kept.keep(asked, Verdict(True))
    next((tmp_path / "kept").iterdir()).write_bytes(damage)
    assert kept.find(asked) is None


def test_the_folder_is_bounded_and_the_oldest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "MAX_VERDICTS", 3)
    kept, asked = Verdicts(tmp_path / "kept"), request(tmp_path)
    several = [with_variant(asked, tolerance=tolerance) for tolerance in (0.1, 0.2, 0.3, 0.4, 0.5)]
    for each in several:
        kept.keep(each, BAD)
    assert [kept.find(each) for each in several] == [None, None, BAD, BAD, BAD]


def test_a_disk_that_refuses_costs_nothing_but_the_verdict(tmp_path: Path) -> None:
    asked = request(tmp_path)
    (tmp_path / "file").write_text("")
    kept = Verdicts(tmp_path / "file" / "kept")
    kept.keep(asked, BAD)
    assert kept.find(asked) is None


@pytest.mark.parametrize("folder", ["kept", None])
async def test_only_what_is_not_known_is_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None
) -> None:
    probed: list[float] = []

    async def probe_files(requests: Sequence[ProbeRequest]) -> list[Verdict]:
        probed.extend(each.variant.tolerance for each in requests)
        return [Verdict(False, f"{each.variant.tolerance:g}") for each in requests]

    monkeypatch.setattr(verdicts, "probe_files", probe_files)
    kept, asked = Verdicts(tmp_path / folder if folder else None), request(tmp_path)
    several = [with_variant(asked, tolerance=tolerance) for tolerance in (1.0, 2.0, 3.0)]
    await kept.judge(several[1:2])
    assert [verdict.reason for verdict in await kept.judge(several)] == ["1", "2", "3"]
    assert probed == ([2.0, 1.0, 3.0] if folder else [2.0, 1.0, 2.0, 3.0])
    assert await kept.judge([]) == []


def test_a_verdict_is_for_everything_that_is_loaded_with_the_file(tmp_path: Path) -> None:
    kept = Verdicts(tmp_path / "kept")
    (tmp_path / "model.onnx").write_bytes(b"model")
    alone = file_request(tmp_path / "model.onnx", "onnx")
    beside = file_request(tmp_path / "model.onnx", "onnx", digest="sha256:" + "0" * 64)
    kept.keep(alone, BAD)
    assert (kept.find(alone), kept.find(beside)) == (BAD, None)
