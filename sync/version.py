"""Which version of this project's code runs here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "tierline"


def running_version() -> str:
    """As its installed metadata has it; empty when it is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return ""
