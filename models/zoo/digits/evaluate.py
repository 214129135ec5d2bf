"""The figures of the model card: `python -m models.zoo.digits.evaluate` prints them, measured on the shipped files.

Every variant whose engine is installed runs on the held-out part through the engines that serve it. The second table plays
the cascade without a network: device, then edge, then cloud, each keeping what reaches its package's threshold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from models.engines import EngineOptions, available_engines, get_engine
from models.errors import ContractBreach
from models.manifest import Manifest, Variant, decode_manifest
from models.tensor import Array
from models.zoo.digits import PACKAGES, VERSIONS, held_out, package_folder
from models.zoo.digits.calibrate import wilson


class Figure(msgspec.Struct, frozen=True):
    """One variant on the held-out part. `kept`: share at or above the threshold; `kept_wrong`: share kept and wrong."""

    package: str
    version: str
    engine: str
    precision: str
    size: int
    count: int
    right: int
    threshold: float
    kept: float
    kept_wrong: float


class Cascade(msgspec.Struct, frozen=True):
    """One version of all three packages. `answered`: tier -> share of the held-out images that it answers."""

    version: str
    count: int
    right: int
    answered: Mapping[str, float]


def manifest_of(folder: Path) -> Manifest:
    """The decoded manifest of a package folder. Raises InvalidManifest."""
    return decode_manifest((folder / "manifest.json").read_bytes())


def variant_path(folder: Path, variant: Variant) -> Path:
    """The file of `variant` in a package folder, found by digest. Raises ContractBreach when none has it."""
    for path in sorted(folder.iterdir()):
        if f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" == variant.blob.digest:
            return path
    raise ContractBreach(f"{folder.name}: no file has the digest {variant.blob.digest}")


def probabilities(folder: Path, variant: Variant, images: Array) -> Array:
    """float32 [n, 10] for raw pixels float32 [n, 64], run as one batch. Raises NoUsableVariant, EngineFailure."""
    session = get_engine(variant.engine).load(variant_path(folder, variant), EngineOptions())
    try:
        return session.run({"image": images}, ["probabilities"])[0]
    finally:
        session.close()


def figures() -> Iterator[Figure]:
    """One figure for each shipped variant whose engine is installed, light to heavy."""
    engines = available_engines()
    images, labels = held_out()
    for tier in PACKAGES:
        for version in VERSIONS:
            folder = package_folder(tier, version)
            manifest = manifest_of(folder)
            for variant in manifest.variants:
                if variant.engine in engines:
                    yield _figure(manifest, variant, probabilities(folder, variant, images), labels)


def _figure(manifest: Manifest, variant: Variant, scores: Array, labels: Array) -> Figure:
    right = scores.argmax(axis=1) == labels
    kept = scores.max(axis=1) >= threshold_of(manifest)
    return Figure(
        manifest.package,
        manifest.version,
        variant.engine,
        variant.precision,
        variant.blob.size,
        len(labels),
        int(right.sum()),
        threshold_of(manifest),
        float(kept.mean()),
        float((kept & ~right).mean()),
    )


def threshold_of(manifest: Manifest) -> float:
    """The package's confidence threshold, 0 when it states none."""
    return manifest.confidence.threshold if manifest.confidence else 0.0


def cascade(version: str) -> Cascade:
    """The three packages of one version in turn, each package's first variant, on the held-out part."""
    images, labels = held_out()
    answer = np.full(len(labels), -1)
    answered = {}
    tiers = list(PACKAGES)
    for tier in tiers:
        folder = package_folder(tier, version)
        manifest = manifest_of(folder)
        scores = probabilities(folder, manifest.variants[0], images)
        stays = (answer < 0) & ((scores.max(axis=1) >= threshold_of(manifest)) | (tier == tiers[-1]))
        answer[stays] = scores.argmax(axis=1)[stays]
        answered[tier] = float(stays.mean())
    return Cascade(version, len(labels), int((answer == labels).sum()), answered)


def interval(right: int, count: int) -> str:
    """An accuracy with its 95 % Wilson interval, as the model card shows it."""
    low, high = wilson(right, count)
    return f"{right / count:.4f} ({low:.3f}-{high:.3f})"


def variant_table(rows: Sequence[Figure]) -> str:
    """The first table of the card, Markdown."""
    lines = [
        "| package | version | variant | bytes | held-out accuracy (95 %) | threshold | kept | kept and wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.package} | {row.version} | {row.engine} {row.precision} | {row.size} | {interval(row.right, row.count)} "
        f"| {row.threshold:g} | {row.kept:.1%} | {row.kept_wrong:.2%} |"
        for row in rows
    ]
    return "\n".join(lines)


def cascade_table(rows: Sequence[Cascade]) -> str:
    """The second table of the card, Markdown."""
    lines = [
        "| version | " + " | ".join(f"answered on {tier}" for tier in PACKAGES) + " | accuracy (95 %) |",
        "|---|" + "---|" * (len(PACKAGES) + 1),
    ]
    for row in rows:
        shares = " | ".join(f"{share:.1%}" for share in row.answered.values())
        lines.append(f"| {row.version} | {shares} | {interval(row.right, row.count)} |")
    return "\n".join(lines)


def main() -> None:
    print(variant_table(list(figures())))
    print()
    print(cascade_table([cascade(version) for version in VERSIONS]))


if __name__ == "__main__":
    main()
