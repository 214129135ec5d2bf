"""What probes found, kept on disk: nothing is probed twice, and a file known to be bad is refused at once."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from models.engines import ENGINES
from models.serving.probe import ProbeRequest, Verdict, probe_files

log = logging.getLogger("tierline.verdicts")

MAX_VERDICTS = 4_096
"""Verdicts kept; the oldest go first. Losing one costs a probe."""


class Verdicts:
    """Final verdicts by file, engine, options and promise. `folder` None = nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    async def judge(self, requests: Sequence[ProbeRequest]) -> list[Verdict]:
        """The verdict on each, probing what is not known. Raises NotReady when no child could be started."""
        verdicts = [self.find(request) for request in requests]
        unknown = [request for request, verdict in zip(requests, verdicts, strict=True) if verdict is None]
        if unknown:
            found = iter(await probe_files(unknown))
            for index, request in enumerate(requests):
                if verdicts[index] is None:
                    verdicts[index] = verdict = next(found)
                    self.keep(request, verdict)
        return [verdict for verdict in verdicts if verdict is not None]

    def find(self, request: ProbeRequest) -> Verdict | None:
        if self._folder is None:
            return None
        try:
            return msgspec.json.decode((self._folder / _name(request)).read_bytes(), type=Verdict)
        except (OSError, msgspec.MsgspecError):
            return None  # absent, or torn by a power cut: probing again is safe

    def keep(self, request: ProbeRequest, verdict: Verdict) -> None:
        """Keep a final verdict. A disk that refuses costs a probe next time, nothing else."""
        if self._folder is None or not verdict.final:
            return
        target = self._folder / _name(request)
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


def _name(request: ProbeRequest) -> str:
    """`<digest>-<engine>-<promise>.json`, the digest being of everything that is loaded with the file.

    The promise is part of the name because a good file under a wrong manifest is refused, and must be accepted once the
    manifest is right; the framework's release because another one may crash or not.
    """
    manifest, variant = request.manifest, request.variant
    promise: tuple[object, ...] = (request.options, _release(variant.engine))
    if manifest is not None:
        promise = (*promise, manifest.inputs, manifest.outputs)
        if request.golden is not None:
            promise = (*promise, manifest.golden.digest, variant.tolerance)
    digest = hashlib.sha256(msgspec.json.encode(promise)).hexdigest()[:16]
    return f"{variant.blob.digest.removeprefix('sha256:')}-{variant.engine}-{digest}.json"


def _release(engine: str) -> str:
    modules = ENGINES[engine].modules if engine in ENGINES else ()
    for module in modules:
        stated = getattr(sys.modules.get(module), "__version__", None)
        if stated is not None:
            return str(stated)
    return next(filter(None, map(_installed, modules)), "")


def _installed(module: str) -> str:
    # Imported late: a start on known files, whose frameworks are there already, does not need it, and it takes 20 ms.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module.replace("_", "-"))
    except PackageNotFoundError:
        return ""
