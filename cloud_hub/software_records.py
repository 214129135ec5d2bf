"""Queries about the nodes' own software. Inside a transaction of `cloud_hub.storage`."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud_hub.rollout import Deployment, PackageRef
from cloud_hub.software_tables import SoftwareRow, SoftwareTargetRow
from sync.software import Software, decode_software
from sync.version import DISTRIBUTION

SLOT = "software"
"""The one name that a target decides: what a deployment's model names are to it."""


class SoftwareRecords:
    def __init__(self, session: Session) -> None:
        self._session = session

    def body(self, version: str) -> bytes | None:
        """None when it was never published."""
        row = self._session.get(SoftwareRow, version)
        return row.body if row else None

    def is_withdrawn(self, version: str) -> bool:
        row = self._session.get(SoftwareRow, version)
        return row is not None and row.withdrawn > 0

    def versions(self) -> list[tuple[Software, float, bool]]:
        """(what it is, when it was published, whether it was withdrawn), oldest first."""
        rows = self._session.scalars(select(SoftwareRow).order_by(SoftwareRow.published, SoftwareRow.version))
        return [(decode_software(row.body), row.published, row.withdrawn > 0) for row in rows]

    def add(self, version: str, body: bytes, at: float) -> None:
        self._session.add(SoftwareRow(version=version, body=body, published=at, withdrawn=0.0))
        self._session.flush()

    def withdraw(self, version: str, at: float) -> None:
        row = self._session.get(SoftwareRow, version)
        if row is not None:
            row.withdrawn = at
            self._session.flush()

    def approved_files(self) -> dict[str, int]:
        """Digest -> size of every wheel of every version that was not withdrawn."""
        rows = self._session.scalars(select(SoftwareRow).where(SoftwareRow.withdrawn == 0))
        return {wheel.digest: wheel.size for row in rows for wheel in decode_software(row.body).wheels}

    def targets(self) -> list[Deployment]:
        rows = self._session.scalars(select(SoftwareTargetRow).order_by(SoftwareTargetRow.name))
        return [Deployment(r.name, r.tenant, r.selector, {SLOT: PackageRef(DISTRIBUTION, r.version)}) for r in rows]

    def put_target(self, target: Deployment, at: float) -> bool:
        """Create or replace; True when it is new. Its version must have been published."""
        created = self._session.get(SoftwareTargetRow, target.name) is None
        version = target.models[SLOT].version
        row = SoftwareTargetRow(
            name=target.name, tenant=target.tenant, selector=dict(target.selector), version=version, updated=at
        )
        self._session.merge(row)
        self._session.flush()
        return created

    def delete_target(self, name: str) -> bool:
        row = self._session.get(SoftwareTargetRow, name)
        if row is None:
            return False
        self._session.delete(row)
        self._session.flush()
        return True
