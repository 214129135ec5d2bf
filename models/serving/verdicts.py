"""What probes found, kept on disk: nothing is probed twice, and a file known to be bad is refused at once."""

from __future__ import annotations

import hashlib
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from models.engines import ENGINES
from models.manifest import Manifest, Variant
from models.serving.probe import Verdict

log = logging.getLogger("tierline.verdicts")

MAX_VERDICTS = 4_096
"""Verdicts kept; the oldest go first. Losing one costs a probe."""


class Verdicts:
    """Final verdicts by file, engine and promise. `folder` None = nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, manifest: Manifest, variant: Variant) -> Verdict | None:
        if self._folder is None:
            return None
        try:
            return msgspec.json.decode((self._folder / _name(manifest, variant)).read_bytes(), type=Verdict)
        except (OSError, msgspec.MsgspecError):
            return None  # absent, or torn by a power cut: probing again is safe

    def put(self, manifest: Manifest, variant: Variant, verdict: Verdict) -> None:
        """Keep a final verdict. A disk that refuses costs a probe next time, nothing else."""
        if self._folder is None or not verdict.final:
            return
        target = self._folder / _name(manifest, variant)
        staged = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(msgspec.json.encode(verdict))
            staged.replace(target)
            self._prune()
        except OSError as error:
            log.warning("a probe's verdict could not be kept: %s", error)

    def _prune(self) -> None:
        assert self._folder is not None
        kept = sorted(self._folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for file in kept[: max(len(kept) - MAX_VERDICTS, 0)]:
            file.unlink(missing_ok=True)


def _name(manifest: Manifest, variant: Variant) -> str:
    """`<file digest>-<engine>-<promise>.json`.

    The promise is part of the name because a good file under a wrong manifest is refused, and must be accepted once the
    manifest is right; the framework's release because another one may crash or not.
    """
    promise = (manifest.inputs, manifest.outputs, manifest.golden.digest, variant.tolerance, _release(variant.engine))
    digest = hashlib.sha256(msgspec.json.encode(promise)).hexdigest()[:16]
    return f"{variant.blob.digest.removeprefix('sha256:')}-{variant.engine}-{digest}.json"


def _release(engine: str) -> str:
    for module in ENGINES[engine][1] if engine in ENGINES else ():
        try:
            return version(module.replace("_", "-"))
        except PackageNotFoundError:
            continue
    return ""
