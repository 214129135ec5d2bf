"""Fixtures that every test folder may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from onnx_writer import OnnxWriter


@pytest.fixture
def onnx_model(tmp_path: Path) -> OnnxWriter:
    """Writes small ONNX files under the test's own folder: `onnx_model("identity", datatype="INT8")` -> path."""
    return OnnxWriter(tmp_path / "onnx")


MAY_BE_MISSING = ("no IPv6 here",)
"""What a test machine may lack without being half blind."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skip hides a promise: on a developer's machine it is listed, where CI=true it fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return
    for report in reporter.stats.get("skipped", []):
        if not any(reason in str(report.longrepr) for reason in MAY_BE_MISSING):
            reporter.write_line(f"skipped in CI: {report.nodeid}: {report.longrepr}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
