"""The tables of the nodes' own software: published versions, and which nodes run which."""

from __future__ import annotations

from sqlalchemy import JSON, ForeignKey, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from cloud_hub.tables import Table


class SoftwareRow(Table):
    """A published version. `body`: as `sync.software` encodes it. `withdrawn`: when, 0 = its files are approved."""

    __tablename__ = "software"
    version: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    published: Mapped[float]
    withdrawn: Mapped[float] = mapped_column(default=0.0)


class SoftwareTargetRow(Table):
    """Nodes of `tenant` (`*` = every tenant) that match `selector` run `version`."""

    __tablename__ = "software_targets"
    name: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    selector: Mapped[dict[str, str]] = mapped_column(JSON)
    version: Mapped[str] = mapped_column(ForeignKey("software.version"))
    updated: Mapped[float]
