"""What goes into a bundle (`sync.bundle`): the documents of nodes or whole packages, their files, and the metadata for both."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cloud_hub.documents import node_scope, tenant_scope
from cloud_hub.records import Records
from cloud_hub.rollout import PackageRef, parse_reference
from models.errors import InvalidRequest, NotFound, TryAgain
from models.manifest import decode_manifest
from sync.bundle import FORMAT, MAX_DOCUMENTS, MAX_FILES, Index
from sync.topics import check_node_id, tenant_of
from sync.trust import unseal

MAX_NODES = 300
"""Nodes of one bundle: each has up to four documents."""
KEYRING = "keys/documents.json"

Read = Callable[[str], bytes | None]
"""A metadata file by its name."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything of a bundle but the bytes of its files. `metadata`: name -> content."""

    index: Index
    metadata: dict[str, bytes]
    documents: tuple[bytes, ...]


def contents(
    records: Records, read: Read, now: float, *, nodes: Sequence[str] = (), packages: Sequence[str] = ()
) -> Contents:
    """Documents of `nodes` with their files, and files of `packages` (`name/version`).

    Raises InvalidRequest, NotFound for a node or package that is not known, TryAgain when there is no metadata yet.
    """
    if not nodes and not packages:
        raise InvalidRequest("say a node or a package")
    if len(nodes) > MAX_NODES:
        raise InvalidRequest(f"node: {len(nodes)} given, at most {MAX_NODES} go into one bundle")
    wanted: set[str] = set()
    documents: list[bytes] = []
    for node in dict.fromkeys(nodes):
        _add_node(records, node, documents, wanted)
    for package in packages:
        wanted |= _package_files(records, parse_reference(package))
    sizes = records.approved_files()
    missing = sorted(wanted - sizes.keys())
    if missing:
        raise InvalidRequest(f"{len(missing)} files are not approved any more, the first is {missing[0]}")
    metadata, expires, keyring = _metadata(read)
    files = {digest: sizes[digest] for digest in sorted(wanted)} | keyring
    documents = list(dict.fromkeys(documents))
    if len(files) > MAX_FILES or len(documents) > MAX_DOCUMENTS:
        raise InvalidRequest(
            f"a bundle holds at most {MAX_FILES} files and {MAX_DOCUMENTS} documents: name fewer nodes"
        )
    index = Index(
        format=FORMAT,
        made=now,
        expires=expires,
        nodes=tuple(nodes),
        packages=tuple(packages),
        files=files,
        documents=len(documents),
    )
    return Contents(index, metadata, tuple(documents))


def _add_node(records: Records, node: str, documents: list[bytes], wanted: set[str]) -> None:
    if records.member(check_node_id(node)) is None:
        raise NotFound(f"no node {node}")
    tenant = tenant_scope(tenant_of(node))
    own = node_scope(node)
    for kind, scope in (("settings", own), ("policy", tenant), ("desired", own), ("software", own)):
        issued = records.document(kind, scope)
        if issued is not None:
            documents.append(issued.envelope)
            wanted.update(unseal(issued.envelope).document.digests)


def _package_files(records: Records, ref: PackageRef) -> set[str]:
    package = records.package(ref)
    if package is None:
        raise NotFound(f"no package {ref}")
    manifest = decode_manifest(package.manifest)
    return {package.digest, manifest.golden.digest, *(variant.blob.digest for variant in manifest.variants)}


def _metadata(read: Read) -> tuple[dict[str, bytes], float, dict[str, int]]:
    """Every current file, from the timestamp down; when the first expires; digest and size of the keyring.

    In this order a change meanwhile does no harm: what was replaced stays readable for a while.
    """
    found: dict[str, bytes] = {}

    def take(name: str) -> Any:
        data = read(name)
        if data is None:
            raise TryAgain(f"the update repository has no {name}")
        found[name] = data
        return json.loads(data)["signed"]

    timestamp = take("timestamp.json")
    snapshot = take(f"{timestamp['meta']['snapshot.json']['version']}.snapshot.json")
    signed = [timestamp, snapshot]
    targets: Any = {}
    for name, meta in snapshot["meta"].items():
        role = take(f"{meta['version']}.{name}")
        signed.append(role)
        if name == "targets.json":
            targets = role["targets"]
    number = 1
    while (root := read(f"{number}.root.json")) is not None:
        found[f"{number}.root.json"] = root
        number += 1
    keyring = targets[KEYRING]
    expires = min(datetime.fromisoformat(role["expires"]).timestamp() for role in signed)
    return found, expires, {f"sha256:{keyring['hashes']['sha256']}": int(keyring["length"])}
