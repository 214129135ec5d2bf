"""Fixtures that every test folder may use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Test packages have no __init__.py and are not on the path under --import-mode=importlib; the model writer is shared.
sys.path.insert(0, str(Path(__file__).parent))

from onnx_writer import OnnxWriter


@pytest.fixture
def onnx_model(tmp_path: Path) -> OnnxWriter:
    """Writes small ONNX files under the test's own folder: `onnx_model("identity", datatype="INT8")` -> path."""
    return OnnxWriter(tmp_path / "onnx")
