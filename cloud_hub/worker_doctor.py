"""The checks of a cloud worker: those of every node, and its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloud_hub.worker import TIER, WorkerConfig
from models import doctor as models_doctor
from sync.doctor.check import Check, Finding, Skipped
from sync.doctor.node import NODE
from sync.doctor.subject import NodeSubject, subject_of
from sync.errors import InvalidConfig
from sync.identity import load_config


def worker_doctor(path: Path) -> tuple[NodeSubject, Sequence[Check[NodeSubject]]]:
    """What is to be looked at for the worker of a configuration file, and the table."""
    return subject_of(path, _load, fields_of), CHECKS


def fields_of(config: WorkerConfig) -> Mapping[str, Any]:
    """What the checks of every tier need of this one's configuration, as fields of NodeSubject."""
    return {"membership": config.node, "plan": models_doctor.needs}


def check_engines(subject: NodeSubject) -> Finding:
    return Finding(*models_doctor.engines(load=subject.live is None))


def check_models(subject: NodeSubject) -> Finding:
    body = subject.active("desired")
    if body is None:
        raise Skipped("no desired document is in force")

    url = subject.announced().get("url")
    if isinstance(url, str) and url.startswith("http://"):
        return Finding(*models_doctor.run_there(url, body, subject.blob, TIER))
    return Finding(*models_doctor.run_here(body, subject.blob))


CHECKS: tuple[Check[NodeSubject], ...] = (
    *NODE,
    Check(
        "worker.engines",
        "whether each engine can be imported, and its version",
        "pip install 'tierline[device]' for ONNX, 'tierline[torch]' for PyTorch files",
        check_engines,
        30.0,
    ),
    Check(
        "worker.models",
        "each model's golden inputs: through the data plane if the worker runs, else loaded here",
        "restart the worker; if the answers stay wrong roll back at the hub (tierline deploy with the version before)",
        check_models,
        60.0,
    ),
)


def _load(path: Path) -> WorkerConfig:
    config = load_config(path, WorkerConfig)
    if config.node.tier != TIER:
        raise InvalidConfig(f"{path}: node.tier is {config.node.tier!r}, a worker's is 'cloud'")
    return config
