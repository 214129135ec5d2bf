"""Every MQTT topic of the control plane, who may use it, and the broker's access list made from that. Pure.

    tierline/v1/{node}/up/{state,caps,tele,event,reported,job,rpc,block}    node -> hub
    tierline/v1/{node}/down/{desired,settings,software,ack,job,rpc,block}   hub -> node
    tierline/v1/_t/{tenant}/policy                                     hub -> every node of a tenant
    tierline/v1/_g/{tenant}.{group}/policy                             hub -> every node of a group
    tierline/v1/_hub/state                                             hub -> everybody

A node id is `tenant.node` and equals the MQTT user name and client id. Names starting with `_` belong to the hub: they are
outside the charset of nodes and tenants, so no node can be called like one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sync.errors import Malformed

ROOT = "tierline/v1"
HUB_USER = "_hub-1"
"""User name and client id of the hub's connection. Each further consumer needs its own: two connections under one name
evict each other."""
HUB_STATE = f"{ROOT}/_hub/state"
UP = ("state", "caps", "tele", "event", "reported", "job", "rpc", "block")
DOWN = ("desired", "settings", "software", "ack", "job", "rpc", "block")
RETAINED = ("state", "caps", "reported", "desired", "policy", "settings", "software")
MAX_ID = 64

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?"
_NODE_ID = re.compile(rf"({_LABEL})\.({_LABEL})")
_NAME = re.compile(_LABEL)


def check_node_id(node_id: str) -> str:
    """Return `node_id` when it is `tenant.node`. Raises Malformed naming the rule."""
    if len(node_id) > MAX_ID or not _NODE_ID.fullmatch(node_id):
        raise Malformed(f"node id {node_id!r} is not tenant.node, each 1-32 of a-z, 0-9 and inner '-'")
    return node_id


def check_name(field: str, name: str) -> str:
    """Return `name` when it can be a tenant or a group. Raises Malformed naming `field`."""
    if not _NAME.fullmatch(name):
        raise Malformed(f"{field} {name!r} is not 1-32 of a-z, 0-9 and inner '-'")
    return name


def tenant_of(node_id: str) -> str:
    return check_node_id(node_id).partition(".")[0]


def up(node_id: str, leaf: str) -> str:
    """Topic a node publishes on."""
    if leaf not in UP:
        raise ValueError(f"{leaf!r} is none of {UP}")
    return f"{ROOT}/{check_node_id(node_id)}/up/{leaf}"


def down(node_id: str, leaf: str) -> str:
    """Topic the hub publishes on for one node."""
    if leaf not in DOWN:
        raise ValueError(f"{leaf!r} is none of {DOWN}")
    return f"{ROOT}/{check_node_id(node_id)}/down/{leaf}"


def tenant_policy(tenant: str) -> str:
    return f"{ROOT}/_t/{check_name('tenant', tenant)}/policy"


def group_policy(tenant: str, group: str) -> str:
    return f"{ROOT}/_g/{check_name('tenant', tenant)}.{check_name('group', group)}/policy"


def hub_filters() -> tuple[str, ...]:
    """What the hub subscribes to. Filters never overlap: overlapping ones deliver a message twice."""
    return tuple(f"{ROOT}/+/up/{leaf}" for leaf in ("state", "caps", "reported", "event", "rpc", "block"))


def node_filters(node_id: str, groups: Iterable[str] = ()) -> tuple[str, ...]:
    """What a node subscribes to."""
    tenant = tenant_of(node_id)
    own = f"{ROOT}/{node_id}/down/#"
    return (own, tenant_policy(tenant), *(group_policy(tenant, group) for group in groups), HUB_STATE)


def parse_up(topic: str) -> tuple[str, str]:
    """(node id, leaf) of a topic a node publishes on. Raises Malformed for any other topic."""
    parts = topic.split("/")
    if len(parts) != 5 or "/".join(parts[:2]) != ROOT or parts[3] != "up" or parts[4] not in UP:
        raise Malformed(f"topic {topic[:200]!r} is not {ROOT}/<node>/up/<leaf>")
    return check_node_id(parts[2]), parts[4]


def access_list(nodes: Sequence[str], groups: Iterable[tuple[str, str]] = (), denied: Iterable[str] = ()) -> str:
    """A mosquitto ACL file. `nodes`: ids; `groups`: (node id, group) pairs; `denied`: ids that may do nothing, known or not.

    Patterns know only the user name, hence the lines per node for what its tenant and groups may read.
    """
    refused = frozenset(denied)
    lines = [
        f"user {HUB_USER}",
        f"topic readwrite {ROOT}/#",
        f"pattern read {ROOT}/%u/down/#",
        f"pattern write {ROOT}/%u/up/#",
    ]
    # Before every other rule about them: the first that matches decides, and a live connection feels it at once.
    for node in sorted(refused):
        lines += [f"user {check_node_id(node)}", f"topic deny {ROOT}/#"]
    by_node: dict[str, list[str]] = {check_node_id(node): [] for node in nodes if node not in refused}
    for node, group in groups:
        if node in by_node:
            by_node[node].append(group_policy(tenant_of(node), group))
    for node, extra in by_node.items():
        lines += [f"user {node}", f"topic read {tenant_policy(tenant_of(node))}", f"topic read {HUB_STATE}"]
        lines += [f"topic read {topic}" for topic in extra]
    return "\n".join(lines) + "\n"
