"""The models served here: prepared beside the running ones, swapped by one assignment, closed when their last run is over.

Meets `sync.updater.Activator` for desired documents, `models.serving.index.ModelIndex` for the frontends, and
`models.serving.router.LocalModels` for the router. What a desired document asks for stays in memory; versions that
`models.serving.folder_control` puts in may leave it under a memory budget (`models.serving.residency`). All methods belong
to one event loop; only loading leaves it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from models.desired import decode_desired, plan
from models.engines import EngineOptions, available_engines
from models.errors import NotFound, NotReady
from models.manifest import choose_variant
from models.serving.index import ModelDescription
from models.serving.loaded import CLEAN_ANSWERS, Loaded
from models.serving.memory import give_back
from models.serving.model_settings import ModelSettings
from models.serving.package import PackageLoader, identity_of
from models.serving.probe import ProbeLimits
from models.serving.quality_watch import QualityWatch, Serving
from models.serving.registered import Registered
from models.serving.residency import Residency
from models.serving.verdicts import Verdicts

log = logging.getLogger("tierline.repository")

CLOSE_SECONDS = 10.0
"""How long `close` waits for runs under way."""
TRIM_SECONDS = 0.5
"""How long after a version was closed freed memory is given back: once for all that are closed meanwhile."""
RESIDENT_SECONDS = 60.0
"""Longest wait for an evicted model by a request without a deadline."""


class NotResident(NotReady):
    """The version is served but not in memory just now: `Repository.resident` brings it back."""


@dataclass(frozen=True)
class Entry:
    """What answers to one model name. `versions` is ordered, newest last; `default` answers when none is asked for."""

    default: Registered
    versions: Mapping[str, Registered]
    settings: ModelSettings = field(default_factory=ModelSettings)


@dataclass
class Prepared:
    """A table ready to be served. `fresh`: what was loaded for it and is not in the table it was prepared beside."""

    table: dict[str, Entry] = field(default_factory=dict)
    fresh: list[Registered] = field(default_factory=list)


class Repository:
    """One immutable table of loaded models, replaced as a whole."""

    def __init__(
        self,
        *,
        engines: Sequence[str] | None = None,
        options: EngineOptions | None = None,
        verdicts: Path | None = None,
        limits: ProbeLimits | None = None,
        memory_budget: int | None = None,
        quality: QualityWatch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`engines`: None = those installed. `verdicts`: folder where probes' verdicts are kept, None = nowhere.

        `quality`: judges by live traffic what desired documents bring; what they replace then stays loaded until `settled`.

        `memory_budget`: bytes that versions which may be evicted can cost together, None = no bound.
        """
        self._engines = tuple(available_engines() if engines is None else engines)
        self._loader = PackageLoader(
            self._engines, options or EngineOptions(), Verdicts(verdicts), limits or ProbeLimits()
        )
        self._table: Mapping[str, Entry] = {}
        self._watched: list[tuple[str, Loaded]] = []
        self._on_probation = False
        self._quality = quality
        self._replaced: dict[str, Registered] = {}
        self._settled = False
        self._clock = clock
        self._watchers: list[Callable[[str], None]] = []
        self._draining: dict[Loaded, tuple[str, str]] = {}
        self._drained = asyncio.Event()
        self._closing: set[asyncio.Future[None]] = set()
        # One thread for all: freed in many threads, the memory of many versions is kept by as many allocator arenas.
        self._closer: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="tierline-close")
        self._trimming: asyncio.TimerHandle | None = None
        self.residency = Residency(budget=memory_budget, retire=self._retire, clock=clock)

    # --- what answers -----------------------------------------------------------------------------------------------

    def lookup(self, model: str, version: str | None) -> Loaded:
        """What answers to `model`, `version` None = the default. Raises NotFound, or NotResident: then ask `resident`."""
        entry = self._table.get(model)
        if entry is None:
            raise NotFound(f"model '{model}' is not served here")
        loaded = entry.default.loaded if version is None else _version(model, version, entry).loaded
        if loaded is None:
            raise NotResident(f"model '{model}' is not in memory now")
        return loaded

    async def resident(self, model: str, version: str | None, deadline: float | None) -> Loaded:
        """As `lookup`, after loading the version when it is not in memory. `deadline`: monotonic seconds, None = 60 s from now.

        The caller must use what this returns, or `acquire` it, before it suspends. Raises NotFound, DeadlineExceeded,
        Overloaded, or NotReady when it cannot be loaded.
        """
        latest = self._clock() + RESIDENT_SECONDS
        end = latest if deadline is None else min(deadline, latest)
        while True:
            registered = self.registered(model, version)
            if registered.loaded is not None:
                return registered.loaded
            await self.residency.bring(registered, end)

    def registered(self, model: str, version: str | None) -> Registered:
        """What is known of a version, in memory or not. Raises NotFound."""
        entry = self._table.get(model)
        if entry is None:
            raise NotFound(f"model '{model}' is not served here")
        return entry.default if version is None else _version(model, version, entry)

    def versions(self, model: str) -> Mapping[str, Registered]:
        """Those that can be asked for, newest last; none for a model that is not served here."""
        entry = self._table.get(model)
        return entry.versions if entry else {}

    def settings(self, model: str) -> ModelSettings:
        """What the operator says of a model; the defaults when it is not served here, or its package decides."""
        entry = self._table.get(model)
        return entry.settings if entry else ModelSettings()

    def draining(self) -> Iterable[tuple[str, str]]:
        """(model, version) of those that serve no more and still have runs under way."""
        return self._draining.values()

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
        known = self.registered(model, version)
        versions = tuple(self._table[model].versions)
        return ModelDescription(
            model, known.identity.package, versions, known.identity.platform, known.inputs, known.outputs
        )

    def is_ready(self, model: str, version: str | None) -> bool:
        """Whether it can answer: it is in memory and not stuck, or was loaded when it was last wanted there."""
        return self.registered(model, version).is_ready

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """Call `changed(model)` in the loop whenever other versions answer to a model. Returns what ends that."""
        self._watchers.append(changed)

        def end() -> None:
            if changed in self._watchers:
                self._watchers.remove(changed)

        return end

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
        known = {each.identity: each for each in (*self._replaced.values(), *_all(self._table))}
        prepared = Prepared()
        try:
            for name in sorted(desired.models):
                assignment = desired.models[name]
                identity = identity_of(assignment, choose_variant(assignment.variants, self._engines))
                if identity not in known:
                    known[identity] = Registered(name, await self._loader.load(name, assignment, blobs))
                    prepared.fresh.append(known[identity])
                    if self._quality is not None:
                        known[identity].latency_ms = (await self._loader.contract(assignment, blobs)).latency_ms
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
        if any(each.gone for each in _all(prepared.table)):
            raise NotReady("the models served have changed since this was prepared: prepare it again")
        self._judge(prepared.table)
        self._keep_replaced(prepared.table)
        self._swap(prepared.table)
        prepared.fresh.clear()
        self._on_probation = True
        if self._quality is not None:
            self._later(self._quality.save)

    async def discard(self, token: object) -> None:
        """Close what `prepare` loaded; nothing after a commit."""
        prepared = _prepared(token)
        for registered in prepared.fresh:
            self.residency.drop(registered)
        prepared.fresh.clear()

    def install(self, models: Mapping[str, Mapping[str, Loaded]]) -> None:
        """Serve these versions, name -> version -> loaded, ordered with the newest, the default, last."""
        known = {each.loaded: each for each in _all(self._table)}
        table = {}
        for name, versions in models.items():
            if not versions:
                raise ValueError(f"model {name!r} has no version")
            for loaded in versions.values():
                known.setdefault(loaded, Registered(name, loaded))
            kept = {version: known[loaded] for version, loaded in versions.items()}
            table[name] = Entry(list(kept.values())[-1], kept)
        self._judge(table)
        self._swap(table)

    def put(self, model: str, versions: Mapping[str, Registered], settings: ModelSettings) -> None:
        """Let these versions of one model, newest last, answer in place of those that did; {} = it is served no more."""
        table = dict(self._table)
        table.pop(model, None)
        if versions:
            table[model] = Entry(list(versions.values())[-1], dict(versions), settings)
        self._swap(table)

    def verdict(self) -> str:
        """`good`, `undecided` or `bad: reason`, from the traffic that what the last commit changed has seen since; also what
        an earlier one changed whose probation was not over.

        Bad: a model failed or answered NaN at least 5 times and in more than 20 % of its answers, or broke a rule of
        `models.serving.quality`. Good: 20 answers in all, and 20 clean ones in a row from any model that ever failed.
        """
        for name, loaded in self._watched:
            if loaded.is_bad:
                counts = f"{loaded.failures} of {loaded.answers}"
                return f"bad: model '{name}' ({loaded.identity}) failed or was not finite in {counts} answers"
        if self._quality is not None and (fault := self._quality.fault()) is not None:
            return f"bad: {fault}"
        if any(loaded.failures and loaded.clean < CLEAN_ANSWERS for _, loaded in self._watched):
            return "undecided"
        if self._quality is not None and self._watched:
            return self._quality.standing(shadowing=bool(self._replaced))
        answers = sum(loaded.answers for _, loaded in self._watched)
        return "good" if answers >= CLEAN_ANSWERS or not self._watched else "undecided"

    def settled(self) -> None:
        """The probation is over: close what was kept to be compared with and to go back to."""
        served, replaced = set(_all(self._table)), self._replaced
        self._replaced, self._on_probation = {}, False
        for registered in set(replaced.values()) - served:
            self.residency.drop(registered)

    def replaced(self, model: str) -> Loaded | None:
        """The version that answered before, while it is kept."""
        registered = self._replaced.get(model)
        return registered.loaded if registered is not None else None

    async def close(self) -> None:
        """Stop serving: wait for runs under way, at most 10 s, and release the sessions."""
        await self.residency.close()
        self.settled()
        if self._quality is not None:
            self._later(self._quality.save)
        self._swap({})
        self._settled = False
        if self._draining:
            self._drained.clear()
            try:
                await asyncio.wait_for(self._drained.wait(), CLOSE_SECONDS)
            except TimeoutError:
                log.warning("runs of %d versions did not end within %g s", len(self._draining), CLOSE_SECONDS)
        if self._trimming is not None:
            self._trimming.cancel()
            self._trimming = None
        if self._closing:
            await asyncio.wait(self._closing, timeout=CLOSE_SECONDS)
        if self._closer is not None:
            closer, self._closer = self._closer, None  # runs that outlive this are closed in the loop's own threads
            closer.shutdown(wait=False)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _judge(self, table: Mapping[str, Entry]) -> None:
        """From here on `verdict` is about what this table changes, and about what it keeps that has not proved itself yet."""
        before = set(_all(self._table))
        judged = {loaded for _, loaded in self._watched} if self._on_probation else set()
        defaults = [(name, entry.default) for name, entry in table.items()]
        self._watched = [
            (name, each.loaded)
            for name, each in defaults
            if each.loaded is not None and (each not in before or each.loaded in judged)
        ]

    def _keep_replaced(self, table: Mapping[str, Entry]) -> None:
        """Before the swap: what newcomers replace stays; what was kept until now and is not served goes."""
        if self._quality is None:
            return
        before, served, kept = self._table, set(_all(table)), self._replaced
        new = {name for name, _ in self._watched}
        keep = self._quality.rules.shadow
        self._replaced = {}
        for name in new if keep else ():
            older = before[name].default if name in before else None
            if older is table[name].default:
                older = kept.get(name)  # what it took the place of before this commit
            if older is not None:
                self._replaced[name] = older
        for registered in set(kept.values()) - served - set(self._replaced.values()):
            self.residency.drop(registered)
        self._quality.begin(
            {
                name: Serving(
                    entry.default.identity.package,
                    entry.default.identity.version,
                    name in new,
                    entry.default.latency_ms,
                )
                for name, entry in table.items()
            }
        )

    def _swap(self, table: Mapping[str, Entry]) -> None:
        old, self._table = self._table, table
        self._settled = True
        kept = set(_all(table)) | set(self._replaced.values())
        for registered in set(_all(old)) - kept:
            self.residency.drop(registered)
        for name in old.keys() | table.keys():
            before, after = old.get(name), table.get(name)
            if (before and before.versions) != (after and after.versions):
                self._tell(name)

    def _tell(self, model: str) -> None:
        for changed in list(self._watchers):
            try:
                changed(model)
            except Exception:
                log.exception("whoever watches the models failed on '%s'", model)

    def _retire(self, registered: Registered, loaded: Loaded) -> None:
        self._draining[loaded] = registered.name, registered.identity.version
        loaded.retire(self._close_soon)

    def _close_soon(self, loaded: Loaded) -> None:
        """Close in a thread: freeing a large model takes milliseconds that requests would feel."""
        self._draining.pop(loaded, None)
        if not self._draining:
            self._drained.set()
        self._later(loaded.session.close)
        if self._trimming is None:
            self._trimming = asyncio.get_running_loop().call_later(TRIM_SECONDS, self._trim)

    def _trim(self) -> None:
        self._trimming = None
        self._later(give_back)

    def _later(self, work: Callable[[], None]) -> None:
        closing = asyncio.get_running_loop().run_in_executor(self._closer, work)
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


def _version(model: str, version: str, entry: Entry) -> Registered:
    registered = entry.versions.get(version)
    if registered is None:
        raise NotFound(f"model '{model}' has no version '{version}' here; served: {', '.join(entry.versions)}")
    return registered


def _all(table: Mapping[str, Entry]) -> Iterable[Registered]:
    return (registered for entry in table.values() for registered in entry.versions.values())


def _prepared(token: object) -> Prepared:
    if not isinstance(token, Prepared):
        raise TypeError(f"expected what prepare returned, got {type(token).__name__}")
    return token
