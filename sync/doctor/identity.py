"""Who the node is and whom it believes: certificate, pinned trust, update repository, keyring, documents, time."""

from __future__ import annotations

import stat
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import msgspec
from cryptography import x509

from sync.credentials import Identity
from sync.doctor.check import Check, Finding, Skipped, duration, fail, needed, ok, warn
from sync.doctor.kept import Kept, Standing, kid_of
from sync.doctor.network import CLOCK_FIX
from sync.doctor.subject import NodeSubject, identity_of
from sync.errors import Malformed, Refused
from sync.packages import FRESH_SECONDS
from sync.trust import CLOCK_LEEWAY, decode_keyring, verify

ROOT_DAYS = 60
"""As the hub warns: only people can sign a new root."""
DAY = 86_400.0
MAX_METADATA = 5_000_000


class _Signed(msgspec.Struct, frozen=True):
    version: int
    expires: str


class _Metadata(msgspec.Struct, frozen=True):
    signed: _Signed


def check_config(subject: NodeSubject) -> Finding:
    if subject.membership is None:
        return fail(subject.problem)
    node = subject.membership
    return ok(f"{node.id}, tier {node.tier}, broker {node.broker}")


def check_folders(subject: NodeSubject) -> Finding:
    """Whether what the configuration names is there."""
    node = subject.node
    wanted = {"node.root": node.root, "node.credential": node.credential, "node.identity": node.identity}
    missing = [name for name, path in wanted.items() if path is not None and not path.exists()]
    if missing:
        return fail(f"{', '.join(missing)}: not there")
    return ok("every file it names is there")


def check_key(subject: NodeSubject) -> Finding:
    """Permissions, and that key and certificate belong together: opening them says so."""
    node = subject.node
    if node.identity is None:
        node.token()
        return ok("the token's file is readable by its owner alone")
    subject.credentials()
    folder = stat.S_IMODE(node.identity.stat().st_mode)
    if folder & 0o022:
        return warn(f"others may change the folder (mode {folder:04o})", f"chmod 700 {node.identity.name}")
    return ok("the key is readable by its owner alone and fits its certificate")


def check_name(subject: NodeSubject) -> Finding:
    if subject.node.identity is None:
        raise Skipped("this node has a token, no certificate")
    name = Identity(subject.node.identity).pair.node
    if name != subject.node.id:
        return fail(f"the certificate is that of {name}, node.id is {subject.node.id}")
    return ok(f"the certificate is that of {name}")


def check_expiry(subject: NodeSubject) -> Finding:
    if subject.node.identity is None:
        raise Skipped("this node has a token, no certificate")
    pair = Identity(subject.node.identity).pair
    now = subject.clock.wall()
    left, life = pair.not_after - now, pair.not_after - pair.not_before
    if now < pair.not_before - CLOCK_LEEWAY:
        return fail(f"the certificate is valid in {duration(pair.not_before - now)} only", CLOCK_FIX)
    if left < 0:
        return fail(f"the certificate expired {duration(left)} ago")
    # Renewed after two thirds; at a quarter left several attempts have failed.
    if left < life / 4:
        return warn(f"the certificate expires in {duration(left)} and was not renewed")
    return ok(f"the certificate is good for {duration(left)} more")


def check_authority(subject: NodeSubject) -> Finding:
    identity = identity_of(subject)
    roots = x509.load_pem_x509_certificates(identity.ca.read_bytes())
    chain = x509.load_pem_x509_certificates((identity.pair.folder / "cert.pem").read_bytes())
    names = {root.subject for root in roots}
    if not any(cert.issuer in names for cert in chain):
        return fail("the certificate leads to none of the authorities in ca.pem")
    left = max(root.not_valid_after_utc.timestamp() for root in roots) - subject.clock.wall()
    if left < 0:
        return fail(f"every authority in ca.pem has expired, the last one {duration(left)} ago")
    found = f"{len(roots)} in ca.pem, the last one is good for {duration(left)} more"
    return warn(found) if left < 180 * DAY else ok(found)


