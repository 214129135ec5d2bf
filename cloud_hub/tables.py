"""The hub's tables. `migrations/` builds them; a test compares the two.

Times are Unix seconds. JSON that came from elsewhere and is only passed on is kept as the bytes received.
"""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, ForeignKeyConstraint, Index, LargeBinary, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Table(DeclarativeBase):
    # Sizes and revisions outgrow 32 bits, Unix seconds outgrow a single-precision float, on databases that tell them apart.
    type_annotation_map = {int: BigInteger, float: Double}
    # Named constraints: SQLite cannot alter an unnamed one in a later migration.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class CredentialRow(Table):
    """A credential of the hub itself. `hash`: sha256 in hexadecimal."""

    __tablename__ = "credentials"
    role: Mapped[str] = mapped_column(primary_key=True)
    hash: Mapped[str]


class PackageRow(Table):
    """A published version. `manifest`: the exact bytes, which `digest` names."""

    __tablename__ = "packages"
    package: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    manifest: Mapped[bytes] = mapped_column(LargeBinary)
    published: Mapped[float]
    files: Mapped[list[PackageFileRow]] = relationship(cascade="all, delete-orphan")


class PackageFileRow(Table):
    """A file that a published version names, its manifest included: what is approved. A version withdrawn has none."""

    __tablename__ = "package_files"
    package: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    __table_args__ = (
        ForeignKeyConstraint(["package", "version"], ["packages.package", "packages.version"], ondelete="CASCADE"),
    )


class DeploymentRow(Table):
    __tablename__ = "deployments"
    name: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    selector: Mapped[dict[str, str]] = mapped_column(JSON)
    updated: Mapped[float]
    models: Mapped[list[DeploymentModelRow]] = relationship(cascade="all, delete-orphan", lazy="selectin")


class DeploymentModelRow(Table):
    """One model name of a deployment; the foreign key keeps it from naming a version that was never published."""

    __tablename__ = "deployment_models"
    deployment: Mapped[str] = mapped_column(ForeignKey("deployments.name", ondelete="CASCADE"), primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    package: Mapped[str]
    version: Mapped[str]
    __table_args__ = (
        ForeignKeyConstraint(["package", "version"], ["packages.package", "packages.version"]),
        Index("ix_deployment_models_reference", "package", "version"),
    )


class NodeRow(Table):
    """A registered node and the last it said. `left`: when it went away, 0 = it is here or was never seen."""

    __tablename__ = "nodes"
    id: Mapped[str] = mapped_column(primary_key=True)
    tier: Mapped[str]
    labels: Mapped[dict[str, str]] = mapped_column(JSON)
    groups: Mapped[list[str]] = mapped_column(JSON)
    token_hash: Mapped[str] = mapped_column(unique=True)
    broker_hash: Mapped[str]
    created: Mapped[float]
    state: Mapped[str] = mapped_column(default="")
    boot: Mapped[str] = mapped_column(default="")
    seen: Mapped[float] = mapped_column(default=0.0)
    left: Mapped[float] = mapped_column(default=0.0)
    reported: Mapped[bytes | None] = mapped_column(LargeBinary)
    capabilities: Mapped[bytes | None] = mapped_column(LargeBinary)


class DocumentRow(Table):
    """The newest revision of one document. `floor`: the highest revision burnt by a report, never to be issued again."""

    __tablename__ = "documents"
    kind: Mapped[str] = mapped_column(primary_key=True)
    scope: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int]
    floor: Mapped[int] = mapped_column(default=0)
    kid: Mapped[str]
    digest: Mapped[str]
    body: Mapped[bytes] = mapped_column(LargeBinary)
    envelope: Mapped[bytes] = mapped_column(LargeBinary)
    issued: Mapped[float]


class InvitationRow(Table):
    """A token that lets one node in once. `token_hash`: sha256 in hexadecimal. `hardware`: the serial number it is bound to.
    `used`: when, 0 = not yet."""

    __tablename__ = "invitations"
    token_hash: Mapped[str] = mapped_column(primary_key=True)
    node: Mapped[str] = mapped_column(index=True)
    tier: Mapped[str]
    labels: Mapped[dict[str, str]] = mapped_column(JSON)
    groups: Mapped[list[str]] = mapped_column(JSON)
    names: Mapped[list[str]] = mapped_column(JSON)
    hardware: Mapped[str | None]
    created: Mapped[float]
    expires: Mapped[float]
    used: Mapped[float] = mapped_column(default=0.0)


class CertificateRow(Table):
    """A certificate that was issued to a node. `fingerprint`: of its key. `public_key`: SubjectPublicKeyInfo, DER. `ended`:
    when its key stopped being the node's, 0 = it is. Kept after its end: a key is never anybody's a second time."""

    __tablename__ = "certificates"
    serial: Mapped[str] = mapped_column(primary_key=True)
    node: Mapped[str] = mapped_column(index=True)
    fingerprint: Mapped[str] = mapped_column(index=True)
    public_key: Mapped[bytes] = mapped_column(LargeBinary)
    issuer: Mapped[int]
    names: Mapped[list[str]] = mapped_column(JSON)
    issued: Mapped[float]
    not_after: Mapped[float]
    ended: Mapped[float] = mapped_column(default=0.0)


class DenialRow(Table):
    """A node id that is refused everywhere until it is invited again."""

    __tablename__ = "denials"
    node: Mapped[str] = mapped_column(primary_key=True)
    at: Mapped[float]
    reason: Mapped[str]
