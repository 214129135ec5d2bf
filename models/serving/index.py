"""What a frontend may ask about the models beside inferring: names, metadata, readiness."""

from __future__ import annotations

from collections.abc import Sequence
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
