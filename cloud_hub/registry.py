"""Publishing a package version: the manifest's exact bytes, every file it names already here, never changed again."""

from __future__ import annotations

import asyncio

from cloud_hub.approvals import Approvals
from cloud_hub.blobs import Blobs
from cloud_hub.errors import Conflict
from cloud_hub.records import Package
from cloud_hub.rollout import PackageRef
from cloud_hub.storage import Storage
from models.errors import InvalidManifest, NotFound
from models.manifest import Blob, Manifest, decode_manifest
from sync.clock import Clock
from sync.trust import digest_of


class Registry:
    def __init__(self, storage: Storage, blobs: Blobs, approvals: Approvals, clock: Clock) -> None:
        self._storage = storage
        self._blobs = blobs
        self._approvals = approvals
        self._clock = clock

    async def publish(self, manifest_bytes: bytes) -> tuple[Package, bool]:
        """Approve a version; (it, whether it is new). The update repository lists its files from then on.

        Raises InvalidManifest (also for a file that is missing or of another size), Conflict when the version exists with
        another manifest.
        """
        manifest = decode_manifest(manifest_bytes)
        await self._check_files(manifest)
        digest = digest_of(manifest_bytes)
        await self._blobs.put_bytes(digest, manifest_bytes)
        package = Package(
            PackageRef(manifest.package, manifest.version), digest, manifest_bytes, published=self._clock.wall()
        )
        return await asyncio.to_thread(self._record, package, manifest)

    async def _check_files(self, manifest: Manifest) -> None:
        for field, blob in files_of(manifest).items():
            size = await self._blobs.size(blob.digest)
            if size is None:
                raise InvalidManifest(f"{field}: {blob.digest} has not been uploaded")
            if size != blob.size:
                raise InvalidManifest(f"{field}: {blob.digest} has {size} bytes, the manifest says {blob.size}")

    def _record(self, package: Package, manifest: Manifest) -> tuple[Package, bool]:
        files = {blob.digest: blob.size for blob in files_of(manifest).values()}
        with self._storage.write() as records:
            known = records.package(package.ref)
            if known is not None and known.digest != package.digest:
                raise Conflict(f"package {package.ref} is published with other contents; publish a new version")
            if known is not None and not records.is_approved(package.ref):
                raise Conflict(f"package {package.ref} was withdrawn; publish a new version")
            if known is None:
                records.add_package(package, {**files, package.digest: len(package.manifest)})
        # Also for one that is known: the last attempt may have ended between the database and the repository.
        self._approvals.bring()
        return known or package, known is None

    async def unapprove(self, ref: PackageRef) -> None:
        """Withdraw a version found bad: no node installs its files from then on, whatever a stolen envelope key says.

        A node that runs it goes on running it until it is deployed something else. For good: publish a fix as a new version.
        Raises NotFound, Conflict while a deployment names it.
        """
        await asyncio.to_thread(self._withdraw, ref)

    def _withdraw(self, ref: PackageRef) -> None:
        with self._storage.write() as records:
            if records.package(ref) is None:
                raise NotFound(f"package {ref} has not been published")
            using = [entry.name for entry in records.deployments() if ref in entry.models.values()]
            if using:
                raise Conflict(f"package {ref} is named by deployment {using[0]!r}; deploy another version there first")
            records.unapprove(ref)
        self._approvals.bring()


def files_of(manifest: Manifest) -> dict[str, Blob]:
    """Field of the manifest -> the file it names."""
    variants = {f"variants[{index}].blob": variant.blob for index, variant in enumerate(manifest.variants)}
    return {"golden": manifest.golden, **variants}
