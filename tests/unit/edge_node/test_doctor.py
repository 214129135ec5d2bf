"""The edge's own checks: ports, the tier above, its mirror, its models."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from doctor_nodes import make_node

from edge_node.config import EdgeConfig, Up
from edge_node.doctor import CHECKS, edge_doctor, fields_of
from models.serving.assembly import Listening
from sync.doctor.check import Finding
from sync.doctor.runner import run_checks
from sync.doctor.subject import Live, NodeSubject
from sync.quota import Quota


def ask(subject: NodeSubject, name: str) -> Finding:
    return run_checks([check for check in CHECKS if check.name == name], subject)[0].finding


def edge(folder: Path, **tables: object) -> NodeSubject:
    node = make_node(folder)
    config = EdgeConfig(node=node.node, **tables)  # type: ignore[arg-type]
    fields = dict(fields_of(config)) | {"plan": node.plan, "clock": node.clock}
    return NodeSubject(node.path, config=config, environ={}, **fields)


def test_a_configuration_file_becomes_a_subject_and_a_table(tmp_path: Path) -> None:
    subject, checks = edge_doctor(make_node(tmp_path).path or tmp_path)
    assert subject.node.id == "acme.edge-1"
    assert subject.quota.cache_bytes > 0
    assert len({check.name for check in checks}) == len(checks) >= 40


def test_a_port_that_another_process_has_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        subject = edge(tmp_path, listen=Listening(port=taken.getsockname()[1]))
        finding = ask(subject, "edge.ports")
    assert finding.status == "fail"
    assert "taken by another process" in finding.found
    assert "ss -ltnp" in finding.fix
    assert ask(subject, "edge.ports").status == "ok"


@pytest.mark.parametrize(("status", "wanted"), [(200, "ok"), (503, "warn")])
def test_the_tier_above_must_be_ready(tmp_path: Path, status: int, wanted: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v2/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    finding = ask(edge(tmp_path, up=Up(f"http://127.0.0.1:{server.server_port}")), "edge.up")
    thread.join()
    server.server_close()
    assert finding.status == wanted


def test_a_tier_above_that_is_away_is_a_warning_because_the_edge_answers_by_itself(tmp_path: Path) -> None:
    finding = ask(edge(tmp_path, up=Up("http://127.0.0.1:1")), "edge.up")
    assert finding.status == "warn"
    assert "everything is answered here" in finding.found
    assert "[up]" in finding.fix
    assert ask(edge(tmp_path / "alone"), "edge.up").status == "skip"


def test_a_mirror_that_keeps_more_than_it_may_is_told(tmp_path: Path) -> None:
    subject = edge(tmp_path, store=Quota(cache_bytes=10))
    (subject.data / "blobs" / ("a" * 64)).write_bytes(b"x" * 100)
    finding = ask(subject, "edge.mirror")
    assert finding.status == "warn", finding
    assert "121 B of 10 B" in finding.found
    assert "cache_bytes" in finding.fix


def test_engines_are_not_imported_into_a_process_that_serves(tmp_path: Path) -> None:
    import sys

    subject = edge(tmp_path)
    subject.live = Live(True, "MQTT 5", {})
    before = set(sys.modules)
    assert ask(subject, "edge.engines").status == "ok"
    assert not {"torch", "onnxruntime", "ai_edge_litert"} & (set(sys.modules) - before)


def test_inside_a_running_node_the_broker_is_not_asked_a_second_time(tmp_path: Path) -> None:
    subject = edge(tmp_path)
    subject.live = Live(False, "", {})
    assert ask(subject, "broker.login").status == "fail"
    assert ask(subject, "broker.access").status == "skip"
