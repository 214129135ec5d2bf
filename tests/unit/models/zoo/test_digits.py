"""The shipped digits packages do what their manifests and their model card say."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from models.engines import EngineOptions, available_engines, get_engine
from models.errors import ContractBreach, NotFound
from models.manifest import Manifest, Variant, confidence_of
from models.zoo.digits import PACKAGES, VERSIONS, held_out, package_folder
from models.zoo.digits.calibrate import fit_temperature, learn_then_test, softmax, wilson
from models.zoo.digits.data import Part, deal
from models.zoo.digits.evaluate import cascade, figures, manifest_of, probabilities, variant_path

ROOM = Path(package_folder("device").parents[2])
FOLDERS = [package_folder(tier, version) for tier in PACKAGES for version in VERSIONS]
WHEEL_BUDGET = 900_000
SLACK = 3 / 600
"""Images that another processor's rounding may read differently."""


def variants() -> list[tuple[Path, Manifest, Variant]]:
    found = []
    for folder in FOLDERS:
        manifest = manifest_of(folder)
        found += [(folder, manifest, variant) for variant in manifest.variants if variant.engine in available_engines()]
    return found


def name(value: object) -> str | None:
    if isinstance(value, Variant):
        return f"{value.engine}-{value.precision}"
    return f"{value.parent.name}-{value.name}" if isinstance(value, Path) else ""


each_variant = pytest.mark.parametrize(("folder", "manifest", "variant"), variants(), ids=name)
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=name)


def golden(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "golden.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@each_folder
def test_a_folder_holds_exactly_the_files_its_manifest_names(folder: Path) -> None:
    manifest = manifest_of(folder)
    named = {variant.blob.digest: variant.blob.size for variant in manifest.variants}
    named[manifest.golden.digest] = manifest.golden.size
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    assert {f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}": path.stat().st_size for path in files} == named


@pytest.mark.parametrize("tier", PACKAGES)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_is_found_by_tier_and_version_and_names_itself(tier: str, version: str) -> None:
    manifest = manifest_of(package_folder(tier, version))
    assert (manifest.package, manifest.version) == (PACKAGES[tier], version)


@pytest.mark.parametrize(("tier", "version"), [("device", "3"), ("fog", "1"), ("../edge", "1"), ("edge", "..")])
def test_an_unknown_tier_or_version_is_not_found(tier: str, version: str) -> None:
    with pytest.raises(NotFound):
        package_folder(tier, version)


def test_every_package_has_the_same_interface() -> None:
    assert len({(manifest_of(folder).inputs, manifest_of(folder).outputs) for folder in FOLDERS}) == 1


def test_the_device_package_serves_both_engines() -> None:
    for version in VERSIONS:
        forms = [(v.engine, v.precision) for v in manifest_of(package_folder("device", version)).variants]
        assert forms == [("onnx", "int8"), ("litert", "int8")]


def test_the_artifacts_fit_the_wheel() -> None:
    assert sum(path.stat().st_size for path in (ROOM / "artifacts").rglob("*") if path.is_file()) < WHEEL_BUDGET


@each_variant
def test_golden_outputs_are_met_within_the_tolerance(folder: Path, manifest: Manifest, variant: Variant) -> None:
    arrays = golden(folder)
    got = probabilities(folder, variant, arrays["in.image"])
    np.testing.assert_allclose(got, arrays["out.probabilities"], rtol=0, atol=variant.tolerance)


@each_variant
def test_the_tolerance_tells_one_digit_from_another(folder: Path, manifest: Manifest, variant: Variant) -> None:
    arrays = golden(folder)
    got = probabilities(folder, variant, arrays["in.image"][::-1])
    assert np.abs(got - arrays["out.probabilities"]).max() > 5 * variant.tolerance


@each_variant
def test_any_batch_size_gives_the_same_answers(folder: Path, manifest: Manifest, variant: Variant) -> None:
    images, _ = held_out()
    session = get_engine(variant.engine).load(variant_path(folder, variant), EngineOptions())
    try:
        whole = session.run({"image": images[:33]}, ["probabilities"])[0]
        for size in (1, 7, 32):
            part = session.run({"image": images[:size]}, ["probabilities"])[0]
            np.testing.assert_allclose(part, whole[:size], rtol=0, atol=1e-5)
    finally:
        session.close()
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole.sum(axis=1), 1, atol=0.02)


def test_a_variant_whose_file_is_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not it")
    with pytest.raises(ContractBreach, match="no file has the digest"):
        variant_path(tmp_path, manifest_of(FOLDERS[0]).variants[0])


def test_the_card_and_the_manifests_state_the_measured_accuracy() -> None:
    card = (ROOM / "README.md").read_text()
    row = r"\| {} \| {} \| {} {} \| {} \| ([0-9.]+) \(([0-9.]+)-([0-9.]+)\) \| {:g} \|"
    measured = list(figures())
    assert measured
    for figure in measured:
        pattern = row.format(
            figure.package, figure.version, figure.engine, figure.precision, figure.size, figure.threshold
        )
        stated = re.search(pattern, card)
        assert stated, f"the card has no row for {figure}"
        assert float(stated[1]) == pytest.approx(figure.right / figure.count, abs=SLACK)
        low, high = wilson(round(float(stated[1]) * figure.count), figure.count)
        assert (float(stated[2]), float(stated[3])) == (pytest.approx(low, abs=6e-4), pytest.approx(high, abs=6e-4))
    for folder in FOLDERS:
        manifest = manifest_of(folder)
        accuracy = manifest.contract.accuracy
        assert any(
            (figure.package, figure.version) == (manifest.package, manifest.version)
            and accuracy == pytest.approx(figure.right / figure.count, abs=SLACK)
            for figure in measured
        )


