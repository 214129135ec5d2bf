"""The nodes' own software: published versions and their targets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "software",
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("published", sa.Double(), nullable=False),
        sa.Column("withdrawn", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_software"),
    )
    op.create_table(
        "software_targets",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("selector", sa.JSON(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("updated", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["version"], ["software.version"], name="fk_software_targets_version_software"),
        sa.PrimaryKeyConstraint("name", name="pk_software_targets"),
    )


def downgrade() -> None:
    op.drop_table("software_targets")
    op.drop_table("software")
