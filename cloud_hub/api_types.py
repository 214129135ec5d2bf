"""What the management API takes and answers, as pydantic models: they are the OpenAPI description too.

Times are Unix seconds. Input models refuse unknown fields.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_PAGE = 200
"""Most entries of one page."""
MAX_LABELS = 64

Name = Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?$")]
Label = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
Value = Annotated[str, Field(min_length=1, max_length=128)]
Reference = Annotated[str, Field(max_length=257, examples=["digits-cnn/1"])]
ModelName = Annotated[str, Field(min_length=1, max_length=128)]
Tier = Literal["device", "edge", "cloud"]


class Input(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorBody(BaseModel):
    error: str


class BlobStored(BaseModel):
    digest: str
    size: int


class PackageOut(BaseModel):
    """A published version; `manifest` is the digest of its exact bytes, which `/blobs/{digest}` answers."""

    package: str
    version: str
    manifest: str
    published: float
    description: str
    engines: list[str]
    accuracy: float | None


class PackageDetail(PackageOut):
    files: dict[str, int] = Field(description="digest -> size in bytes of every file the version names")
    contents: dict[str, object] = Field(description="the manifest as JSON")


class PackagePage(BaseModel):
    items: list[PackageOut]
    next: str | None = Field(description="pass as `after` for the next page; null = this was the last")


class ModelUse(BaseModel):
    deployment: str
    tenant: str
    selector: dict[str, str]
    package: str
    version: str


class ModelOut(BaseModel):
    model: str
    uses: list[ModelUse]


class ModelList(BaseModel):
    items: list[ModelOut]


class DeploymentIn(Input):
    """Nodes of `tenant` (`*` = all) that match every label of `selector` serve these packages under these names."""

    tenant: Annotated[str, Field(pattern=r"^(\*|[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?)$")] = "*"
    selector: Annotated[dict[Label, Value], Field(max_length=MAX_LABELS, examples=[{"tier": "edge"}])]
    models: Annotated[dict[ModelName, Reference], Field(min_length=1, max_length=128)]


class NodeProgressOut(BaseModel):
    node: str
    sync: str = Field(description="in_sync, pending, applying, refused or stale")
    reason: str | None


class ProgressOut(BaseModel):
    """How many of the nodes this deployment decides about stand where."""

    total: int
    in_sync: int = 0
    pending: int = 0
    applying: int = 0
    refused: int = 0
    stale: int = 0


class DeploymentOut(BaseModel):
    name: str
    tenant: str
    selector: dict[str, str]
    models: dict[str, str]
    progress: ProgressOut


class DeploymentDetail(DeploymentOut):
    nodes: list[NodeProgressOut]


class DeploymentList(BaseModel):
    items: list[DeploymentOut]


class PolicyStored(BaseModel):
    tenant: str
    revision: int


class PolicyOut(PolicyStored):
    issued: float
    policy: dict[str, object]


class SettingsStored(BaseModel):
    """`scope`: `tenant:<name>` or `node:<id>`."""

    scope: str
    revision: int


class SettingsOut(SettingsStored):
    settings: dict[str, object]


class SoftwareOut(BaseModel):
    version: str
    wheels: list[str]
    withdrawn: bool


class SoftwareList(BaseModel):
    items: list[SoftwareOut]


class SoftwareTargetIn(Input):
    """`tenant`: `*` = every tenant. `selector`: label -> value, `id`, `tier` and `group` included; empty = every node."""

    tenant: Annotated[str, Field(pattern=r"^(\*|[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?)$")] = "*"
    selector: Annotated[dict[Label, Value], Field(max_length=MAX_LABELS, examples=[{"tier": "edge"}])]
    version: Annotated[str, Field(max_length=64, examples=["0.2.0"])]


class SoftwareTargetOut(BaseModel):
    name: str
    tenant: str
    selector: dict[str, str]
    version: str


class SoftwareTargetList(BaseModel):
    items: list[SoftwareTargetOut]


class NodeIn(Input):
    """`id` is `tenant.node`; labels are what selectors match, `id`, `tier` and `group` are given already."""

    id: Annotated[str, Field(max_length=64, examples=["acme.edge-1"])]
    tier: Tier
    labels: Annotated[dict[Label, Value], Field(max_length=MAX_LABELS)] = {}
    groups: Annotated[list[Name], Field(max_length=8)] = []


class TokenOut(BaseModel):
    """`token` is shown this once; it is also the node's MQTT password."""

    id: str
    token: str


class DocumentOut(BaseModel):
    """`revision`: the newest issued; `reported` and `applied`: the newest the node has seen and has in force, 0 = none."""

    revision: int
    reported: int
    applied: int
    state: str | None
    sync: str
    error: str | None


class NodeOut(BaseModel):
    id: str
    tier: str
    labels: dict[str, str]
    groups: list[str]
    state: str = Field(description="what the node, or the broker for it, said last; empty = never seen")
    seen: float | None
    in_sync: bool
    running: dict[str, str] = Field(description="model name -> package/version, as the node reports it")


class NodeDetail(NodeOut):
    desired: dict[str, str] = Field(description="model name -> package/version it should serve")
    documents: dict[str, DocumentOut]
    reported: dict[str, object] | None
    capabilities: dict[str, object] | None


class NodePage(BaseModel):
    items: list[NodeOut]
    next: str | None = Field(description="pass as `after` for the next page; null = this was the last")


class BrokerUser(BaseModel):
    id: str
    password_hash: str | None = Field(description="as mosquitto's password file holds it")


class BrokerAccess(BaseModel):
    """What the broker must know: `acl`, `passwords`, `bundle` and `revocations` are the contents of mosquitto's acl_file,
    password_file, cafile and crlfile. `version` names all of it: send it back as `have` once the broker works by it."""

    version: str
    users: list[BrokerUser]
    acl: str
    passwords: str
    bundle: str
    revocations: str


class Health(BaseModel):
    status: str


class Readiness(BaseModel):
    """`broker`: whether the hub's connection to it is up; without it documents wait and files are still served."""

    ready: bool
    broker: bool
