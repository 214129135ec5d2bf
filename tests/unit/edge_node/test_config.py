"""An edge node binds beyond its machine only where callers are known and nobody can listen."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_node.config import load_edge_config
from sync.errors import InvalidConfig

NODE = '[node]\nid = "a.b"\ntier = "edge"\nbroker = "mqtts://h"\nroot = "r"\nidentity = "identity"\ndata = "."\n'
TLS = '[listen.tls]\ncert = "identity/cert.pem"\nkey = "identity/key.pem"\n'
OPEN = '[listen]\nhost = "0.0.0.0"\n'


def load(tmp_path: Path, text: str) -> object:
    (tmp_path / "node.toml").write_text(NODE + text)
    return load_edge_config(tmp_path / "node.toml")


@pytest.mark.parametrize(
    "text", [OPEN, OPEN + TLS, OPEN + 'access = "access.toml"\n', '[listen]\nmetrics_host = "::"\n']
)
def test_in_the_open_or_for_everybody_it_does_not_listen(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidConfig, match="not loopback"):
        load(tmp_path, text)


@pytest.mark.parametrize("text", ["", OPEN + TLS + 'client_ca = "identity/ca.pem"\n', OPEN + 'access = "a"\n' + TLS])
def test_with_tls_and_callers_that_are_known_it_does(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text)
