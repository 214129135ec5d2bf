"""The checks of an edge node: engines, models, ports, the tier above, what it keeps for its devices."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edge_node.config import EdgeConfig, load_edge_config
from models import doctor as models_doctor
from models.errors import TierlineError
from models.policy import decode_policy, rule_for
from sync.doctor.check import Check, Finding, Skipped, amount, fail, ok, warn
from sync.doctor.node import NODE
from sync.doctor.reach import explain_socket, get, place_of
from sync.doctor.subject import NodeSubject, subject_of

TIER = "edge"


def edge_doctor(path: Path) -> tuple[NodeSubject, Sequence[Check[NodeSubject]]]:
    """What is to be looked at for the node of a configuration file, and the table."""
    return subject_of(path, load_edge_config, fields_of), CHECKS


def fields_of(config: EdgeConfig) -> Mapping[str, Any]:
    """What the checks of every tier need of this one's configuration, as fields of NodeSubject."""
    return {
        "membership": config.node,
        "quota": config.store,
        "plan": models_doctor.needs,
        "up": {"cloud": config.up.url} if config.up is not None else {},
    }


def check_engines(subject: NodeSubject) -> Finding:
    return Finding(*models_doctor.engines(load=subject.live is None))


def check_models(subject: NodeSubject) -> Finding:
    body = subject.active("desired")
    if body is None:
        raise Skipped("no desired document is in force")
    url = subject.announced().get("url")
    if not isinstance(url, str):
        return Finding(*models_doctor.run_here(body, subject.blob))
    if not url.startswith("http://"):
        raise Skipped(f"the data plane at {url} wants certificates: the golden inputs were not sent")
    return Finding(*models_doctor.run_there(url, body, subject.blob, subject.node.tier))


def check_ports(subject: NodeSubject) -> Finding:
    listen = config_of(subject).listen
    addresses = subject.announced().get("addresses")
    if isinstance(addresses, dict):
        deaf = [f"{name} {url}: {said}" for name, url in addresses.items() if (said := _look_at_address(str(url)))]
        if deaf:
            return fail(f"the node runs, but {'; '.join(deaf)}", "restart the node; see its log")
        return ok("this node answers on " + ", ".join(map(str, addresses.values())))
    ports = {"http": (listen.host, listen.port), "grpc": (listen.host, listen.grpc_port)}
    ports["metrics"] = (listen.metrics_host, listen.metrics_port)
    looked = {f"{name} {host}:{port}": look_at_port(host, port) for name, (host, port) in ports.items() if port}
    taken = [f"{name} {said}" for name, said in looked.items() if said]
    if taken:
        return fail("; ".join(taken))
    return ok(f"free: {', '.join(looked)}" if looked else "chosen by the system at each start")


def _look_at_address(url: str) -> str:
    """Why nobody answers there, empty = somebody does."""
    parts = urlsplit(url)
    if not parts.hostname or not parts.port:
        return ""
    try:
        socket.create_connection((parts.hostname, parts.port), 2.0).close()
    except OSError as error:
        return explain_socket(error)
    return ""


def look_at_port(host: str, port: int) -> str:
    """Why it cannot be opened, empty = it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "is taken by another process"
            if error.errno == errno.EACCES:
                return "needs rights that this user does not have (below 1024)"
            return f"cannot be opened: {error.strerror}"
    return ""


def check_up(subject: NodeSubject) -> Finding:
    up = config_of(subject).up
    if up is None:
        raise Skipped("no tier is configured above this one")
    return reach_up(subject, "cloud", up.url)


def reach_up(subject: NodeSubject, name: str, url: str) -> Finding:
    """Whether the tier above is ready, within the deadline that the routing policy gives requests without one."""
    limit = _deadline(subject)
    try:
        reply = get(place_of(name, url, subject.trust), "/v2/health/ready", timeout=max(limit, 1.0))
    except OSError as error:
        return warn(f"{url}: {explain_socket(error)}; everything is answered here")
    if reply.status != 200:
        return warn(f"{url} is not ready (status {reply.status}); everything is answered here")
    found = f"{url} is ready, answered in {reply.took * 1e3:.0f} ms of the {limit * 1e3:.0f} that a request has"
    return warn(found) if reply.took > limit / 2 else ok(found)


def check_mirror(subject: NodeSubject) -> Finding:
    folder = subject.data / "blobs"
    if not folder.is_dir():
        raise Skipped("this node has not been started yet")
    body = subject.active("desired")
    own = {digest.removeprefix("sha256:") for digest in (models_doctor.needs(body) if body is not None else ())}
    kept = [path.stat().st_size for path in folder.iterdir() if path.name not in own]
    limit = subject.quota.cache_bytes
    found = f"{len(kept)} files of others, {amount(sum(kept))} of {amount(limit)}"
    return warn(found) if sum(kept) > limit else ok(found)


CHECKS: tuple[Check[NodeSubject], ...] = (
    *NODE,
    Check(
        "edge.engines",
        "whether each engine can be imported, and its version",
        "pip install 'tierline[device]' for ONNX, 'tierline[litert]' for TFLite files",
        check_engines,
        30.0,
    ),
    Check(
        "edge.models",
        "each model's golden inputs: through the data plane if the node runs, else loaded here; milliseconds of a run",
        "restart the node; if the answers stay wrong roll back at the hub (tierline deploy with the version before)",
        check_models,
        30.0,
    ),
    Check(
        "edge.ports",
        "the ports of [listen]: free, or this node's",
        "choose another port in [listen], or stop what has it ('ss -ltnp' says who)",
        check_ports,
    ),
    Check(
        "edge.up",
        "whether the tier above answers within the deadline",
        "correct url in [up], or see that the cloud worker runs; a slow link needs a longer deadline in the routing policy",
        check_up,
        12.0,
    ),
    Check(
        "edge.mirror",
        "what is kept for the devices behind this node",
        "nothing has to be done: the longest unused go at the next sweep; else raise cache_bytes in [store]",
        check_mirror,
    ),
)


def config_of(subject: NodeSubject) -> EdgeConfig:
    if not isinstance(subject.config, EdgeConfig):
        raise Skipped("the configuration cannot be used")
    return subject.config


def _deadline(subject: NodeSubject) -> float:
    """Seconds of a request without a deadline of its own."""
    try:
        body = subject.active("policy")
        policy = decode_policy(body or b"{}")
    except (TierlineError, Skipped):
        policy = decode_policy(b"{}")
    return rule_for(policy, "", TIER).default_deadline_ms / 1e3