def test_every_command_and_file_the_card_names_exists() -> None:
    card = (ROOM / "README.md").read_text()
    modules = set(re.findall(r"python -m models\.zoo\.digits\.(\w+)", card))
    assert modules == {"train", "int8", "tflite", "package", "evaluate"}
    for file in {f"{module}.py" for module in modules} | set(re.findall(r"`(\w+\.py)`", card)):
        assert (ROOM / file).is_file(), file


@pytest.mark.skipif("onnx" not in available_engines(), reason="needs onnxruntime")
@pytest.mark.parametrize("version", VERSIONS)
def test_the_cascade_uses_every_tier_and_beats_the_device_alone(version: str) -> None:
    result = cascade(version)
    assert all(share > 0 for share in result.answered.values())
    assert 0.10 <= 1 - result.answered["device"] <= 0.35
    alone = next(figure for figure in figures() if figure.package == "digits-int8" and figure.version == version)
    assert result.right > alone.right
    stated = re.search(rf"^\| {version} \|.*\| ([0-9.]+) \([0-9.-]+\) \|$", cascade_card(), re.MULTILINE)
    assert stated
    assert float(stated[1]) == pytest.approx(result.right / result.count, abs=SLACK)


def cascade_card() -> str:
    return (ROOM / "README.md").read_text().partition("answered on device")[2]


@each_folder
def test_confidence_is_read_from_the_outputs_against_a_real_threshold(folder: Path) -> None:
    confidence = manifest_of(folder).confidence
    assert confidence is not None
    assert 0.5 < confidence.threshold < 1
    arrays = golden(folder)
    value = confidence_of(confidence, {"probabilities": arrays["out.probabilities"]})
    assert value == pytest.approx(float(arrays["out.probabilities"].max(axis=1).min()))


def test_the_held_out_part_is_600_real_images_of_every_digit() -> None:
    images, labels = held_out()
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == ((600, 64), np.float32, (600,), np.int64)
    assert images.min() == 0
    assert images.max() == 16
    assert np.bincount(labels).min() >= 57


def test_golden_images_are_not_held_out() -> None:
    images, _ = held_out()
    seen = {row.tobytes() for row in images}
    for folder in FOLDERS:
        assert not seen & {row.tobytes() for row in golden(folder)["in.image"]}


def test_dealing_is_stratified_and_disjoint() -> None:
    labels = np.repeat(np.arange(10), 90)
    part = Part(np.arange(900)[:, np.newaxis], labels)
    rest, taken = deal(part, 300)
    assert (len(rest.labels), len(taken.labels)) == (600, 300)
    assert set(np.bincount(taken.labels)) == {30}
    assert not set(rest.images.ravel()) & set(taken.images.ravel())


def test_the_shipped_held_out_part_is_the_recipe_s() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    from models.zoo.digits.data import load_split

    split = load_split()
    images, labels = held_out()
    np.testing.assert_array_equal(split.held_out.pixels(), images)
    np.testing.assert_array_equal(split.held_out.labels, labels)
    parts = [{row.tobytes() for row in part.images} for part in split]
    assert [len(part.labels) for part in split] == [897, 300, 600]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


@pytest.mark.parametrize(
    ("errors", "risk", "threshold"),
    [
        ((), 0.01, 0.10),  # no error: (1 - 0.01) ** 300 = 0.049
        ((0.805,), 0.01, 0.81),  # one kept error is one too many: P(X <= 1) = 0.198
        ((0.805,), 0.02, 0.10),  # P(X <= 1) = 0.017
        ((), 0.005, None),  # (1 - 0.005) ** 300 = 0.222: too few images for the promise
        ((0.999,), 0.01, None),  # sure and wrong: no threshold keeps it out
    ],
)
def test_a_threshold_is_the_loosest_that_keeps_the_promise(
    errors: tuple[float, ...], risk: float, threshold: float | None
) -> None:
    confidence = np.linspace(0.11, 0.99, 300)
    wrong = np.zeros(300, dtype=bool)
    confidence[: len(errors)], wrong[: len(errors)] = errors, True
    assert learn_then_test(confidence, wrong, risk) == threshold


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_temperature_undoes_over_confidence(factor: float) -> None:
    random = np.random.RandomState(3)
    logits = random.normal(size=(20_000, 3)) * 2
    labels = np.array([random.choice(3, p=row) for row in softmax(logits)])
    assert fit_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.08)


def test_the_interval_is_wilson_s() -> None:
    # 81 of 263, worked example in Newcombe (1998), Statistics in Medicine 17, table I: 0.2553 to 0.3662.
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
