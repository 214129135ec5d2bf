"""The checks of a device agent: engines, models, the edge behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from device_agent.config import AgentConfig, load_agent_config
from models import doctor as models_doctor
from models.desired import decode_desired
from sync.doctor.check import Check, Finding, Skipped, fail, ok, warn
from sync.doctor.node import NODE
from sync.doctor.reach import explain_socket, get, place_of
from sync.doctor.subject import NodeSubject, subject_of


def device_doctor(path: Path) -> tuple[NodeSubject, Sequence[Check[NodeSubject]]]:
    """What is to be looked at for the agent of a configuration file, and the table."""
    return subject_of(path, load_agent_config, fields_of), CHECKS


def fields_of(config: AgentConfig) -> Mapping[str, Any]:
    """What the checks of every tier need of this one's configuration, as fields of NodeSubject."""
    up = {"edge": config.edge} if config.edge is not None else {}
    return {"membership": config.node, "plan": models_doctor.needs, "up": up}


def check_engines(subject: NodeSubject) -> Finding:
    return Finding(*models_doctor.engines(load=subject.live is None))


def check_models(subject: NodeSubject) -> Finding:
    body = subject.active("desired")
    if body is None:
        raise Skipped("no desired document is in force")
    if subject.live is not None:
        return _loaded(body, subject.live.running)
    return Finding(*models_doctor.run_here(body, subject.blob))


def check_edge(subject: NodeSubject) -> Finding:
    url = subject.up.get("edge")
    if url is None:
        raise Skipped("no edge is configured: this device answers alone")
    try:
        reply = get(place_of("edge", url, subject.trust), "/v2/health/ready", timeout=3.0)
    except OSError as error:
        return warn(f"{url}: {explain_socket(error)}; everything is answered here")
    if reply.status != 200:
        return warn(f"{url} is not ready (status {reply.status}); everything is answered here")
    return ok(f"{url} is ready, answered in {reply.took * 1e3:.0f} ms")


CHECKS: tuple[Check[NodeSubject], ...] = (
    *NODE,
    Check(
        "device.engines",
        "whether each engine can be imported, and its version",
        "pip install 'tierline[device]' for ONNX, 'tierline[litert]' for TFLite files",
        check_engines,
        30.0,
    ),
    Check(
        "device.models",
        "whether each model loads and answers its golden inputs; inside the running agent: whether it is loaded",
        "restart the application; if the answers stay wrong roll back at the hub (tierline deploy with the version before)",
        check_models,
        30.0,
    ),
    Check(
        "device.edge",
        "whether the edge behind this device is ready",
        "correct edge in the configuration, or see that the edge node runs and this device is in its network",
        check_edge,
        8.0,
    ),
)


def _loaded(body: bytes, running: Mapping[str, str]) -> Finding:
    """A second copy of a model would cost the application memory: what is loaded has passed its golden inputs."""
    wanted = {name: f"{item.package}/{item.version}" for name, item in decode_desired(body).models.items()}
    missing = [f"{name} ({package})" for name, package in wanted.items() if running.get(name) != package]
    if missing:
        return fail(f"not loaded: {', '.join(missing)}")
    return ok(", ".join(f"{name} ({package})" for name, package in wanted.items()) or "no model is wanted here")
