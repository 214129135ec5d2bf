"""The shell's words to the node of this machine reach it, whatever the environment says of the world outside."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from edge_node.hold_cli import hold, updates

ANSWERS: dict[str, object] = {
    "/control/updates": {"documents": {}, "holds": [{"id": "h1", "seconds": 7.0, "reason": "robot in motion"}]},
    "/control/hold": ["not what is expected"],
}


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(ANSWERS[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def edge() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Answering)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    serving.join()
    server.server_close()


def test_a_proxy_for_the_world_outside_is_not_asked(
    edge: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert updates(["--edge", edge]) == 0
    assert capsys.readouterr().out == "hold h1  7 s left  robot in motion\n"


def test_an_answer_that_is_none_is_said_in_one_line(edge: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hold(["robot in motion", "--edge", edge]) == 1
    assert capsys.readouterr().err.count("\n") == 1
