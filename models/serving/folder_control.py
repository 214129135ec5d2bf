"""Loads, reloads and unloads what lies in a folder of models, by an operator's word or by itself when files change.

Meets `models.serving.index.ModelControl`. A version whose files and settings are the same keeps its session; a new one is
probed, loaded and warmed beside those that serve, then takes over by one assignment. What cannot be loaded changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path

from models.engines import EngineOptions, available_engines
from models.errors import NotFound, NotReady, Overloaded, PackageError, TierlineError
from models.serving.aside import aside
from models.serving.folder import (
    MEMORY_FACTOR,
    Loading,
    ModelFolder,
    OpenSession,
    Stamp,
    VersionFolder,
    find_model,
    look,
    model_names,
    open_here,
)
from models.serving.index import ModelState
from models.serving.model_config import model_config
from models.serving.model_settings import ModelSettings
from models.serving.probe import ProbeRequest, Verdict
from models.serving.registered import Registered
from models.serving.repository import Repository
from models.serving.residency import LOAD_SECONDS, MEGABYTE
from models.serving.verdicts import Verdicts

log = logging.getLogger("tierline.folder")

MAX_PENDING = 64
"""Loads and unloads that may wait for their turn."""
UNLOADED = "unloaded"
LEFT_OUT = "left out by its version policy"

Probe = Callable[[Sequence[VersionFolder]], Awaitable[Sequence[Verdict]]]
"""Tries files where a crash does no harm; one verdict for each, in order."""
_FAILURES = (TierlineError, OSError, MemoryError)


def probing(verdicts: Verdicts) -> Probe:
    """`Probe` in a child process, for what `verdicts` does not know yet."""

    async def probe(versions: Sequence[VersionFolder]) -> Sequence[Verdict]:
        asked = await aside(lambda: [_request(version) for version in versions])
        judged = iter(await verdicts.judge([each for each in asked if isinstance(each, ProbeRequest)]))
        return [next(judged) if isinstance(each, ProbeRequest) else each for each in asked]

    return probe


def _request(version: VersionFolder) -> ProbeRequest | Verdict:
    try:
        return version.probe_request()
    except (TierlineError, OSError) as error:
        return Verdict(False, _reason(error))


class FolderControl:
    """`ModelControl` over one folder, and what puts its models into `repository`.

    `poll`: seconds between two looks for changed files, None = only when told to. `probe`: None = the files are loaded
    here at once. `open_session`: how a file becomes a session, for models that ask for a process of their own. `batching`:
    False = off, whatever a model's settings say.
    """

    def __init__(
        self,
        repository: Repository,
        folder: Path,
        *,
        engines: Sequence[str] | None = None,
        options: EngineOptions | None = None,
        poll: float | None = None,
        probe: Probe | None = None,
        open_session: OpenSession = open_here,
        batching: bool = True,
    ) -> None:
        self._repository = repository
        self._folder = folder
        usable = tuple(available_engines() if engines is None else engines)
        self._files = Loading(usable, options or EngineOptions(), open_session, batching)
        self._poll_seconds = poll
        self._probe = probe
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loading: set[tuple[str, str]] = set()
        self._down: dict[str, dict[str, str]] = {}
        self._sources: dict[Registered, VersionFolder] = {}
        self._stamps: dict[str, Stamp] = {}
        self._settled = False

    async def start(self) -> list[str]:
        """Load every model. Returns a line naming the path for each version that cannot be served.

        Raises PackageError when the folder is none, or nothing in it can be served.
        """
        problems: list[str] = []
        found: list[ModelFolder] = []
        for name in await asyncio.to_thread(model_names, self._folder):
            try:
                found.append(await self._read(name))
            except _FAILURES as error:
                problems.append(f"{self._folder / name}: {self._note(name, {'': error})['']}")
        verdicts = await self._verdicts(version for model in found for version in model.versions.values())
        if self._repository.residency.budget is not None:
            await self._set_up_engines(found, verdicts)
        for model in found:
            failures = await self._install(model, verdicts, starting=True)
            problems += [f"{self._folder / model.name / version}: {reason}" for version, reason in failures.items()]
        if not self._repository.names():
            detail = "".join(f"\n  {problem}" for problem in problems)
            raise PackageError(
                f"{self._folder} holds no model that can be served: expected <model>/<version>/model.onnx{detail}"
            )
        self._settled = True
        if self._poll_seconds is not None:
            self._begin(self._poll(self._poll_seconds))
        return problems

    def is_settled(self) -> bool:
        """Whether the first load is over."""
        return self._settled

    async def close(self) -> None:
        """Begin no more loads; the repository closes what is loaded."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    # --- ModelControl --------------------------------------------------------------------------------------------------

    def states(self) -> Sequence[ModelState]:
        """Every version known here. READY also while not in memory, when a request would bring it back."""
        found: dict[tuple[str, str], ModelState] = {}
        for name in self._repository.names():
            for version, known in self._repository.versions(name).items():
                reason = known.why_not_ready
                found[name, version] = ModelState(name, version, "UNAVAILABLE" if reason else "READY", reason)
        for key in sorted(self._loading):
            found.setdefault(key, ModelState(*key, "LOADING", "being loaded"))
        for key in self._repository.draining():
            found.setdefault(key, ModelState(*key, "UNLOADING", "runs are under way"))
        for name, versions in self._down.items():
            for version, reason in versions.items():
                found.setdefault((name, version), ModelState(name, version, "UNAVAILABLE", reason))
        return sorted(found.values(), key=lambda state: (state.name, int(state.version or 0), state.version))

    async def load(self, model: str) -> None:
        await self._in_turn(lambda: self._load(model))

    async def unload(self, model: str) -> None:
        await self._in_turn(lambda: self._unload(model))

    def config(self, model: str, version: str | None) -> Mapping[str, object]:
        known = self._repository.registered(model, version)
        return model_config(model, known, self._repository.settings(model))

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        return self._repository.watch(changed)

    # --- one change at a time ------------------------------------------------------------------------------------------

    async def _in_turn(self, change: Callable[[], Awaitable[None]]) -> None:
        """Run `change` in a task of its own: a caller who leaves does not break it off half-way."""
        if len(self._tasks) >= MAX_PENDING:
            raise Overloaded(f"{MAX_PENDING} loads and unloads are waiting, no more are accepted")

        async def run() -> None:
            try:
                await asyncio.wait_for(self._turn.acquire(), LOAD_SECONDS)
            except TimeoutError:
                raise NotReady(f"another load was not over within {LOAD_SECONDS:g} s") from None
            try:
                await change()
            finally:
                self._turn.release()

        task = self._begin(run())
        await asyncio.wait((task,))
        if task.cancelled():
            raise NotReady("this node is stopping")
        task.result()

    def _begin(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # read here: who asked may have gone

    async def _load(self, name: str) -> None:
        try:
            found = await self._read(name)
            verdicts = await self._verdicts(found.versions.values())
        except PackageError as error:
            self._note(name, {"": error})
            raise type(error)(f"model '{name}': {error}") from error
        await self._install(found, verdicts, starting=False)

    async def _unload(self, name: str) -> None:
        served = self._repository.versions(name)
        if not served and name not in self._down:
            raise NotFound(f"there is no model '{name}' in the repository")
        self._down.setdefault(name, {}).update(dict.fromkeys(served, UNLOADED))
        self._put(name, {}, ModelSettings())

    async def _read(self, name: str) -> ModelFolder:
        def read() -> ModelFolder:
            return ModelFolder(find_model(self._folder, name), self._files)

        found = await aside(read)
        self._stamps[name] = found.stamp
        return found

    async def _verdicts(self, versions: Iterable[VersionFolder]) -> Mapping[VersionFolder, Verdict]:
        """Of those that are not loaded already."""
        known = list(self._sources.values())
        new = [version for version in versions if not any(version.is_same(each) for each in known)]
        if self._probe is None or not new:
            return {}
        return dict(zip(new, await self._probe(new), strict=True))

    async def _set_up_engines(self, found: Iterable[ModelFolder], verdicts: Mapping[VersionFolder, Verdict]) -> None:
        """Load the smallest file of each engine and close it: what a framework sets up once is no model's cost."""
        usable = [each for model in found for each in model.versions.values() if _is_good(verdicts.get(each))]
        smallest = {each.engine: each for each in sorted(usable, key=lambda each: each.size, reverse=True)}
        for version in smallest.values():
            try:
                loaded = await asyncio.to_thread(version.open, True)
            except _FAILURES:
                continue  # told when its turn comes
            await asyncio.to_thread(loaded.session.close)

    async def _install(
        self, found: ModelFolder, verdicts: Mapping[VersionFolder, Verdict], *, starting: bool
    ) -> Mapping[str, str]:
        """Serve what was found. Returns version -> why it cannot be served.

        Raises the first such reason, and changes nothing, unless `starting`: then those that can be served are.
        """
        name, before = found.name, self._repository.versions(found.name)
        versions: dict[str, Registered] = {}
        failures: dict[str, Exception] = {version: PackageError(reason) for version, reason in found.problems.items()}
        if failures and not starting:
            raise self._refused(name, failures)
        self._loading.update((name, version) for version in found.versions)
        try:
            for version, source in found.versions.items():
                known = before.get(version)
                if known is not None and known.is_ready and source.is_same(self._sources.get(known)):
                    versions[version] = known
                    continue
                try:
                    versions[version] = await self._open(source, verdicts.get(source))
                except _FAILURES as error:
                    failures[version] = error
                    if not starting:
                        raise self._refused(name, failures) from error
                if starting and not found.settings.preload and version in versions:
                    self._repository.residency.evict(versions[version])
        except BaseException:
            for each in versions.values():
                if each not in before.values():
                    self._forget(each)
            raise
        finally:
            self._loading.difference_update((name, version) for version in found.versions)
        self._down[name] = dict.fromkeys(found.left_out, LEFT_OUT)
        self._put(name, versions, found.settings)
        return self._note(name, failures)

    async def _open(self, source: VersionFolder, verdict: Verdict | None) -> Registered:
        if verdict is not None and not _is_good(verdict):
            raise PackageError(verdict.reason)
        stated = source.settings.memory_mb
        registered = await self._repository.residency.open(
            source.model,
            source.open,
            floor=int(source.size * MEMORY_FACTOR),
            stated=None if stated is None else int(stated * MEGABYTE),
        )
        self._sources[registered] = source
        return registered

    def _forget(self, registered: Registered) -> None:
        self._sources.pop(registered, None)
        self._repository.residency.drop(registered)

    def _put(self, name: str, versions: Mapping[str, Registered], settings: ModelSettings) -> None:
        for each in self._repository.versions(name).values():
            if each not in versions.values():
                self._sources.pop(each, None)
        self._repository.put(name, versions, settings)

    def _refused(self, name: str, failures: Mapping[str, Exception]) -> TierlineError:
        self._note(name, failures)
        version, error = next(iter(failures.items()))
        kind = type(error) if isinstance(error, (PackageError, NotReady)) else PackageError
        return kind(f"model '{name}' version '{version}': {_reason(error)}")

    def _note(self, name: str, failures: Mapping[str, Exception]) -> Mapping[str, str]:
        """Keep for `states` why these versions are not served."""
        reasons = {version: _reason(error) for version, error in failures.items()}
        self._down.setdefault(name, {}).update(reasons)
        return reasons

    # --- by itself -----------------------------------------------------------------------------------------------------

    async def _poll(self, seconds: float) -> None:
        """What two looks in a row saw alike is followed: a copy under way is not loaded half."""
        seen: Mapping[str, Stamp] = {}
        failed = False
        while True:
            await asyncio.sleep(seconds)
            try:
                latest = await asyncio.to_thread(look, self._folder)
                failed = False
            except (PackageError, OSError) as error:
                # A file that vanished while it was looked at, or a disk that is away: what serves goes on serving.
                if not failed:
                    log.warning("%s could not be looked through: %s", self._folder, error)
                failed = True
                continue
            for name in sorted(seen.keys() | latest.keys() | self._stamps.keys()):
                if latest.get(name) == seen.get(name) != self._stamps.get(name):
                    await self._follow(name, latest.get(name))
            seen = latest

    async def _follow(self, name: str, stamp: Stamp | None) -> None:
        try:
            if stamp is None:
                del self._stamps[name]
                await self.unload(name)
                self._down.pop(name, None)
                log.info("model '%s' is gone from the folder: unloaded", name)
            else:
                self._stamps[name] = stamp
                await self.load(name)
                log.info("model '%s' has changed: loaded", name)
        except _FAILURES as error:
            log.warning("model '%s' has changed, what served goes on: %s", name, error)


def _is_good(verdict: Verdict | None) -> bool:
    return verdict is None or verdict.ok


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "not enough memory" if isinstance(error, MemoryError) else str(error)
