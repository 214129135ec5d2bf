"""Engines: what runs a variant. One file per framework, its only importer, imported when chosen.

`Engine.load` turns a file into a `Session`; everything above works with these two protocols alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import msgspec

from models.errors import NoUsableVariant
from models.tensor import Array, TensorSpec

# engine name -> (where it lives, the distributions any one of which it needs, the file suffix it loads)
ENGINES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "onnx": ("models.engines.onnx:OnnxEngine", ("onnxruntime",), ".onnx"),
    "litert": ("models.engines.litert:LitertEngine", ("ai_edge_litert", "tflite_runtime"), ".tflite"),
}


class EngineOptions(msgspec.Struct, frozen=True):
    """How a variant is loaded.

    `threads`: threads one inference may use inside the engine. Default 1: a gateway answers many small requests, and
    two intra-op threads on two busy cores only take turns.
    """

    threads: int = 1


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

    def close(self) -> None:
        """Release what the engine holds. No run may follow; calling twice is harmless."""
        ...


class Engine(Protocol):
    def load(self, path: Path, options: EngineOptions) -> Session:
        """Load the file at `path`. Raises ContractBreach when the engine refuses it."""
        ...


def available_engines() -> tuple[str, ...]:
    """Names of the engines whose framework is installed here, found without importing any."""
    return tuple(
        name for name, (_, modules, _) in ENGINES.items() if any(importlib.util.find_spec(module) for module in modules)
    )


def get_engine(name: str) -> Engine:
    """The engine called `name`, its framework imported now. Raises NoUsableVariant, naming what to install."""
    if name not in ENGINES:
        raise NoUsableVariant(f"engine {name!r} is none of {', '.join(ENGINES)}")
    target, modules, _ = ENGINES[name]
    module, _, attribute = target.partition(":")
    try:
        return cast(Engine, getattr(import_module(module), attribute)())
    except ImportError as error:
        raise NoUsableVariant(f"engine {name!r} needs {' or '.join(modules)}, which is not installed") from error
