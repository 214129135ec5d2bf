"""A served model's configuration in the JSON form of Triton's `ModelConfig`. Pure.

Source: Triton's model configuration documentation and its `model_config.proto`, whose field names these are. Where a batch
may be formed, Triton leaves the rows out of `dims` and states the most of them as `max_batch_size`; else `dims` is the
whole shape and `max_batch_size` 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from models.serving.model_settings import ModelSettings
from models.serving.registered import Registered
from models.serving.version_policy import triton_policy
from models.tensor import TensorSpec


def model_config(name: str, known: Registered, settings: ModelSettings) -> dict[str, object]:
    """Of the version `known` of model `name`."""
    rows = known.batching.rows if _has_rows(known) else 1
    batched = rows > 1
    platform = known.identity.platform
    config: dict[str, object] = {
        "name": name,
        "platform": platform,
        "backend": known.identity.engine,
        "version_policy": triton_policy(settings.version_policy),
        "max_batch_size": rows if batched else 0,
        "input": [_tensor(spec, batched) for spec in known.inputs],
        "output": [_tensor(spec, batched) for spec in known.outputs],
        "instance_group": [{"name": name, "kind": "KIND_CPU", "count": 1}],
        "response_cache": {"enable": settings.cache},
        "parameters": {key: {"string_value": value} for key, value in _parameters(known, settings).items()},
    }
    if batched:
        # Nothing is ever held back for a batch to fill.
        config["dynamic_batching"] = {"preferred_batch_size": [rows], "max_queue_delay_microseconds": 0}
    return config


def _has_rows(known: Registered) -> bool:
    return all(spec.shape[:1] == (-1,) for spec in (*known.inputs, *known.outputs))


def _tensor(spec: TensorSpec, batched: bool) -> Mapping[str, object]:
    return {"name": spec.name, "data_type": _type(spec), "dims": _dims(spec.shape, batched)}


def _type(spec: TensorSpec) -> str:
    return "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"


def _dims(shape: Sequence[int], batched: bool) -> list[int]:
    return list(shape[1:] if batched else shape)


def _parameters(known: Registered, settings: ModelSettings) -> Mapping[str, str]:
    """What Triton has no field for."""
    return {
        "package": known.identity.package,
        "digest": known.identity.digest or known.identity.variant,
        "batching": known.batching.reason,
        "isolation": settings.isolation,
        "resident": "true" if known.loaded is not None else "false",
        "memory_bytes": str(known.cost),
    }
