"""A folder of models in the layout that Triton made common: `DIR/<model>/<version>/model.onnx`, `model.tflite`, `model.pt2`.

Versions are numbers; the highest answers when none is asked for. The files are the operator's own: a `manifest.json` beside
one is optional (it adds names, shapes and how confidence is read), and so is `DIR/<model>/model.toml` (`model_settings`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from msgspec import structs

from models.contract import bind
from models.engines import ENGINES, EngineOptions, Session, available_engines, get_engine, model_files
from models.errors import ContractBreach, EngineFailure, NotFound, NotReady, NoUsableVariant, PackageError
from models.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest
from models.serving.confine import FILE_SHARE
from models.serving.loaded import MAX_RUN_SECONDS, Identity, Loaded, blank_row
from models.serving.model_settings import SETTINGS_FILE, ModelSettings, read_settings
from models.serving.probe import ProbeLimits, ProbeRequest, file_request
from models.serving.version_policy import AllVersions, choose_versions

MAX_FILES = 10_000
"""Files of one version that are looked at: a model and its weights are a handful."""
MEMORY_FACTOR = 1.2
"""A loaded version costs at least this many times the size of its files: weights are held unpacked, and what runs them."""

_VERSION = re.compile(r"[0-9]{1,18}")

Models = dict[str, dict[str, Loaded]]
"""Model name -> version -> loaded, versions in ascending order: what `Repository.install` takes."""

Stamp = tuple[tuple[str, int, int, int], ...]
"""What a change of files changes: path within the folder, size, modification time in nanoseconds, inode; ordered."""


OpenSession = Callable[[str, Path, EngineOptions, ModelSettings], Session]
"""Loads a file with the engine of that name, where the model's `isolation` says. Raises PackageError."""


def open_here(engine: str, file: Path, options: EngineOptions, settings: ModelSettings) -> Session:
    """`OpenSession` that keeps every session in this process."""
    return get_engine(engine).load(file, options)


class Loading(NamedTuple):
    """How files become sessions. `engines`: those that may be used. `batching`: False = off for every model."""

    engines: Sequence[str]
    options: EngineOptions = EngineOptions()
    open_session: OpenSession = open_here
    batching: bool = True


class VersionFolder:
    """One version as it lay on disk when it was looked at. Raises PackageError when nothing in it can be loaded.

    `file`: what `engine` loads. `size`: bytes of all files. `settings`: the model's.
    """

    def __init__(self, model: str, path: Path, settings: ModelSettings, loading: Loading) -> None:
        self.model = model
        self.version = path.name
        self.path = path
        self.settings = settings
        self.stamp = stamp(path)
        self.engine, self.file = _find_file(path, loading.engines)
        # Imported now: what a framework weighs is not to be charged to the first model that needs it.
        get_engine(self.engine)
        options = loading.options
        self._options = structs.replace(options, threads=settings.threads) if settings.threads else options
        self._open_session = loading.open_session
        self._max_rows = _max_rows(settings) if loading.batching else 1
        self._digest = ""

    @property
    def size(self) -> int:
        return sum(size for _, size, _, _ in self.stamp)

    def is_same(self, other: VersionFolder | None) -> bool:
        """Whether loading `other` would give what loading this gives: which versions are served has no part in it."""
        return (
            other is not None
            and (self.path, self.engine, self.stamp) == (other.path, other.engine, other.stamp)
            and _of_one_version(self.settings) == _of_one_version(other.settings)
        )

    def open(self, measured: bool) -> Loaded:
        """Load, warm and measure. `measured`: batching was measured before and need not be again. Blocks: in a thread.

        Raises PackageError, or NotReady when the files are not those that were looked at.
        """
        self._check_unchanged()
        digest = self._read_digest()
        manifest = _read_manifest(self.path / "manifest.json")
        options = self._options
        if manifest is not None:
            options = structs.replace(options, inputs=manifest.inputs, outputs=manifest.outputs)
        session = self._open_session(self.engine, self.file, options, self.settings)
        try:
            loaded = self._describe(session, manifest, digest, measured)
            self._check_unchanged()
        except BaseException:
            session.close()
            raise
        return loaded

    def probe_request(self) -> ProbeRequest:
        """What to try in a child before this is loaded here. Reads all files, for their digest: 60 ms for each 100 MB.

        The digest is of all of them because a model may keep its weights beside the file that is loaded.
        Raises PackageError, OSError, or NotReady when the files are not those that were looked at.
        """
        manifest = _read_manifest(self.path / "manifest.json")
        digest = self._read_digest()
        self._check_unchanged()
        beside = self.size - self.file.stat().st_size
        limits = ProbeLimits(memory_bytes=ProbeLimits().memory_bytes + FILE_SHARE * beside)
        return file_request(
            self.file, self.engine, manifest=manifest, options=self._options, limits=limits, digest=digest
        )

    def _read_digest(self) -> str:
        if not self._digest:
            self._digest = _digest(self.path, self.stamp)
        return self._digest

    def _describe(self, session: Session, manifest: Manifest | None, digest: str, measured: bool) -> Loaded:
        package, precision, confidence = self.model, "", None
        if manifest is not None:
            package, confidence = manifest.package, manifest.confidence
            precisions = [variant.precision for variant in manifest.variants if variant.engine == self.engine]
            precision = precisions[0] if len(precisions) == 1 else ""
            session = bind(session, manifest.inputs, manifest.outputs)
        inputs = manifest.inputs if manifest else tuple(session.inputs)
        outputs = manifest.outputs if manifest else tuple(session.outputs)
        # The files' own digest: a file put in the place of another under the same number is another model to a cache.
        identity = Identity(package, self.version, self.engine, precision, variant=digest)
        settings = self.settings
        samples = [blank_row(inputs), None] if settings.warmup else [None]
        for sample in samples:
            try:
                loaded = Loaded(
                    identity,
                    session,
                    inputs=inputs,
                    outputs=outputs,
                    confidence=confidence,
                    sample=sample,
                    max_rows=1 if measured else self._max_rows,
                    max_run_seconds=settings.max_run_seconds or MAX_RUN_SECONDS,
                )
            except EngineFailure:
                # Zeros need not be valid input (an index, say): then the model is never run inside the event loop.
                if sample is None:
                    raise
                continue
            if settings.isolation == "process":
                loaded.inline_elements = 0  # another process may hang: the loop must not wait for it
            return loaded
        raise AssertionError("one of the samples is None")

    def _check_unchanged(self) -> None:
        if stamp(self.path) != self.stamp:
            raise NotReady("its files have changed since they were looked at: load the model again")


