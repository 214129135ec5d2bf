"""Publishing a version of the nodes' own software, and saying which nodes run it."""

from __future__ import annotations

import asyncio

from cloud_hub.approvals import Approvals
from cloud_hub.blobs import Blobs
from cloud_hub.documents import Documents
from cloud_hub.errors import Conflict
from cloud_hub.records import Issued
from cloud_hub.rollout import Deployment, check_deployment
from cloud_hub.software_records import SLOT
from cloud_hub.storage import Storage
from models.errors import InvalidRequest, NotFound
from sync.clock import Clock
from sync.errors import Malformed
from sync.software import Software, decode_software, encode_software


class SoftwareShelf:
    def __init__(
        self, storage: Storage, blobs: Blobs, approvals: Approvals, documents: Documents, clock: Clock
    ) -> None:
        self._storage = storage
        self._blobs = blobs
        self._approvals = approvals
        self._documents = documents
        self._clock = clock

    async def publish(self, body: bytes) -> tuple[Software, bool]:
        """Approve a version's wheels; (it, whether it is new). Nothing runs it until a target says so.

        Raises InvalidRequest naming the field, also for a file that is missing or of another size; Conflict when the version
        exists with other files.
        """
        try:
            software = decode_software(body)
        except Malformed as error:
            raise InvalidRequest(str(error)) from error
        for index, wheel in enumerate(software.wheels):
            size = await self._blobs.size(wheel.digest)
            if size != wheel.size:
                found = "has not been uploaded" if size is None else f"has {size} bytes, not {wheel.size}"
                raise InvalidRequest(f"wheels[{index}]: {wheel.digest} {found}")
        created = await asyncio.to_thread(self._record, software)
        return software, created

    def _record(self, software: Software) -> bool:
        body, version = encode_software(software), software.version
        with self._storage.write() as records:
            known = records.software.body(version)
            if known is not None and known != body:
                raise Conflict(f"software {version} is published with other files; publish another version")
            if known is not None and records.software.is_withdrawn(version):
                raise Conflict(f"software {version} was withdrawn; publish another version")
            if known is None:
                records.software.add(version, body, self._clock.wall())
        # Also for one that is known: the last attempt may have ended between the database and the repository.
        self._approvals.bring()
        return known is None

    async def withdraw(self, version: str) -> None:
        """No node installs it from then on. Raises NotFound, Conflict while a target names it."""

        def work() -> None:
            with self._storage.write() as records:
                if records.software.body(version) is None:
                    raise NotFound(f"software {version} has not been published")
                using = [target.name for target in records.software.targets() if target.models[SLOT].version == version]
                if using:
                    raise Conflict(
                        f"software {version} is named by target {using[0]!r}; give that another version first"
                    )
                records.software.withdraw(version, self._clock.wall())
            self._approvals.bring()

        await asyncio.to_thread(work)

    def target(self, target: Deployment) -> tuple[bool, list[Issued]]:
        """(whether it is new, the documents that follow). Raises InvalidRequest, Conflict for a tie between two targets."""
        check_deployment(target)
        version = target.models[SLOT].version
        with self._storage.write() as records:
            if records.software.body(version) is None or records.software.is_withdrawn(version):
                raise InvalidRequest(f"version: software {version!r} has not been published, or was withdrawn")
            created = records.software.put_target(target, self._clock.wall())
            return created, self._documents.software(records, records.nodes())

    def forget(self, name: str) -> None:
        """Nodes keep what they run. Raises NotFound."""
        with self._storage.write() as records:
            if not records.software.delete_target(name):
                raise NotFound(f"no target {name!r}")
