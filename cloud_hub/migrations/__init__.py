"""Brings a database to the schema of `cloud_hub.tables`. Run at every start; nothing to do is the usual case."""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine


def upgrade(engine: Engine) -> None:
    """`alembic upgrade head` on `engine`, in one transaction."""
    # It tells at every start which dialect it found; a failing migration raises, and that is what matters.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with engine.begin() as connection:
        config = configuration()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def configuration() -> Config:
    """Made here instead of read from an alembic.ini, which a wheel does not carry."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
