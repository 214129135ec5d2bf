"""A folder of models in the layout that Triton made common: `DIR/<model>/<version>/model.onnx` or `model.tflite`.

Versions are numbers; the highest answers when none is asked for. The files are the operator's own: they are loaded without
a probe, and a `manifest.json` beside one is optional. It adds names, shapes and how confidence is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from models.contract import bind
from models.engines import ENGINES, EngineOptions, Session, available_engines, get_engine
from models.errors import ContractBreach, EngineFailure, NoUsableVariant, PackageError
from models.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest
from models.serving.loaded import Identity, Loaded, blank_row
from models.tensor import TensorSpec

_VERSION = re.compile(r"[0-9]{1,18}")

Models = dict[str, dict[str, Loaded]]
"""Model name -> version -> loaded, versions in ascending order: what `Repository.install` takes."""


def load_folder(
    folder: Path, *, engines: Sequence[str] | None = None, options: EngineOptions | None = None
) -> tuple[Models, list[str]]:
    """Load every version of every model. Returns them, and one line naming the path for each that could not be.

    Blocks while files load: call it in a thread or before serving. `engines`: None = those installed. Raises PackageError
    when `folder` is not a folder or nothing in it can be served.
    """
    usable = tuple(available_engines() if engines is None else engines)
    if not folder.is_dir():
        raise PackageError(f"{folder} is not a folder")
    models: Models = {}
    problems: list[str] = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        versions = _load_versions(place, usable, options or EngineOptions(), problems)
        if versions:
            models[place.name] = versions
    if not models:
        detail = "".join(f"\n  {problem}" for problem in problems)
        raise PackageError(f"{folder} holds no model that can be served: expected <model>/<version>/model.onnx{detail}")
    return models, problems


def _load_versions(
    place: Path, engines: Sequence[str], options: EngineOptions, problems: list[str]
) -> dict[str, Loaded]:
    versions: dict[str, Loaded] = {}
    folders = [path for path in place.iterdir() if path.is_dir() and _VERSION.fullmatch(path.name)]
    if not folders:
        problems.append(f"{place}: has no version folder: expected {place / '1'}")
    for path in sorted(folders, key=lambda path: int(path.name)):
        try:
            versions[path.name] = _load_version(place.name, path, engines, options)
        except (PackageError, OSError) as error:
            problems.append(f"{path}: {error}")
    return versions


def _load_version(model: str, folder: Path, engines: Sequence[str], options: EngineOptions) -> Loaded:
    engine, path = _find_file(folder, engines)
    manifest = _read_manifest(folder / "manifest.json")
    session = get_engine(engine).load(path, options)
    try:
        return _describe(model, folder.name, engine, manifest, session)
    except BaseException:
        session.close()
        raise


def _describe(model: str, version: str, engine: str, manifest: Manifest | None, session: Session) -> Loaded:
    inputs, outputs = tuple(session.inputs), tuple(session.outputs)
    if manifest is None:
        return _measured(Identity(model, version, engine), session, inputs, outputs, None)
    precisions = [variant.precision for variant in manifest.variants if variant.engine == engine]
    identity = Identity(manifest.package, version, engine, precisions[0] if len(precisions) == 1 else "")
    bound = bind(session, manifest.inputs, manifest.outputs)
    return _measured(identity, bound, manifest.inputs, manifest.outputs, manifest)


def _measured(
    identity: Identity,
    session: Session,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    manifest: Manifest | None,
) -> Loaded:
    confidence = manifest.confidence if manifest else None
    try:
        sample = blank_row(inputs)
        return Loaded(identity, session, inputs=inputs, outputs=outputs, confidence=confidence, sample=sample)
    except EngineFailure:
        # Zeros need not be valid input (an index, say): then the model is never run inside the event loop.
        return Loaded(identity, session, inputs=inputs, outputs=outputs, confidence=confidence)


def _find_file(folder: Path, engines: Sequence[str]) -> tuple[str, Path]:
    found = [(name, folder / f"model{suffix}") for name, (_, _, suffix) in ENGINES.items()]
    present = [(name, path) for name, path in found if path.is_file()]
    if not present:
        raise ContractBreach(f"holds none of {', '.join(path.name for _, path in found)}")
    for name, path in present:
        if name in engines:
            return name, path
    needed = " or ".join(module for name, _ in present for module in ENGINES[name][1])
    raise NoUsableVariant(f"{present[0][1].name} needs {needed}, which is not installed")


def _read_manifest(path: Path) -> Manifest | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return decode_manifest(file.read(MAX_MANIFEST_BYTES + 1))
