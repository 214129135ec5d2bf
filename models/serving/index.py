"""What a frontend may ask about the models beside inferring: names, metadata, readiness, control, statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from models.tensor import TensorSpec


class ModelDescription(msgspec.Struct, frozen=True):
    """Metadata of one served model, as the Open Inference Protocol lists it.

    `platform`: `<engine>_<precision>` of the variant loaded here, for instance `onnx_fp32`. `package`: what answers to the
    name. `versions`: every version that can be asked for, newest last.
    """

    name: str
    package: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class ModelIndex(Protocol):
    def names(self) -> Sequence[str]:
        """Names served here, sorted."""
        ...

    def describe(self, model: str, version: str | None) -> ModelDescription:
        """Metadata. Raises NotFound for an unknown model or version."""
        ...

    def is_ready(self, model: str, version: str | None) -> bool:
        """Whether the model can answer now. Raises NotFound for an unknown one."""
        ...


class ModelState(msgspec.Struct, frozen=True):
    """One line of the repository index (Triton's model repository extension).

    `state`: READY, LOADING, UNLOADING or UNAVAILABLE; `reason` says why when it is not READY, else "".
    """

    name: str
    version: str
    state: str
    reason: str = ""


class ModelControl(Protocol):
    """Loading and unloading by a caller's word. A node whose models are decided by its hub has none."""

    def states(self) -> Sequence[ModelState]:
        """Every version of every model that is known here, by name and version."""
        ...

    async def load(self, model: str) -> None:
        """Make the model ready, or ready again from what the repository holds now; what served before serves until then.

        Raises NotFound, PackageError when it cannot be loaded (then nothing served has changed), or NotReady.
        """
        ...

    async def unload(self, model: str) -> None:
        """Take the model out of service; requests under way finish. Raises NotFound."""
        ...

    def config(self, model: str, version: str | None) -> Mapping[str, object]:
        """The model's configuration in the JSON form of Triton's model configuration extension. Raises NotFound."""
        ...

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """Call `changed(model)` in the loop whenever other versions answer to a model. Returns what ends that."""
        ...


class Duration(msgspec.Struct):
    """How often something happened and how long it took in all, in nanoseconds (Triton's StatisticDuration)."""

    count: int = 0
    ns: int = 0


class ModelStatistics(msgspec.Struct):
    """Counters of one version since the process began (Triton's statistics extension).

    `inference_count`: rows inferred; `execution_count`: runs of the engine; `last_inference`: milliseconds of the epoch.
    """

    name: str
    version: str
    last_inference: int = 0
    inference_count: int = 0
    execution_count: int = 0
    inference_stats: dict[str, Duration] = msgspec.field(
        default_factory=lambda: {
            phase: Duration()
            for phase in (
                "success",
                "fail",
                "queue",
                "compute_input",
                "compute_infer",
                "compute_output",
                "cache_hit",
                "cache_miss",
            )
        }
    )


class Statistics(Protocol):
    def statistics(self, model: str | None, version: str | None) -> Sequence[ModelStatistics]:
        """Of every version of every model served, of one model, or of one version. Raises NotFound."""
        ...
