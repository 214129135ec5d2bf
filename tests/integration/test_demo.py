"""The main job, exactly as a new user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(240)
def test_the_demo_keeps_every_promise(tmp_path: Path) -> None:
    figures = tmp_path / "demo.json"
    run = subprocess.run(
        [sys.executable, "-m", "tierline", "demo", "--json", str(figures), "--folder", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    logs = "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in (tmp_path / "demo").rglob("*.log"))
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}\n{logs}"
    found = json.loads(figures.read_text())
    assert all(found["tiers"][tier]["requests"] > 0 for tier in ("device", "edge", "cloud"))
    assert found["unanswered"] == 0
    assert found["tampered_refused"]
    assert found["edge_served_while_hub_down"]
    assert "every promise was kept" in run.stdout
