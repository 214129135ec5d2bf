"""Engines: what runs a variant. One file per framework, its only importer, imported when chosen.

`Engine.load` turns a file into a `Session`; everything above works with these two protocols alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import msgspec

from models.errors import NoUsableVariant
from models.tensor import Array, TensorSpec


class Framework(NamedTuple):
    """`target`: where the engine lives. `modules`: any one of them is enough. `suffixes`: of the files it loads, tried in
    this order. `extra`: of this distribution, what installs it."""

    target: str
    modules: tuple[str, ...]
    suffixes: tuple[str, ...]
    extra: str


ENGINES: dict[str, Framework] = {
    "onnx": Framework("models.engines.onnx:OnnxEngine", ("onnxruntime",), (".onnx",), "device"),
    "litert": Framework(
        "models.engines.litert:LitertEngine", ("ai_edge_litert", "tflite_runtime"), (".tflite",), "litert"
    ),
    "torch": Framework("models.engines.torch:TorchEngine", ("torch",), (".pt2", ".pt"), "torch"),
}


class EngineOptions(msgspec.Struct, frozen=True):
    """How a variant is loaded.

    `threads`: threads one inference may use inside the engine. Default 1: a gateway answers many small requests, and
    two intra-op threads on two busy cores only take turns.
    `inputs`, `outputs`: what the manifest promises, in its order, () = not known. Only TorchScript files need them: they
    state no names, datatypes or shapes of their own; every other engine reads its own file.
    """

    threads: int = 1
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()


class Session(Protocol):
    """A loaded variant. `run` may be called from several threads at once.

    `serial`: runs of this session wait for one another; such a wait must not hold an event loop.
    """

    @property
    def serial(self) -> bool: ...
    @property
    def inputs(self) -> Sequence[TensorSpec]: ...
    @property
    def outputs(self) -> Sequence[TensorSpec]: ...
    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Outputs in the order asked for; the arrays belong to the caller. Raises EngineFailure, InvalidRequest.

        An engine seldom tells a broken model from inputs it cannot take: both may be an EngineFailure, which
        `models.serving.loaded` tells apart.
        """
        ...

    def stop(self) -> bool:
        """End the runs under way as soon as the engine can: each raises EngineFailure ("... was stopped").

        Any thread may call, at any time; later runs are not concerned. False: nothing can be done, the runs go on.
        """
        ...

    def close(self) -> None:
        """Release what the engine holds. No run may follow; calling twice is harmless."""
        ...


class Engine(Protocol):
    def load(self, path: Path, options: EngineOptions) -> Session:
        """Load the file at `path`. Raises ContractBreach when the engine refuses it."""
        ...


def model_files() -> tuple[tuple[str, str], ...]:
    """(engine, name of the file it loads from a version's folder), in order of preference."""
    return tuple((name, f"model{suffix}") for name, framework in ENGINES.items() for suffix in framework.suffixes)


def available_engines() -> tuple[str, ...]:
    """Names of the engines whose framework is installed here, found without importing any."""
    return tuple(
        name
        for name, framework in ENGINES.items()
        if any(importlib.util.find_spec(module) for module in framework.modules)
    )


def get_engine(name: str) -> Engine:
    """The engine called `name`, its framework imported now. Raises NoUsableVariant, naming what to install."""
    if name not in ENGINES:
        raise NoUsableVariant(f"engine {name!r} is none of {', '.join(ENGINES)}")
    framework = ENGINES[name]
    module, _, attribute = framework.target.partition(":")
    try:
        return cast(Engine, getattr(import_module(module), attribute)())
    except ImportError as error:
        needed = " or ".join(framework.modules)
        raise NoUsableVariant(
            f"engine {name!r} needs {needed}, which is not installed: pip install 'tierline[{framework.extra}]'"
        ) from error