def check_root(subject: NodeSubject) -> Finding:
    pinned = subject.node.pinned()
    newest = _read(subject.data / "tuf" / "root.json") or pinned
    with suppress(Malformed):
        version, left = _life(newest, subject)
        found = f"version {version}, good for {duration(left)} more"
        if left < 0:
            return fail(f"version {version} expired {duration(left)} ago")
        return warn(found) if left < ROOT_DAYS * DAY else ok(found)
    raise Skipped("the pinned root says nothing about its life")


def check_timestamp(subject: NodeSubject) -> Finding:
    approval = needed(subject.kept().approval, "this node has not asked an update repository yet")
    now = max(subject.clock.wall(), subject.kept().time_floor)
    age = now - approval.refreshed
    if now > approval.expires:
        return fail(f"the newest metadata expired {duration(now - approval.expires)} ago: nothing new is accepted")
    found = (
        f"the newest metadata was signed {duration(max(age, 0))} ago, good for {duration(approval.expires - now)} more"
    )
    return warn(found) if age > FRESH_SECONDS else ok(found)


def check_metadata(subject: NodeSubject) -> Finding:
    """What of snapshot and targets expires first: from the cache, or what is kept beside it."""
    kept, found = subject.kept(), {}
    for role in ("snapshot", "targets"):
        data = _read(subject.data / "tuf" / f"{role}.json") or kept.metadata.get(role)
        if data is not None:
            with suppress(Malformed):
                found[role] = _life(data, subject)
    if not found:
        raise Skipped("no metadata is here yet")
    told = ", ".join(f"{role} {version}: {duration(left)} left" for role, (version, left) in found.items())
    if min(left for _, left in found.values()) < 0:
        return fail(f"expired: {told}")
    return ok(told)


def check_floor(subject: NodeSubject) -> Finding:
    """A cache below what was once verified: put back by somebody, or lost."""
    kept = subject.kept()
    if not kept.floors:
        raise Skipped("no metadata was verified yet")
    below = []
    for role, floor in kept.floors.items():
        data = _read(subject.data / "tuf" / f"{role}.json")
        if data is not None:
            with suppress(Malformed):
                version, _ = _life(data, subject)
                below += [f"{role} {version} is below {floor}"] if version < floor else []
    if below:
        return warn(f"the cache is older than what was verified: {'; '.join(below)}")
    return ok(", ".join(f"{role} {version}" for role, version in sorted(kept.floors.items())) + " or later")


def check_keyring(subject: NodeSubject) -> Finding:
    approval = needed(subject.kept().approval, "this node has not asked an update repository yet")
    keyring = decode_keyring(approval.keyring)
    kinds = sorted({kind for key in keyring.keys for kind in key.kinds})
    known = {key.kid for key in keyring.keys}
    strangers = [
        kind
        for (kind, slot), envelope in _documents(subject.kept())
        if slot == "active" and kid_of(envelope) not in known
    ]
    found = f"{len(keyring.keys)} keys, for {', '.join(kinds)}"
    if strangers:
        return warn(f"{found}; in force but signed by a key that counts no more: {', '.join(strangers)}")
    return ok(found)


def check_documents(subject: NodeSubject) -> Finding:
    """Whether what is stored would be believed again."""
    kept = subject.kept()
    approval = needed(kept.approval, "no keyring is here yet")
    keyring = decode_keyring(approval.keyring)
    if not kept.documents:
        raise Skipped("no document came here yet")
    good, bad = [], []
    for (kind, slot), envelope in _documents(kept):
        try:
            found = verify(
                envelope, keyring, kind=kind, scope=kept.scopes[kind], floor=0, now=subject.clock.wall(), limit=1 << 20
            )
        except Refused as error:
            bad.append(f"{slot} {kind}: {error.code}, {error}")
        else:
            good.append(f"{kind} {found.document.revision}{'' if slot == 'active' else f' ({slot})'}")
    if bad:
        return warn("; ".join(bad))
    return ok(", ".join(good))


def check_progress(subject: NodeSubject) -> Finding:
    kept = subject.kept()
    if not kept.progress:
        raise Skipped("no document came here yet")
    now = subject.clock.wall()
    bad = [each for each in kept.progress if each.error or each.state in ("refused", "rolled_back", "failed")]
    if bad:
        return warn("; ".join(_tell(each, now) for each in bad))
    return ok(", ".join(f"{each.kind} {each.revision} {each.state}" for each in kept.progress))


