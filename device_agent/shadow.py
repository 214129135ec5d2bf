"""Tierline's foundations are packages called `models` and `sync`. So are many applications' own: say so by path, at import."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

FOUNDATIONS = ("models", "sync")
HOME = Path(__file__).resolve().parent.parent


def refuse_shadowed_packages(names: Sequence[str] = FOUNDATIONS, home: Path = HOME) -> None:
    """Raise ImportError, naming both paths, when `import models` or `import sync` would find somebody else's."""
    for name in names:
        found = _origin(name)
        if found is None or home / name not in (found, *found.parents):
            raise ImportError(
                f"Tierline's package '{name}' ({home / name}) is shadowed by {found or 'nothing importable'}: rename yours, "
                "or keep its folder out of sys.path in front of Tierline's"
            )


def _origin(name: str) -> Path | None:
    loaded = sys.modules.get(name)
    origin = getattr(loaded, "__file__", None)
    if loaded is None:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec else None
        if spec and origin is None and spec.submodule_search_locations:
            origin = next(iter(spec.submodule_search_locations), None)
    return Path(origin).resolve() if origin else None
