"""What the client gives back."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from models.serving.index import Duration, ModelState, ModelStatistics
from models.tensor import Array, TensorSpec

__all__ = ["Answer", "Duration", "Metadata", "ModelState", "ModelStatistics"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer: `answer["name"]` is an output, read-only where it was sent as binary data.

    `version`, `package`: what computed it. `tier`: device, edge or cloud. `confidence`: 0..1. `reason`: a code that says why
    it came from there (`models.policy.Reason`). `degraded`: a better tier was wanted and could not be used in time.
    None = the server does not say; a server other than ours says nothing of tiers.
    """

    outputs: Mapping[str, Array]
    model: str
    version: str | None = None
    package: str | None = None
    tier: str | None = None
    confidence: float | None = None
    reason: str | None = None
    degraded: bool = False
    id: str | None = None

    def __getitem__(self, name: str) -> Array:
        try:
            return self.outputs[name]
        except KeyError:
            raise KeyError(
                f"no output {name!r} in this answer, there is {', '.join(map(repr, self.outputs))}"
            ) from None


class Metadata(msgspec.Struct, frozen=True):
    """What a server says of a model. `versions`: those that can be asked for. `package`: what answers to the name."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    package: str | None = None
