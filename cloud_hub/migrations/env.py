"""Alembic's entry: runs the migrations on the connection that `cloud_hub.migrations.upgrade` hands over."""

from __future__ import annotations

from alembic import context

from cloud_hub.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
