"""Playing the attacker: a new version that is sound, and then a file altered where the hub keeps it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from deploy.processes import DeployError


def make_version(package: Path, version: str, into: Path) -> Path:
    """Copy a package folder as a new, honest version. Its model file differs by a note in its metadata alone."""
    shutil.copytree(package, into)
    model = into / "model.onnx"
    before = _digest(model.read_bytes())
    note = f"version {version}".encode()
    # ONNX ModelProto, field 6 (doc_string), length-delimited: the last one counts, the graph is untouched.
    data = model.read_bytes() + bytes([0x32, len(note)]) + note
    model.write_bytes(data)
    manifest = json.loads((into / "manifest.json").read_text())
    manifest["version"] = version
    for variant in manifest["variants"]:
        if variant["blob"]["digest"] == before:
            variant["blob"] = {"digest": _digest(data), "size": len(data)}
    (into / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return into


def break_stored_file(hub_data: Path, original: Path) -> None:
    """Alter one byte of a published file inside the hub's storage. Raises DeployError when it is not there."""
    name = _digest(original.read_bytes()).removeprefix("sha256:")
    found = [path for path in hub_data.rglob("*") if path.is_file() and name in path.name.replace("/", "")]
    if not found:
        raise DeployError(f"no stored file for {original} under {hub_data}")
    data = bytearray(found[0].read_bytes())
    data[len(data) // 2] ^= 0xFF
    found[0].chmod(0o600)
    found[0].write_bytes(data)


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
