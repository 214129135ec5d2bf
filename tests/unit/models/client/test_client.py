"""The package's face, and what the two clients share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import models.client
import tierline
from models.client import Answer, AsyncClient, Client
from models.client.answer import Metadata
from models.client.asking import MAX_KNOWN_MODELS, Known
from models.errors import NotFound, NotReady

ROOT = Path(__file__).parents[4]


def test_the_front_door_leads_to_the_clients() -> None:
    assert tierline.Client is Client
    assert tierline.AsyncClient is AsyncClient
    with pytest.raises(AttributeError, match="Nothing"):
        _ = tierline.Nothing  # type: ignore[attr-defined]


def test_the_command_line_does_not_pay_for_the_client_nor_http_for_grpc() -> None:
    code = """
import sys, tierline
assert "models.client" not in sys.modules and "numpy" not in sys.modules
from tierline import Client, AsyncClient
Client("http://h"), AsyncClient("unix:///x")
assert not {"grpc", "google.protobuf", "onnxruntime", "orjson", "uvloop"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_public_is_what_is_listed() -> None:
    assert set(models.client.__all__) >= {"Answer", "AsyncClient", "Client", "Metadata", "Retries"}
    assert all(hasattr(models.client, name) for name in models.client.__all__)


def test_an_answer_without_the_output_says_which_there_are() -> None:
    answer = Answer(outputs={"y": np.zeros(1)}, model="m")
    with pytest.raises(KeyError, match="'y'"):
        answer["z"]


@pytest.mark.parametrize("options", [{"token": "a b"}, {"token": ""}, {"token": "x\r\ny: z"}])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_token_that_a_header_cannot_carry_is_refused_at_once(
    kind: type[Client] | type[AsyncClient], options: dict[str, str]
) -> None:
    for url in ("http://h", "grpc://h"):
        with pytest.raises(ValueError, match="token"):
            kind(url, token=options["token"])


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_without_connections_is_refused_at_once(kind: type[Client] | type[AsyncClient]) -> None:
    with pytest.raises(ValueError, match="max_connections"):
        kind("http://h", max_connections=0)


def test_what_is_known_of_models_is_bounded_and_forgotten_when_refused() -> None:
    known = Known()
    metadata = Metadata("m", (), "", (), ())
    for number in range(3 * MAX_KNOWN_MODELS):
        known.put(str(number), None, metadata)
    assert len(known._models) <= MAX_KNOWN_MODELS
    known.put("m", "1", metadata)
    known.forget("m", "1", NotReady("x"))
    assert known.get("m", "1") is metadata
    known.forget("m", "1", NotFound("x"))
    assert known.get("m", "1") is None
