from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from device_agent.shadow import refuse_shadowed_packages


def test_our_own_foundations_pass() -> None:
    refuse_shadowed_packages()


def test_a_foundation_from_elsewhere_is_refused_naming_both_paths(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"'json' \(.*\) is shadowed by .*json"):
        refuse_shadowed_packages(("json",), tmp_path)


@pytest.mark.parametrize("layout", ["models.py", "models/__init__.py", "sync.py"])
def test_an_applications_own_package_is_named_at_import(tmp_path: Path, layout: str) -> None:
    own = tmp_path / layout
    own.parent.mkdir(exist_ok=True)
    own.write_text("")
    run = subprocess.run(
        [sys.executable, "-c", "import device_agent"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert f"is shadowed by {own}" in run.stderr
