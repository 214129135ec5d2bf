"""Fixtures that every test folder may use."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx_writer import OnnxWriter


@pytest.fixture
def onnx_model(tmp_path: Path) -> OnnxWriter:
    """Writes small ONNX files under the test's own folder: `onnx_model("identity", datatype="INT8")` -> path."""
    return OnnxWriter(tmp_path / "onnx")
