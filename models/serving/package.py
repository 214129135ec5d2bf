"""One assignment of a desired document becomes a loaded version: probed in a child, loaded, checked, warmed, measured."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import structs

from models.contract import Golden, bind, check_golden, load_golden
from models.desired import Assignment
from models.engines import EngineOptions, get_engine
from models.errors import ContractBreach, NotReady, PackageError
from models.manifest import MAX_MANIFEST_BYTES, Contract, Manifest, Variant, choose_variant, decode_manifest
from models.serving.aside import aside
from models.serving.loaded import Identity, Loaded, first_row
from models.serving.probe import ProbeLimits, ProbeRequest
from models.serving.verdicts import Verdicts


class PackageLoader:
    """Loads packages with the best variant for `engines`. `verdicts`: what earlier probes found."""

    def __init__(self, engines: Sequence[str], options: EngineOptions, verdicts: Verdicts, limits: ProbeLimits) -> None:
        self._engines = engines
        self._options = options
        self._verdicts = verdicts
        self._limits = limits

    async def load(self, name: str, assignment: Assignment, blobs: Mapping[str, Path]) -> Loaded:
        """Raises PackageError naming the model, or NotReady when it may work later."""
        where = f"model '{name}' ({assignment.package}/{assignment.version})"
        try:
            manifest = _read_manifest(assignment, blobs)
            variant = choose_variant(manifest.variants, self._engines)
            paths = _blob(blobs, variant.blob.digest), _blob(blobs, manifest.golden.digest)
            await self._probe(manifest, variant, *paths)
            return await aside(lambda: self._open(identity_of(assignment, variant), manifest, variant, *paths))
        except PackageError as error:
            raise type(error)(f"{where}: {error}") from error

    async def contract(self, assignment: Assignment, blobs: Mapping[str, Path]) -> Contract:
        """What the package promises. Raises PackageError."""
        return (await asyncio.to_thread(_read_manifest, assignment, blobs)).contract

    async def _probe(self, manifest: Manifest, variant: Variant, path: Path, golden: Path) -> None:
        request = ProbeRequest(str(path), str(golden), variant, manifest, self._options, self._limits)
        (verdict,) = await self._verdicts.judge([request])
        if not verdict.ok:
            # What only this moment is to blame for must not condemn the file.
            raise (ContractBreach if verdict.final else NotReady)(verdict.reason)

    def _open(self, identity: Identity, manifest: Manifest, variant: Variant, path: Path, golden_path: Path) -> Loaded:
        """In a thread: load the file, warm it on the golden inputs, measure it."""
        golden: Golden = load_golden(golden_path, manifest)
        options = structs.replace(self._options, inputs=manifest.inputs, outputs=manifest.outputs)
        session = get_engine(variant.engine).load(path, options)
        try:
            session = bind(session, manifest.inputs, manifest.outputs)
            check_golden(session, manifest, golden, variant.tolerance)
            return Loaded(
                identity,
                session,
                inputs=manifest.inputs,
                outputs=manifest.outputs,
                confidence=manifest.confidence,
                sample=first_row(manifest.inputs, golden.inputs),
            )
        except BaseException:
            session.close()
            raise


def identity_of(assignment: Assignment, variant: Variant) -> Identity:
    return Identity(
        assignment.package,
        assignment.version,
        variant.engine,
        variant.precision,
        assignment.manifest.digest,
        variant.blob.digest,
    )


def _blob(blobs: Mapping[str, Path], digest: str) -> Path:
    path = blobs.get(digest)
    if path is None:
        raise ContractBreach(f"file {digest} was not given")
    return path


def _read_manifest(assignment: Assignment, blobs: Mapping[str, Path]) -> Manifest:
    """The manifest, refused when it says anything else than the assignment that named it."""
    with _blob(blobs, assignment.manifest.digest).open("rb") as file:
        manifest = decode_manifest(file.read(MAX_MANIFEST_BYTES + 1))
    for name in ("package", "version", "variants", "golden"):
        if getattr(manifest, name) != getattr(assignment, name):
            raise ContractBreach(f"the manifest's {name} is not what the desired document says")
    return manifest
