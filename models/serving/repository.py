"""The models served here: prepared beside the running ones, swapped by one assignment, closed when their last run is over.

Meets `sync.updater.Activator` for desired documents, `models.serving.index.ModelIndex` for the frontends, and
`models.serving.router.LocalModels` for the router. All methods belong to one event loop; only loading leaves it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from models.contract import Golden, bind, check_golden, load_golden
from models.desired import Assignment, decode_desired, plan
from models.engines import EngineOptions, available_engines, get_engine
from models.errors import ContractBreach, NotFound, NotReady, PackageError
from models.manifest import MAX_MANIFEST_BYTES, Manifest, Variant, choose_variant, decode_manifest
from models.serving.index import ModelDescription
from models.serving.loaded import CLEAN_ANSWERS, Identity, Loaded, first_row
from models.serving.probe import ProbeLimits, ProbeRequest, probe
from models.serving.verdicts import Verdicts

log = logging.getLogger("tierline.repository")

CLOSE_SECONDS = 10.0
"""How long `close` waits for runs under way."""


@dataclass(frozen=True)
class Entry:
    """What answers to one model name. `versions` is ordered, newest last; `default` answers when none is asked for."""

    default: Loaded
    versions: Mapping[str, Loaded]


@dataclass
class Prepared:
    """A table ready to be served. `fresh`: what was loaded for it and is not in the table it was prepared beside."""

    table: dict[str, Entry] = field(default_factory=dict)
    fresh: list[Loaded] = field(default_factory=list)


class Repository:
    """One immutable table of loaded models, replaced as a whole."""

    def __init__(
        self,
        *,
        engines: Sequence[str] | None = None,
        options: EngineOptions | None = None,
        verdicts: Path | None = None,
        limits: ProbeLimits | None = None,
    ) -> None:
        """`engines`: None = those installed. `verdicts`: folder where probes' verdicts are kept, None = nowhere."""
        self._engines = tuple(available_engines() if engines is None else engines)
        self._options = options or EngineOptions()
        self._verdicts = Verdicts(verdicts)
        self._limits = limits or ProbeLimits()
        self._table: Mapping[str, Entry] = {}
        self._watched: list[tuple[str, Loaded]] = []
        self._settled = False
        self._draining: set[Loaded] = set()
        self._drained = asyncio.Event()
        self._closing: set[asyncio.Future[None]] = set()

    # --- what answers -----------------------------------------------------------------------------------------------

    def lookup(self, model: str, version: str | None) -> Loaded:
        """What answers to `model`, `version` None = the default. Raises NotFound."""
        entry = self._table.get(model)
        if entry is None:
            raise NotFound(f"model '{model}' is not served here")
        if version is None:
            return entry.default
        loaded = entry.versions.get(version)
        if loaded is None:
            raise NotFound(f"model '{model}' has no version '{version}' here; served: {', '.join(entry.versions)}")
        return loaded

    def has(self, model: str, version: str | None) -> bool:
        entry = self._table.get(model)
        return entry is not None and (version is None or version in entry.versions)

    def threshold(self, model: str) -> float:
        """Confidence from which an answer of `model` may stay here; 0 when the package states none, or is not here."""
        entry = self._table.get(model)
        rule = entry.default.confidence if entry else None
        return rule.threshold if rule else 0.0

    def names(self) -> Sequence[str]:
        return sorted(self._table)

    def describe(self, model: str, version: str | None) -> ModelDescription:
        loaded = self.lookup(model, version)
        identity = loaded.identity
        versions = tuple(self._table[model].versions)
        return ModelDescription(model, identity.package, versions, identity.platform, loaded.inputs, loaded.outputs)

    def is_ready(self, model: str, version: str | None) -> bool:
        self.lookup(model, version)
        return True

    def is_settled(self) -> bool:
        """Whether a table was put in force: before that, "no such model" only means "not yet"."""
        return self._settled

    def running(self) -> dict[str, str]:
        """Model name -> `package/version` that answers when no version is asked for."""
        return {name: str(self._table[name].default.identity) for name in self.names()}

    # --- activation -------------------------------------------------------------------------------------------------

    def plan(self, body: bytes, capabilities: Mapping[str, object]) -> Sequence[str]:
        """The digests that a node with `capabilities["engines"]` needs. Raises InvalidManifest or NoUsableVariant."""
        engines = capabilities.get("engines", self._engines)
        if not isinstance(engines, (list, tuple)):
            raise TypeError("capabilities['engines'] is not a list")
        return plan(decode_desired(body), engines)

    async def prepare(self, body: bytes, blobs: Mapping[str, Path]) -> object:
        """Probe, load and warm what `body` asks for; versions that are served already keep their sessions.

        Raises PackageError naming the model, or NotReady when it may work later; then nothing stays loaded and nothing
        served has changed.
        """
        desired = decode_desired(body)
        known = {loaded.identity: loaded for entry in self._table.values() for loaded in entry.versions.values()}
        prepared = Prepared()
        try:
            for name in sorted(desired.models):
                assignment = desired.models[name]
                identity = _identity(assignment, choose_variant(assignment.variants, self._engines))
                if identity not in known:
                    known[identity] = await self._load(name, assignment, blobs)
                    prepared.fresh.append(known[identity])
                prepared.table[name] = Entry(known[identity], {assignment.version: known[identity]})
        except BaseException:
            await self.discard(prepared)
            raise
        return prepared

    async def commit(self, token: object) -> None:
        """Serve what was prepared; requests under way finish on what they started with.

        Raises NotReady when another commit has closed a version that the token meant to keep.
        """
        prepared = _prepared(token)
        if any(loaded.retired for entry in prepared.table.values() for loaded in entry.versions.values()):
            raise NotReady("the models served have changed since this was prepared: prepare it again")
        self._swap(prepared.table)
        prepared.fresh.clear()

    async def discard(self, token: object) -> None:
        """Close what `prepare` loaded; nothing after a commit."""
        prepared = _prepared(token)
        for loaded in prepared.fresh:
            loaded.retire(self._close_soon)
        prepared.fresh.clear()

    def install(self, models: Mapping[str, Mapping[str, Loaded]]) -> None:
        """Serve these versions, name -> version -> loaded, ordered with the newest, the default, last."""
        table = {}
        for name, versions in models.items():
            if not versions:
                raise ValueError(f"model {name!r} has no version")
            table[name] = Entry(list(versions.values())[-1], dict(versions))
        self._swap(table)

    def verdict(self) -> str:
        """`good`, `undecided` or `bad: reason`, from the traffic that what the last commit changed has seen since.

        Bad: a model failed or answered NaN at least 5 times and in more than 20 % of its answers. Good: 20 answers in
        all, and 20 clean ones in a row from any model that ever failed.
        """
        for name, loaded in self._watched:
            if loaded.is_bad:
                counts = f"{loaded.failures} of {loaded.answers}"
                return f"bad: model '{name}' ({loaded.identity}) failed or was not finite in {counts} answers"
        if any(loaded.failures and loaded.clean < CLEAN_ANSWERS for _, loaded in self._watched):
            return "undecided"
        answers = sum(loaded.answers for _, loaded in self._watched)
        return "good" if answers >= CLEAN_ANSWERS or not self._watched else "undecided"

    async def close(self) -> None:
        """Stop serving: wait for runs under way, at most 10 s, and release the sessions."""
        self._swap({})
        self._settled = False
        if self._draining:
            self._drained.clear()
            try:
                await asyncio.wait_for(self._drained.wait(), CLOSE_SECONDS)
            except TimeoutError:
                log.warning("runs of %d versions did not end within %g s", len(self._draining), CLOSE_SECONDS)
        if self._closing:
            await asyncio.wait(self._closing, timeout=CLOSE_SECONDS)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _swap(self, table: Mapping[str, Entry]) -> None:
        before = {loaded for entry in self._table.values() for loaded in entry.versions.values()}
        self._watched = [(name, entry.default) for name, entry in table.items() if entry.default not in before]
        self._table = table
        self._settled = True
        kept = {loaded for entry in table.values() for loaded in entry.versions.values()}
        for loaded in before - kept:
            self._draining.add(loaded)
            loaded.retire(self._close_soon)

    def _close_soon(self, loaded: Loaded) -> None:
        """Close in a thread: freeing a large model takes milliseconds that requests would feel."""
        self._draining.discard(loaded)
        if not self._draining:
            self._drained.set()
        closing = asyncio.get_running_loop().run_in_executor(None, loaded.session.close)
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _load(self, name: str, assignment: Assignment, blobs: Mapping[str, Path]) -> Loaded:
        where = f"model '{name}' ({assignment.package}/{assignment.version})"
        try:
            manifest = _read_manifest(assignment, blobs)
            variant = choose_variant(manifest.variants, self._engines)
            paths = _blob(blobs, variant.blob.digest), _blob(blobs, manifest.golden.digest)
            await self._probe(manifest, variant, *paths)
            return await asyncio.to_thread(self._open, _identity(assignment, variant), manifest, variant, *paths)
        except PackageError as error:
            raise type(error)(f"{where}: {error}") from error

    async def _probe(self, manifest: Manifest, variant: Variant, path: Path, golden: Path) -> None:
        verdict = self._verdicts.get(manifest, variant)
        if verdict is None:
            request = ProbeRequest(str(path), str(golden), variant, manifest, self._options, self._limits)
            verdict = await probe(request)
            self._verdicts.put(manifest, variant, verdict)
        if not verdict.ok:
            # What only this moment is to blame for must not condemn the file.
            raise (ContractBreach if verdict.final else NotReady)(verdict.reason)

    def _open(self, identity: Identity, manifest: Manifest, variant: Variant, path: Path, golden_path: Path) -> Loaded:
        """In a thread: load the file, warm it on the golden inputs, measure it."""
        golden: Golden = load_golden(golden_path, manifest)
        session = get_engine(variant.engine).load(path, self._options)
        try:
            session = bind(session, manifest.inputs, manifest.outputs)
            check_golden(session, manifest, golden, variant.tolerance)
            return Loaded(
                identity,
                session,
                inputs=manifest.inputs,
                outputs=manifest.outputs,
                confidence=manifest.confidence,
                sample=first_row(manifest.inputs, golden.inputs),
            )
        except BaseException:
            session.close()
            raise


def _prepared(token: object) -> Prepared:
    if not isinstance(token, Prepared):
        raise TypeError(f"expected what prepare returned, got {type(token).__name__}")
    return token


def _identity(assignment: Assignment, variant: Variant) -> Identity:
    return Identity(
        assignment.package,
        assignment.version,
        variant.engine,
        variant.precision,
        assignment.manifest.digest,
        variant.blob.digest,
    )


def _blob(blobs: Mapping[str, Path], digest: str) -> Path:
    path = blobs.get(digest)
    if path is None:
        raise ContractBreach(f"file {digest} was not given")
    return path


def _read_manifest(assignment: Assignment, blobs: Mapping[str, Path]) -> Manifest:
    """The manifest, refused when it says anything else than the assignment that named it."""
    with _blob(blobs, assignment.manifest.digest).open("rb") as file:
        manifest = decode_manifest(file.read(MAX_MANIFEST_BYTES + 1))
    for name in ("package", "version", "variants", "golden"):
        if getattr(manifest, name) != getattr(assignment, name):
            raise ContractBreach(f"the manifest's {name} is not what the desired document says")
    return manifest
