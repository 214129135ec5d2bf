"""Asking the tiers: the edge and the cloud over the Open Inference Protocol, the device through its SDK process."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import urllib3
from numpy.typing import NDArray

from deploy.demo_report import Served
from deploy.processes import DeployError, Process

Floats = NDArray[np.float32]
TIMEOUT_SECONDS = 10.0


def predict(url: str, model: str, images: Floats, min_confidence: float | None = None) -> tuple[Floats, dict[str, Any]]:
    """One request in plain JSON. Returns probabilities float32 [n, 10] and what the server says of its answer."""
    body = {
        "inputs": [{"name": "image", "datatype": "FP32", "shape": list(images.shape), "data": images.ravel().tolist()}],
        "parameters": {} if min_confidence is None else {"min_confidence": min_confidence},
    }
    http = urllib3.PoolManager(retries=False, timeout=TIMEOUT_SECONDS)
    answer = http.request("POST", f"{url}/v2/models/{model}/infer", body=json.dumps(body).encode())
    found = json.loads(answer.data)
    if answer.status != 200:
        raise DeployError(f"{url}: {found.get('error', answer.status)}")
    (output,) = found["outputs"]
    probabilities = np.asarray(output["data"], np.float32).reshape(output["shape"])
    return probabilities, {**found["parameters"], "version": found["model_version"]}


def batch_accuracy(url: str, model: str, images: Floats, labels: NDArray[np.int64]) -> float:
    """Accuracy 0..1 of one tier's model alone: nothing is escalated."""
    probabilities, _ = predict(url, model, images, min_confidence=0.0)
    return round(float((probabilities.argmax(axis=1) == labels).mean()), 4)


class Sdk:
    """The device agent's process, one JSON line at a time."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def ask(self, index: int, image: Floats, label: int, deadline_ms: float, min_confidence: float | None) -> Served:
        request = {
            "model": "digits",
            "inputs": {"image": [image.tolist()]},
            "deadline_ms": deadline_ms,
            "min_confidence": min_confidence,
            "id": index,
        }
        answer = json.loads(self._process.ask(json.dumps(request).encode()))
        if "error" in answer:
            return Served(index, label, None, error=answer["error"], lag_ms=answer["lag_ms"])
        return Served(
            index,
            label,
            int(np.argmax(answer["outputs"]["probabilities"][0])),
            tier=answer["tier"],
            reason=answer["reason"],
            degraded=answer["degraded"],
            latency_ms=answer["latency_ms"],
            lag_ms=answer["lag_ms"],
        )
