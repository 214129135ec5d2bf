"""Which node should run what, and how far it has got. Pure: rows and reports come in as values, decisions go out.

    deployments --matches--> the node's models --sign, publish--> node --reported--> progress

A deployment says "nodes like this run these packages under these model names". The deployment with the more specific
selector wins a name, so one edge node can be given another version than its peers. Moving a deployment from one version
to the next in waves is a decision of the same kind - which of the matching nodes get the new reference now - and belongs
between `matches` and `desired_models`; its gates read `progress`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

import msgspec

from cloud_hub.errors import Conflict
from models.errors import InvalidRequest
from sync.messages import DocumentReport
from sync.topics import tenant_of

ANY_TENANT = "*"
STALE_AFTER = 60.0
"""Seconds after which the report of a node that has left says nothing about what it runs. Longer than a restart."""

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class PackageRef(msgspec.Struct, frozen=True):
    """One immutable package version, written `package/version`."""

    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package}/{self.version}"


class Node(msgspec.Struct, frozen=True):
    """What selectors see of a node."""

    id: str
    tier: str
    labels: Mapping[str, str] = {}
    groups: tuple[str, ...] = ()


class Deployment(msgspec.Struct, frozen=True):
    """Nodes of `tenant` (`*` = every tenant) that match `selector` serve each model name with its package version.

    `selector`: label -> value; `id`, `tier` and `group` are labels that every node has.
    """

    name: str
    tenant: str
    selector: Mapping[str, str]
    models: Mapping[str, PackageRef]


class Sync(StrEnum):
    """How a node stands towards the newest revision of one document."""

    IN_SYNC = "in_sync"  # in force
    PENDING = "pending"  # not seen by the node yet
    APPLYING = "applying"  # seen, on its way
    REFUSED = "refused"  # seen and not taken; the old one serves
    STALE = "stale"  # the node has left; its last report is old


class Standing(msgspec.Struct, frozen=True):
    """What is known of one node and one document.

    `wanted`: newest revision, 0 = there is none; `digest`: of its payload. `silent`: seconds since the node left, 0 = it is
    here.
    """

    wanted: int = 0
    digest: str = ""
    report: DocumentReport | None = None
    silent: float = 0.0


class NodeProgress(msgspec.Struct, frozen=True):
    """One node's part in a deployment; `reason` says why when `sync` is refused."""

    node: str
    sync: Sync
    reason: str | None = None


def parse_reference(text: str) -> PackageRef:
    """`package/version` as a reference. Raises InvalidRequest."""
    package, slash, version = text.partition("/")
    if not slash or not _MODEL.fullmatch(package) or not _MODEL.fullmatch(version):
        raise InvalidRequest(f"{text!r} is not package/version")
    return PackageRef(package, version)


def check_deployment(deployment: Deployment) -> None:
    """Raise InvalidRequest, naming the field, when a name or a selector cannot be used."""
    for model in deployment.models:
        if not _MODEL.fullmatch(model):
            raise InvalidRequest(f"models: {model!r} is not 1-128 letters, digits, '.', '_' or '-'")
    for label, value in deployment.selector.items():
        if not label or not value:
            raise InvalidRequest(f"selector: label {label!r} with value {value!r}; neither may be empty")


def matches(selector: Mapping[str, str], node: Node) -> bool:
    """Whether every key of `selector` holds for `node`. An empty selector matches every node."""
    return all(_holds(label, value, node) for label, value in selector.items())


def _holds(label: str, value: str, node: Node) -> bool:
    if label == "group":
        return value in node.groups
    own = {"id": node.id, "tier": node.tier}.get(label)
    return value == (own if own is not None else node.labels.get(label))


def applies(deployment: Deployment, node: Node) -> bool:
    """Whether `deployment` speaks about `node` at all."""
    return deployment.tenant in (ANY_TENANT, tenant_of(node.id)) and matches(deployment.selector, node)


def winners(node: Node, deployments: Iterable[Deployment]) -> dict[str, Deployment]:
    """Model name -> the deployment that decides it on `node`.

    More selector keys win, a named tenant counting as one. Raises Conflict naming both deployments when two are equally
    specific: an order between them would be a guess.
    """
    best: dict[str, Deployment] = {}
    for deployment in deployments:
        if not applies(deployment, node):
            continue
        for model in deployment.models:
            rival = best.get(model)
            if rival is None or _specificity(deployment) > _specificity(rival):
                best[model] = deployment
    _refuse_ties(node, deployments, best)
    return best


def _specificity(deployment: Deployment) -> int:
    return len(deployment.selector) + (deployment.tenant != ANY_TENANT)


def _refuse_ties(node: Node, deployments: Iterable[Deployment], best: Mapping[str, Deployment]) -> None:
    for deployment in deployments:
        if not applies(deployment, node):
            continue
        for model in deployment.models:
            winner = best[model]
            if winner.name != deployment.name and _specificity(winner) == _specificity(deployment):
                first, second = sorted((winner.name, deployment.name))
                raise Conflict(
                    f"deployments {first!r} and {second!r} both decide model {model!r} on node {node.id} "
                    "and are equally specific: add a label to one selector"
                )


def desired_models(node: Node, deployments: Sequence[Deployment]) -> dict[str, PackageRef]:
    """Model name -> package version that `node` should serve. Raises Conflict for a tie."""
    return {model: deployment.models[model] for model, deployment in sorted(winners(node, deployments).items())}


def sync_of(standing: Standing) -> tuple[Sync, str | None]:
    """(how the node stands, why when it refused).

    A node that has been away for long is stale even if it was in sync: silence is not success.
    """
    report = standing.report
    if standing.silent > STALE_AFTER:
        return Sync.STALE, None
    if standing.wanted == 0 or (report is not None and _in_force(standing, report)):
        return Sync.IN_SYNC, None
    if report is None or report.revision != standing.wanted:
        return Sync.PENDING, None
    if report.error is not None:
        return Sync.REFUSED, report.error
    return Sync.APPLYING, None


def _in_force(standing: Standing, report: DocumentReport) -> bool:
    """The digest tells apart two documents of one revision, which a hub restored from a backup can have made."""
    return report.applied == standing.wanted and report.digest in ("", standing.digest)


def decided_by(nodes: Iterable[Node], deployments: Sequence[Deployment]) -> dict[str, list[str]]:
    """Deployment name -> ids of the nodes on which it decides at least one model. Raises Conflict for a tie."""
    found: dict[str, list[str]] = {deployment.name: [] for deployment in deployments}
    for node in nodes:
        for name in {winner.name for winner in winners(node, deployments).values()}:
            found[name].append(node.id)
    return found


def progress(node_ids: Iterable[str], standings: Mapping[str, Standing]) -> list[NodeProgress]:
    """How each node stands towards its desired document, by node id. `standings`: node id -> what is known."""
    return [NodeProgress(node_id, *sync_of(standings.get(node_id, Standing()))) for node_id in sorted(node_ids)]
