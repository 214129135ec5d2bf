"""Whether engines and models do what they should: facts for a doctor, as (status, what was found, what to do).

Status is ok, warn, fail or skip. What asks, and what is done with the answer, is not known here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from models.contract import Golden, bind, check_golden, load_golden
from models.desired import decode_desired, plan
from models.engines import ENGINES, EngineOptions, available_engines, get_engine
from models.errors import ContractBreach, Forbidden, NotReady, TierlineError, Unauthenticated
from models.manifest import MAX_MANIFEST_BYTES, Manifest, Variant, choose_variant, decode_manifest
from models.tensor import Array, TensorSpec

Fact = tuple[str, str, str]
RUNS = 5
"""Runs of the golden inputs; the fastest one counts, after one that warms up."""
MAX_MODELS = 16
"""Models that are asked: a node with more is asked about the first of them."""


@dataclass(frozen=True)
class Case:
    """A model and its golden inputs. `paths`: digest -> file."""

    model: str
    manifest: Manifest
    variant: Variant
    golden: Golden
    file: Path


def needs(body: bytes) -> Collection[str]:
    """Digests that a desired document needs on this machine. Raises TierlineError."""
    return plan(decode_desired(body), available_engines())


def engines(*, load: bool = True) -> Fact:
    """Whether each installed engine's framework can be imported, and its version. `load` False: imports nothing, for a
    process that serves and must not grow by a framework it does not use."""
    good, bad = [], []
    for name in available_engines():
        if not load:
            loaded = [
                f"{each} {getattr(sys.modules[each], '__version__', '')}"
                for each in ENGINES[name].modules
                if each in sys.modules
            ]
            good.append(f"{name} ({', '.join(loaded) or 'installed, not in use'})")
            continue
        try:
            get_engine(name)
        except Exception as error:  # noqa: BLE001 - a broken framework raises whatever it likes at its import
            bad.append(f"{name}: {error}")
        else:
            good.append(f"{name} ({_version(ENGINES[name].modules)})")
    if bad:
        return "fail", "; ".join(bad), "install the framework again, for this Python and this processor"
    if not good:
        return "fail", "no engine is installed", "pip install 'tierline[device]'"
    return "ok", ", ".join(good), ""


def cases(body: bytes, path_of: Callable[[str], Path]) -> Iterator[Case]:
    """The models of a desired document's body. Raises TierlineError or OSError for files that are not there or damaged."""
    for model, assignment in list(decode_desired(body).models.items())[:MAX_MODELS]:
        with path_of(assignment.manifest.digest).open("rb") as file:
            manifest = decode_manifest(file.read(MAX_MANIFEST_BYTES + 1))
        variant = choose_variant(manifest.variants, available_engines())
        golden = load_golden(path_of(manifest.golden.digest), manifest)
        yield Case(model, manifest, variant, golden, path_of(variant.blob.digest))


def run_here(body: bytes, path_of: Callable[[str], Path]) -> Fact:
    """Load each model in this process, run its golden inputs, compare."""

    def ask(case: Case) -> float:
        options = EngineOptions(inputs=case.manifest.inputs, outputs=case.manifest.outputs)
        session = bind(
            get_engine(case.variant.engine).load(case.file, options), case.manifest.inputs, case.manifest.outputs
        )
        try:
            check_golden(session, case.manifest, case.golden, case.variant.tolerance)
            return _fastest(lambda: session.run(case.golden.inputs, [spec.name for spec in case.manifest.outputs]))
        finally:
            session.close()

    return _judge(body, path_of, ask)


def run_there(url: str, body: bytes, path_of: Callable[[str], Path], tier: str, ca: Path | None = None) -> Fact:
    """Send each model's golden inputs to the data plane at `url` and compare what it answers."""
    from models.client import Client

    with Client(url, timeout=5.0, ca=ca) as client:

        def ask(case: Case) -> float:
            answers = _Answers(client, case.model, tier)
            check_golden(answers, case.manifest, case.golden, case.variant.tolerance)
            return _fastest(lambda: answers.run(case.golden.inputs, ()))

        return _judge(body, path_of, ask)


class _Elsewhere(Exception):
    pass


class _Answers:
    """A data plane as a session, for `check_golden`."""

    serial = False
    inputs: Sequence[TensorSpec] = ()
    outputs: Sequence[TensorSpec] = ()

    def __init__(self, client: object, model: str, tier: str) -> None:
        self._client = client
        self._model = model
        self._tier = tier

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        answer = self._client.infer(self._model, inputs, min_confidence=0.0)  # type: ignore[attr-defined]
        if answer.tier not in (None, self._tier):
            raise _Elsewhere(f"answered by the {answer.tier}: {answer.reason}")
        return [answer.outputs[name] for name in outputs]

    def stop(self) -> bool:
        return False

    def close(self) -> None:
        """The client is its owner's."""


def _judge(body: bytes, path_of: Callable[[str], Path], ask: Callable[[Case], float]) -> Fact:
    good, elsewhere, bad = [], [], []
    try:
        for case in cases(body, path_of):
            package, variant = f"{case.manifest.package}/{case.manifest.version}", case.variant
            name = f"{case.model} ({package}, {variant.engine} {variant.precision})"
            try:
                good.append(f"{name} {ask(case) * 1e3:.2g} ms")
            except (Unauthenticated, Forbidden):
                return (
                    "skip",
                    "the data plane asks for a credential, and this has none: the golden inputs were not sent",
                    "",
                )
            except _Elsewhere as error:
                elsewhere.append(f"{name} {error}")
            except NotReady as error:
                bad.append(f"{name} is not loaded: {error}")
            except (TierlineError, OSError) as error:
                bad.append(f"{name}: {error}")
    except (TierlineError, ContractBreach, OSError) as error:
        bad.append(str(error))
    if bad:
        return "fail", "; ".join(bad), ""
    if elsewhere:
        return "warn", "; ".join(elsewhere + good), ""
    return ("ok", "; ".join(good), "") if good else ("skip", "the desired document names no model", "")


def _fastest(run: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _version(modules: Sequence[str]) -> str:
    for name in modules:
        try:
            return f"{name} {getattr(import_module(name), '__version__', 'of unknown version')}"
        except ImportError:
            continue
    return "?"
