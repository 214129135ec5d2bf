"""What a support bundle tells about a node beside the doctor's report. Configurations go out by a list of allowed fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from sync.doctor.kept import kid_of, open_document
from sync.doctor.reach import get, place_of
from sync.doctor.subject import NodeSubject, read_raw
from sync.errors import Malformed
from sync.ledger import as_json
from sync.outbox_store import read_ledger

MAX_ENTRIES = 5_000
MAX_BODY = 64 * 1024
MAX_METRICS = 1 << 20

# Fields that say how a node is set up and nothing about what only it may know. A name ending in .* allows all below it.
ALLOWED = frozenset(
    {
        *(
            f"node.{name}"
            for name in ("id", "tier", "broker", "hub", "sources", "groups", "fleet", "insecure", "direct")
        ),
        *(f"listen.{name}" for name in ("host", "port", "grpc_port", "metrics_port", "metrics_host", "cache_mb")),
        *("listen.trace_share", "listen.origins", "serving.threads", "threads", "host", "port", "edge", "up.url"),
        *("updates.*", "store.*", "mirror.*"),
    }
)


def node_parts(subject: NodeSubject, *, bodies: bool) -> Mapping[str, Callable[[], object]]:
    """File name -> what makes its contents: text, or what becomes JSON."""
    return {
        "config.json": lambda: allowed(read_raw(subject.path)) if subject.path is not None else {},
        "documents.json": lambda: _documents(subject, bodies),
        "progress.json": lambda: [asdict(each) for each in subject.kept().progress],
        "ledger.json": lambda: as_json(read_ledger(subject.data / "outbox.db")),
        "store.json": lambda: _store(subject),
        "process.json": lambda: {"runs": subject.runs(), **_announced(subject)},
        "metrics.txt": lambda: _metrics(subject),
    }


def allowed(raw: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """A configuration with its shape, and values only where they are allowed; addresses without what stands before an @."""
    found: dict[str, object] = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in ALLOWED:
            found[key] = allowed(value, f"{name}.")
        elif name in ALLOWED or f"{name.partition('.')[0]}.*" in ALLOWED:
            found[key] = _without_credentials(value)
        else:
            found[key] = f"[left out: {type(value).__name__}]"
    return found


def _without_credentials(value: object) -> object:
    if isinstance(value, list):
        return [_without_credentials(item) for item in value]
    if isinstance(value, str) and "://" in value:
        try:
            parts = urlsplit(value)
            port = f":{parts.port}" if parts.port else ""
        except ValueError:
            return "[left out: no URL]"
        return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"
    return value


def _documents(subject: NodeSubject, bodies: bool) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for (kind, slot), envelope in sorted(subject.kept().documents.items()):
        try:
            document = open_document(envelope)
        except Malformed as error:
            found.append({"kind": kind, "slot": slot, "error": str(error)})
            continue
        head: dict[str, object] = {
            "kind": kind,
            "slot": slot,
            "scope": document.scope,
            "revision": document.revision,
            "issued": document.issued,
            "expires": document.expires,
            "kid": kid_of(envelope),
            "digests": list(document.digests)[:MAX_ENTRIES],
        }
        if bodies:
            head["body"] = bytes(document.body)[:MAX_BODY].decode("utf-8", "replace")
        found.append(head)
    return found


def _store(subject: NodeSubject) -> dict[str, object]:
    entries: list[tuple[str, int, float]] = []
    for folder in ("blobs", "staging"):
        for path in (subject.data / folder).glob("*"):
            status = path.stat()
            entries.append((f"{folder}/{path.name}", status.st_size, status.st_mtime))
    entries.sort(key=lambda entry: -entry[1])
    files = [{"file": name, "size": size, "used": used} for name, size, used in entries[:MAX_ENTRIES]]
    return {"count": len(entries), "bytes": sum(size for _, size, _ in entries), "files": files}


def _announced(subject: NodeSubject) -> dict[str, object]:
    said = subject.announced()
    return {name: said[name] for name in ("pid", "id", "url", "addresses") if name in said}


def _metrics(subject: NodeSubject) -> str:
    url = dict(subject.announced().get("addresses") or {}).get("metrics")
    if not isinstance(url, str):
        return "the node does not run, or has no metrics port\n"
    base, _, path = url.rpartition("/metrics")
    return get(place_of("metrics", base or url, subject.trust), f"/metrics{path}", limit=MAX_METRICS).body.decode()