class ModelFolder:
    """One model as it lay on disk when it was looked at: what its settings say, and which versions they choose.

    `versions`: by ascending number, those to be served that can be. `problems`: version -> why it cannot be, or is not.
    """

    def __init__(self, path: Path, loading: Loading) -> None:
        """Raises PackageError for wrong settings or when there is no version; OSError."""
        self.name = path.name
        self.stamp = stamp(path)
        self.settings = read_settings(path / SETTINGS_FILE)
        self.versions: dict[str, VersionFolder] = {}
        self.problems: dict[str, str] = {}
        self.left_out: list[str] = []
        present = [each.name for each in path.iterdir() if each.is_dir() and _VERSION.fullmatch(each.name)]
        if not present:
            raise PackageError(f"has no version folder: expected {self.name}/1")
        chosen = choose_versions(self.settings.version_policy, present)
        self.left_out = sorted(set(present) - set(chosen))
        if not chosen:
            raise PackageError(f"its version policy chooses none of the versions {', '.join(sorted(present))}")
        for version in chosen:
            try:
                self.versions[version] = VersionFolder(self.name, path / version, self.settings, loading)
            except (PackageError, OSError) as error:
                self.problems[version] = str(error)


def load_folder(
    folder: Path, *, engines: Sequence[str] | None = None, options: EngineOptions | None = None
) -> tuple[Models, list[str]]:
    """Load every version of every model. Returns them, and one line naming the path for each that could not be.

    Blocks while files load. `engines`: None = those installed. Raises PackageError when `folder` is not a folder or
    nothing in it can be served.
    """
    loading = Loading(available_engines() if engines is None else engines, options or EngineOptions())
    models: Models = {}
    problems: list[str] = []
    for name in model_names(folder):
        try:
            found = ModelFolder(folder / name, loading)
        except (PackageError, OSError) as error:
            problems.append(f"{folder / name}: {error}")
            continue
        problems += [f"{folder / name / version}: {reason}" for version, reason in found.problems.items()]
        for version, source in found.versions.items():
            try:
                models.setdefault(name, {})[version] = source.open(False)
            except (PackageError, OSError) as error:
                problems.append(f"{source.path}: {error}")
    models = {name: versions for name, versions in models.items() if versions}
    if not models:
        detail = "".join(f"\n  {problem}" for problem in problems)
        raise PackageError(f"{folder} holds no model that can be served: expected <model>/<version>/model.onnx{detail}")
    return models, problems


def model_names(folder: Path) -> list[str]:
    """Names of the models in `folder`, sorted. Raises PackageError when it is not a folder; OSError."""
    if not folder.is_dir():
        raise PackageError(f"{folder} is not a folder")
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_model(folder: Path, name: str) -> Path:
    """The folder of model `name`. Raises NotFound: `name` is a caller's word and must be one that the folder lists."""
    if name not in model_names(folder):
        raise NotFound(f"there is no model '{name}' in the repository")
    return folder / name


def stamp(path: Path) -> Stamp:
    """Of all files below `path`. Raises OSError."""
    found = []
    for each in islice(path.rglob("*"), MAX_FILES):
        about = each.stat()
        if each.is_file():
            found.append((str(each.relative_to(path)), about.st_size, about.st_mtime_ns, about.st_ino))
    return tuple(sorted(found))


def look(folder: Path) -> Mapping[str, Stamp]:
    """The stamp of every model now, by name. Raises PackageError, OSError."""
    return {name: stamp(folder / name) for name in model_names(folder)}


def _of_one_version(settings: ModelSettings) -> ModelSettings:
    return structs.replace(settings, version_policy=AllVersions(), preload=True)


def _max_rows(settings: ModelSettings) -> int | None:
    if settings.batching == "auto":
        return None
    return 1 if settings.batching == "off" else settings.batching


def _digest(path: Path, files: Stamp) -> str:
    """Of the names and contents of all files."""
    total = hashlib.sha256()
    for name, *_ in files:
        with (path / name).open("rb") as file:
            total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _find_file(folder: Path, engines: Sequence[str]) -> tuple[str, Path]:
    found = [(name, folder / file) for name, file in model_files()]
    present = [(name, path) for name, path in found if path.is_file()]
    if not present:
        raise ContractBreach(f"holds none of {', '.join(path.name for _, path in found)}")
    for name, path in present:
        if name in engines:
            return name, path
    needed = " or ".join(module for name, _ in present for module in ENGINES[name].modules)
    raise NoUsableVariant(f"{present[0][1].name} needs {needed}, which is not installed")


def _read_manifest(path: Path) -> Manifest | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return decode_manifest(file.read(MAX_MANIFEST_BYTES + 1))
