"""Where a model's session lives: in this process, or in one of its own when the model's settings ask for that."""

from __future__ import annotations

from pathlib import Path

from models.engines import EngineOptions, Session
from models.serving.folder import open_here
from models.serving.model_settings import ModelSettings


def open_session(engine: str, file: Path, options: EngineOptions, settings: ModelSettings) -> Session:
    """Load `file`: blocks. Raises PackageError, or NotReady when it may work later."""
    if settings.isolation == "process":
        from models.serving.isolated import IsolatedSession

        return IsolatedSession(file, engine, options)
    return open_here(engine, file, options, settings)
