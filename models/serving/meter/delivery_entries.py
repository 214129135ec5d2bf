"""The metrics of what reaches a node: documents, update metadata, files, the store, and the mirror for devices."""

from __future__ import annotations

from models.serving.meter.entry import Entry

DELIVERY = (
    # --- documents and update metadata --------------------------------------------------------------------------------
    Entry(
        "update.document.state",
        "gauge",
        "{document}",
        ("kind", "state"),
        "1 for the state that the newest document of a kind is in, 0 for the others; the states are in "
        "docs/updates.md.",
        "failed, or verifying or fetching for long: see delivery.attempt.errors. rolled_back, refused: the node's "
        "report has the reason.",
    ),
    Entry(
        "update.document.revision",
        "gauge",
        "{revision}",
        ("kind",),
        "Revision of the newest document that was accepted.",
        "Above update.document.applied for long: see update.document.state.",
    ),
    Entry(
        "update.document.applied",
        "gauge",
        "{revision}",
        ("kind",),
        "Revision in force, 0 = none.",
        "Lower than before: it was rolled back; the node's report has the reason.",
    ),
    Entry(
        "update.document.attempts",
        "gauge",
        "{attempt}",
        ("kind",),
        "Failed attempts to put the newest document in force.",
        "Grows: the node's report has the reason.",
    ),
    Entry(
        "update.document.refusals",
        "counter",
        "{document}",
        ("kind", "reason"),
        "Documents not accepted, and updates that failed for what they were made of, by error code.",
        "bad_signature, wrong_scope, replayed: who sends to this node? expired: its clock, or the hub's. rejected: "
        "the package does not fit this node.",
    ),
    Entry(
        "update.metadata.remaining",
        "gauge",
        "s",
        (),
        "Time until the update repository's metadata expires; below 0 it has expired.",
        "Near 0: no source has anything newer, nothing new will be accepted; serving goes on.",
    ),
    Entry(
        "update.metadata.age",
        "gauge",
        "s",
        (),
        "Time since the newest timestamp that came here was signed.",
        "Above a day: a source is frozen, or the hub no longer signs.",
    ),
    Entry(
        "update.metadata.version",
        "gauge",
        "{version}",
        (),
        "Version of the snapshot.",
        "Lower than on other nodes: see update.metadata.refreshes.",
    ),
    Entry(
        "update.metadata.refreshes",
        "counter",
        "{refresh}",
        ("outcome",),
        "Looks at the update repository: good, or the error code when no source gave a good answer.",
        "unavailable: the network or the hub. Any other but good: a source that is damaged, stale or hostile.",
    ),
    # --- files --------------------------------------------------------------------------------------------------------
    Entry(
        "delivery.file.count",
        "counter",
        "{file}",
        ("way",),
        "Files brought into the store: whole, resumed (continued where an earlier attempt had ended), as a delta, in "
        "blocks over MQTT, or from a medium.",
        "blocks: neither the hub nor an edge node is reached over HTTP. Never delta, with new versions of what is "
        "here: see delivery.delta.refused.",
    ),
    Entry(
        "delivery.received",
        "counter",
        "By",
        ("way",),
        "What came for them, with what came in vain; metadata = small files. Deltas over MQTT are blocks.",
        "Far more than the files have: transfers are cut again and again, see delivery.attempt.errors.",
    ),
    Entry(
        "delivery.file.errors",
        "counter",
        "{file}",
        ("reason",),
        "Files that no source delivered, by error code; they are asked for again later.",
        "store_failed: the disk, see store.size and store.disk.free. digest_mismatch: every source that answered has "
        "other bytes than were signed for.",
    ),
    Entry(
        "delivery.attempt.errors",
        "counter",
        "{attempt}",
        ("reason",),
        "Attempts to get a file from one source that came to nothing, by error code; the next source is asked. busy = "
        "it asked to come back.",
        "digest_mismatch: a source that lies or is damaged. unavailable: the way to it. busy for long: too many nodes "
        "at once.",
    ),
    Entry(
        "delivery.delta.refused",
        "counter",
        "{delta}",
        (),
        "Deltas that were begun and of no use; the whole file was fetched.",
        "Rising: the log says why.",
    ),
    Entry(
        "delivery.delta.saved",
        "counter",
        "By",
        (),
        "What deltas were smaller than the files they made.",
        "Flat while versions change: they have little in common.",
    ),
    # --- files for devices --------------------------------------------------------------------------------------------
    Entry(
        "mirror.file.lookups",
        "counter",
        "{request}",
        ("outcome",),
        "Questions of devices for a file: hit = it was here, miss = it was not.",
        "Mostly miss: store.cache.limit is too small for what devices ask for.",
    ),
    Entry(
        "mirror.file.fetched",
        "counter",
        "{file}",
        (),
        "Files fetched because a device asked.",
        "The same files again and again: as for mirror.file.lookups.",
    ),
    Entry(
        "mirror.file.sent",
        "counter",
        "By",
        (),
        "Bytes of files sent to devices.",
        "Far above what the devices' versions have: their transfers are cut.",
    ),
    Entry(
        "mirror.request.rejected",
        "counter",
        "{request}",
        ("reason",),
        "Devices asked to come back: bytes = one has had its share, device_slots = it has too many downloads under "
        "way, slots = all have, coming = the file is on its way here, busy = too many files are.",
        "slots, bytes: raise them in [mirror] if the network allows. coming for long: see delivery.attempt.errors.",
    ),
    Entry(
        "mirror.download.active",
        "gauge",
        "{download}",
        (),
        "Downloads of devices under way.",
        "Stays at slots: devices wait for each other.",
    ),
    # --- the store ----------------------------------------------------------------------------------------------------
    Entry(
        "store.size",
        "gauge",
        "By",
        (),
        "What the store's files and half downloads take.",
        "At store.size.limit: see store.needed.",
    ),
    Entry(
        "store.needed",
        "gauge",
        "By",
        (),
        "The part of it that documents name and that is never removed.",
        "Near store.size.limit: no update will find room.",
    ),
    Entry(
        "store.size.limit",
        "gauge",
        "By",
        (),
        "Its quota; not shown without one.",
        "Below what two versions take: updates cannot be fetched.",
    ),
    Entry(
        "store.cache.limit",
        "gauge",
        "By",
        (),
        "What files that no document names may take: those kept for devices.",
        "See mirror.file.lookups.",
    ),
    Entry(
        "store.disk.free",
        "gauge",
        "By",
        (),
        "What the store's disk has left.",
        "Near [store] free_bytes: no update will find room.",
    ),
    Entry(
        "store.file.removals",
        "counter",
        "{file}",
        (),
        "Files and half downloads removed to keep within the quota.",
        "Rising steadily: what is removed is fetched again; raise [store] cache_bytes.",
    ),
    Entry(
        "store.removed",
        "counter",
        "By",
        (),
        "What they took.",
        "As for store.file.removals.",
    ),
)
