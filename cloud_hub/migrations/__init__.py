"""Brings a database to the schema of `cloud_hub.tables`. Run at every start; nothing to do is the usual case."""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from sync.errors import StoreFailed


def upgrade(engine: Engine) -> None:
    """`alembic upgrade head` on `engine`, in one transaction. Raises StoreFailed for the database of a later release."""
    # It tells at every start which dialect it found; a failing migration raises, and that is what matters.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with engine.begin() as connection:
        config = configuration()
        config.attributes["connection"] = connection
        _refuse_later(connection, ScriptDirectory.from_config(config))
        command.upgrade(config, "head")


def _refuse_later(connection: Connection, scripts: ScriptDirectory) -> None:
    known = {script.revision for script in scripts.walk_revisions()}
    for found in MigrationContext.configure(connection).get_current_heads():
        if found not in known:
            raise StoreFailed(
                f"the hub's database has schema {found}, written by a later release; this one reads up to "
                f"{scripts.get_current_head()}. Nothing was changed: run the later release again, or restore a copy"
            )


def configuration() -> Config:
    """Made here instead of read from an alembic.ini, which a wheel does not carry."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
