"""The agent's own checks: the edge behind it, its models."""

from __future__ import annotations

from pathlib import Path

from doctor_nodes import make_node
from msgspec.structs import replace

from device_agent.config import AgentConfig
from device_agent.doctor import CHECKS, fields_of
from models.desired import Assignment, Desired, encode_desired
from models.manifest import Blob
from sync.doctor.check import Finding
from sync.doctor.runner import run_checks
from sync.doctor.subject import Live, NodeSubject


def ask(subject: NodeSubject, name: str) -> Finding:
    return run_checks([check for check in CHECKS if check.name == name], subject)[0].finding


def device(folder: Path, edge: str | None = None) -> NodeSubject:
    node = make_node(folder)
    config = AgentConfig(node=replace(node.node, tier="device"), edge=edge)
    return NodeSubject(node.path, config=config, environ={}, clock=node.clock, **fields_of(config))


def test_an_edge_that_is_away_is_a_warning_because_the_device_answers_by_itself(tmp_path: Path) -> None:
    finding = ask(device(tmp_path, "http://127.0.0.1:1"), "device.edge")
    assert finding.status == "warn"
    assert "everything is answered here" in finding.found
    assert ask(device(tmp_path / "alone"), "device.edge").status == "skip"


def test_inside_the_agent_a_model_that_is_not_loaded_is_named_and_none_is_loaded_twice(tmp_path: Path) -> None:
    subject = device(tmp_path)
    blob = Blob(f"sha256:{'0' * 64}", 1)
    body = encode_desired(Desired({"digits": Assignment("digits-mlp", "2", blob, blob, ())}))
    subject.active = lambda kind: body  # type: ignore[method-assign]
    subject.live = Live(True, "MQTT 5", {"digits": "digits-mlp/1"})
    finding = ask(subject, "device.models")
    assert finding.status == "fail"
    assert "not loaded: digits (digits-mlp/2)" in finding.found
    assert "restart the application" in finding.fix
    subject.live = Live(True, "MQTT 5", {"digits": "digits-mlp/2"})
    assert ask(subject, "device.models").status == "ok"