def check_clock_floor(subject: NodeSubject) -> Finding:
    floor = subject.kept().time_floor
    if not floor:
        raise Skipped("no signed time came here yet")
    behind = floor - subject.clock.wall()
    if behind > CLOCK_LEEWAY:
        return fail(f"the clock is {duration(behind)} before a time that is known to have passed")
    return ok("not before any time that is known to have passed")


CONFIG: tuple[Check[NodeSubject], ...] = (
    Check(
        "config.reads",
        "the configuration: every field of it",
        "correct the field that is named; docs/doctor.md says what else can be checked meanwhile",
        check_config,
    ),
    Check(
        "config.files",
        "whether the files it names are there",
        "put them back, or join the hub again: tierline edge join URL --token TOKEN",
        check_folders,
    ),
)
IDENTITY: tuple[Check[NodeSubject], ...] = (
    Check(
        "identity.key",
        "the key or token: permissions, and that key and certificate fit",
        "chmod 600 the file; a pair that does not fit is replaced by joining the hub again with a new token",
        check_key,
    ),
    Check(
        "identity.name",
        "whether the certificate is this node's",
        "use the folder that belongs to node.id, or correct node.id",
        check_name,
    ),
    Check(
        "identity.expiry",
        "how long the certificate is good",
        "the node renews it as soon as it reaches the hub, also after its end: see network.ports and node.hub; if the hub "
        "refuses, join again with a new token (tierline hub enrol)",
        check_expiry,
    ),
    Check(
        "identity.authority",
        "whether the certificate leads to an authority in ca.pem, and its life",
        "join the hub again with a new token; a hub's authority is rolled over with tierline hub authority",
        check_authority,
    ),
)
TRUST: tuple[Check[NodeSubject], ...] = (
    Check(
        "trust.root",
        "the root of the update repository: readable, and when it expires",
        "sign a new one at the hub (tierline keys renew-root); nodes fetch it by themselves. An unreadable pinned root: copy "
        "root.json from the hub again",
        check_root,
    ),
    Check(
        "trust.timestamp",
        "how old the newest verified metadata is",
        "see network.files: no source has fresh metadata. If they answer, the hub does not sign: tierline doctor --hub-data",
        check_timestamp,
    ),
    Check(
        "trust.metadata",
        "when snapshot and targets expire",
        "see network.files; the hub signs them again by itself as long as it runs and has the keys",
        check_metadata,
    ),
    Check(
        "trust.floor",
        "whether the cache is below what was verified before",
        "delete the folder tuf/ in the data folder: it is fetched again. If nobody put an old copy there, ask who did",
        check_floor,
    ),
    Check(
        "trust.keyring",
        "the keys that sign documents",
        "deploy again from the hub: it signs with the key that counts",
        check_keyring,
    ),
    Check(
        "trust.documents",
        "whether every stored document would be believed again",
        "if it has expired or its key was withdrawn, the hub sends a new one when it is reached; what runs goes on",
        check_documents,
    ),
    Check(
        "trust.progress",
        "how the last updates went",
        "the reason says who must act: a package that does not load is corrected and published under a new version",
        check_progress,
    ),
    Check("clock.floor", "the clock against the latest time known to have passed", CLOCK_FIX, check_clock_floor),
)


def _documents(kept: Kept) -> list[tuple[tuple[str, str], bytes]]:
    return sorted(kept.documents.items())


def _tell(each: Standing, now: float) -> str:
    why = each.error or each.detail or "no reason was kept"
    return f"{each.kind} {each.revision} {each.state} for {duration(max(now - each.since, 0))}: {why}"


def _life(data: bytes, subject: NodeSubject) -> tuple[int, float]:
    """(version, seconds left) of metadata, its signatures not looked at. Raises Malformed."""
    try:
        signed = msgspec.json.decode(data, type=_Metadata).signed
        expires = datetime.fromisoformat(signed.expires).timestamp()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise Malformed(f"metadata: {error}") from error
    return signed.version, expires - subject.clock.wall()


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(MAX_METADATA)
    except OSError:
        return None
