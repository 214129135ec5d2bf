"""The checks of a hub: its database, keys and certificates, its files, and the fleet as it sees it."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Sequence
from hashlib import file_digest
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from cryptography import x509

from cloud_hub.doctor_fleet import FLEET
from cloud_hub.doctor_subject import BACKUP_FOLDER, PUBLIC_NAMES, HubSubject
from sync.doctor.check import Check, Finding, Skipped, amount, duration, fail, ok, warn
from sync.doctor.disk import probe_folder, probe_inodes
from sync.doctor.kept import quick_check, reading
from sync.doctor.machine import MACHINE
from sync.doctor.reach import explain_socket
from sync.doctor.subject import holder

if TYPE_CHECKING:
    from cloud_hub.tuf_repository import Repository

DAY = 86_400.0
LOW_DISK, NO_DISK = 1 << 30, 128 << 20
SAMPLE_BYTES = 64 << 20
TIMESTAMP_AGE = 2 * 3_600.0
"""A running hub signs a new timestamp every hour."""
BACKUP_DAYS = 7
MUST_BE_SAVED = ("hub.sqlite", "keys", "ca")


def hub_doctor(path: Path) -> tuple[HubSubject, Sequence[Check[HubSubject]]]:
    """What is to be looked at for a data folder, and the table."""
    return HubSubject(path), CHECKS


class _Readiness(msgspec.Struct, frozen=True):
    ready: bool = False
    broker: bool = False


# --- its process and its disk --------------------------------------------------------------------------------------


def check_process(subject: HubSubject) -> Finding:
    pid = holder(subject.data / "lock")
    return warn("the hub does not run") if pid is None else ok("the hub runs" + (f", process {pid}" if pid else ""))


def check_api(subject: HubSubject) -> Finding:
    url = subject.url()
    try:
        reply = subject.ask("/readyz")
    except OSError as error:
        return fail(f"{url}: {explain_socket(error)}")
    if reply.status != 200:
        return fail(f"{url} is not ready (status {reply.status})")
    return ok(f"{url} is ready, answered in {reply.took * 1e3:.0f} ms")


def check_broker(subject: HubSubject) -> Finding:
    reply = subject.ask("/readyz")
    try:
        ready = msgspec.json.decode(reply.body, type=_Readiness)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return fail(f"no answer that says so (status {reply.status})")
    return ok("connected") if ready.broker else fail("the hub is not connected to its broker")


def check_writable(subject: HubSubject) -> Finding:
    return probe_folder(subject.data)


def check_room(subject: HubSubject) -> Finding:
    status = os.statvfs(subject.data)
    left = status.f_bavail * status.f_frsize
    found = f"{amount(left)} free"
    return fail(found) if left < NO_DISK else warn(found) if left < LOW_DISK else ok(found)


def check_inodes(subject: HubSubject) -> Finding:
    return probe_inodes(subject.data)


def check_database(subject: HubSubject) -> Finding:
    told = quick_check(subject.database)
    return ok("whole") if told == "ok" else fail(f"hub.sqlite is damaged: {told}")


def check_migrations(subject: HubSubject) -> Finding:
    from alembic.script import ScriptDirectory

    from cloud_hub.migrations import configuration

    scripts = ScriptDirectory.from_config(configuration())
    known = {script.revision for script in scripts.walk_revisions()}
    head = scripts.get_current_head()
    try:
        with reading(subject.database) as db:
            found = [str(row[0]) for row in db.execute("SELECT version_num FROM alembic_version")]
    except sqlite3.Error as error:
        return fail(f"the database has no schema number: {error}")
    if found == [head]:
        return ok(f"schema {head}, the newest of this release")
    if set(found) - known:
        return fail(f"schema {', '.join(found)} is of a later release; this one knows up to {head}")
    return warn(f"schema {', '.join(found) or 'none'}, this release's is {head}")


def check_files(subject: HubSubject) -> Finding:
    """Every approved file is there in full; of the smallest, that they are what their names say."""
    with subject.records() as records:
        wanted = records.approved_files()
    folder = subject.data / "blobs" / "sha256"
    left, hashed, bad = SAMPLE_BYTES, 0, list[str]()
    for digest, size in sorted(wanted.items(), key=lambda item: item[1]):
        path = folder / digest.removeprefix("sha256:")
        if not path.is_file() or path.stat().st_size != size:
            bad.append(f"{digest[:19]}... is missing or cut")
            continue
        left -= size
        if left > 0:
            hashed += 1
            with path.open("rb") as file:
                if file_digest(file, "sha256").hexdigest() != path.name:
                    bad.append(f"{digest[:19]}... is damaged")
    if bad:
        return fail(f"{len(bad)} of {len(wanted)} approved files: {bad[0]}")
    return ok(f"{len(wanted)} approved files are here, {hashed} of them hashed")


def check_backup(subject: HubSubject) -> Finding:
    folder = subject.environ.get(BACKUP_FOLDER)
    if not folder:
        raise Skipped(
            f"say {BACKUP_FOLDER}=DIR to have backups looked at: hub.sqlite, keys/ and ca/ cannot be made again"
        )
    found: dict[str, float] = {}
    for path in Path(folder).rglob("*") if Path(folder).is_dir() else ():
        if path.name in MUST_BE_SAVED:
            found[path.name] = max(found.get(path.name, 0.0), path.stat().st_mtime)
    missing = [name for name in MUST_BE_SAVED if name not in found]
    if missing:
        return fail(f"no backup of {', '.join(missing)} below {folder}")
    age = subject.clock.wall() - found["hub.sqlite"]
    told = f"the newest backup of the database is {duration(max(age, 0))} old"
    return fail(told) if age > BACKUP_DAYS * DAY else ok(told)


# --- keys and certificates -----------------------------------------------------------------------------------------


def check_permissions(subject: HubSubject) -> Finding:
    wanted = [*subject.data.glob("keys/*.key"), *subject.data.glob("ca/*/key.pem"), *subject.data.glob("tls/*.key")]
    wanted += [path for path in (subject.data / "admin.token",) if path.exists()]
    if not wanted:
        raise Skipped("there are no keys here yet")
    bad = [path for path in wanted if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if bad:
        names = ", ".join(str(path.relative_to(subject.data)) for path in bad[:5])
        return fail(
            f"others may read {names}", f"chmod 600 {names.replace(',', '')}; who could read them may have copied them"
        )
    return ok(f"{len(wanted)} secret files, readable by their owner alone")


def check_root_keys(subject: HubSubject) -> Finding:
    here = sorted(path.stem for path in subject.keys().glob("root-*.key"))
    if here:
        return warn(f"{', '.join(here)} lie on this machine, where a thief of the hub would find them")
    return ok("no root key lies on this machine")


def check_roles(subject: HubSubject) -> Finding:
    repository = _repository(subject)
    missing = [line for line in repository.problems() if "is not here" in line]
    return fail("; ".join(missing)) if missing else ok("the keys of targets, bins, snapshot and timestamp are here")


def check_metadata(subject: HubSubject) -> Finding:
    now = subject.clock.wall()
    left = {role: expires - now for role, expires in _repository(subject).expiries().items()}
    told = ", ".join(f"{role} {duration(seconds)}" for role, seconds in sorted(left.items(), key=lambda item: item[1]))
    expired = [role for role, seconds in left.items() if seconds < 0]
    if expired:
        return fail(f"expired: {', '.join(expired)}; nodes accept nothing new")
    return warn(f"left: {told}") if left.get("root", DAY * 365) < 60 * DAY else ok(f"left: {told}")


def check_timestamp(subject: HubSubject) -> Finding:
    data = _repository(subject).read("timestamp.json")
    if data is None:
        return fail("there is no timestamp: nodes cannot update")
    try:
        issued = float(msgspec.json.decode(data)["signed"]["x-issued"])
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError):
        return fail("timestamp.json is damaged")
    age = subject.clock.wall() - issued
    told = f"the newest timestamp was signed {duration(max(age, 0))} ago"
    if subject.runs() and age > TIMESTAMP_AGE:
        return fail(told)
    return ok(told)


def check_authority(subject: HubSubject) -> Finding:
    try:
        number = (subject.data / "ca" / "issuing").read_text().strip()
        cert = x509.load_pem_x509_certificate((subject.data / "ca" / number / "cert.pem").read_bytes())
        (subject.data / "ca" / number / "key.pem").stat()
    except FileNotFoundError as error:
        if not (subject.data / "ca").exists():
            raise Skipped("there is no authority of its own here") from None
        return fail(f"{Path(str(error.filename)).name} of the authority is missing")
    except ValueError as error:
        return fail(f"the authority's certificate cannot be read: {error}")
    left = cert.not_valid_after_utc.timestamp() - subject.clock.wall()
    told = f"authority {number} issues, good for {duration(left)} more"
    return (
        fail(f"authority {number} expired {duration(left)} ago")
        if left < 0
        else warn(told)
        if left < 365 * DAY
        else ok(told)
    )


def check_names(subject: HubSubject) -> Finding:
    path = subject.data / "tls" / "server.crt"
    if not path.exists():
        raise Skipped("the hub has no certificate yet")
    cert = x509.load_pem_x509_certificates(path.read_bytes())[0]
    has = _names_of(cert)
    left = cert.not_valid_after_utc.timestamp() - subject.clock.wall()
    if left < 0:
        return fail(f"the hub's certificate expired {duration(left)} ago")
    wanted = [name.strip().lower() for name in subject.environ.get(PUBLIC_NAMES, "").split(",") if name.strip()]
    missing = [name for name in wanted if name not in has]
    if missing:
        return fail(f"the certificate has {', '.join(sorted(has))}, not {', '.join(missing)}")
    said = "" if wanted else f" (say {PUBLIC_NAMES}=NAME,NAME to hold it against those that nodes use)"
    found = f"for {', '.join(sorted(has))}, {duration(left)} left{said}"
    return warn(found) if left < 3 * DAY else ok(found)


CHECKS: tuple[Check[HubSubject], ...] = (
    *MACHINE,
    Check("hub.process", "whether the hub runs", "start it: tierline hub --data DIR", check_process),
    Check(
        "hub.api", "whether its API answers", "see its log; a hub that hangs is restarted without loss", check_api, 8.0
    ),
    Check(
        "hub.broker",
        "whether it is connected to its broker",
        "see that the broker runs at the URL of --broker and takes the hub's certificate or password; documents wait meanwhile",
        check_broker,
        8.0,
    ),
    Check(
        "disk.writable",
        "whether the data folder takes a file and flushes it",
        "make room, remount it writable, or give it to the user the hub runs as (chown)",
        check_writable,
    ),
    Check("disk.room", "free space", "make room, or move the data folder to a larger disk", check_room),
    Check("disk.inodes", "how many files can still be made", "delete small files (logs, caches) here", check_inodes),
    Check(
        "disk.database",
        "the database, looked through",
        "stop the hub and restore hub.sqlite from a backup; nodes go on with what they have and report again",
        check_database,
        20.0,
    ),
    Check(
        "disk.schema",
        "whether the database has the newest schema",
        "start the hub of the release that wrote it; an older schema is brought up to date at the next start",
        check_migrations,
        15.0,
    ),
    Check(
        "disk.files",
        "every approved file, the smallest hashed again",
        "publish the package again from its folder (tierline publish), or restore blobs/ from a backup",
        check_files,
        30.0,
    ),
    Check(
        "disk.backup",
        "how old the newest backup is",
        "copy hub.sqlite (sqlite3 hub.sqlite '.backup FILE'), keys/, ca/ and tuf/ to another machine, every day",
        check_backup,
        10.0,
    ),
    Check("keys.permissions", "that nobody else can read keys and tokens", "chmod 600", check_permissions),
    Check(
        "keys.root",
        "whether root keys lie on this machine",
        "move keys/root-*.key to media that leave this machine, each to another place; two of three are needed to sign",
        check_root_keys,
    ),
    Check(
        "keys.roles",
        "whether the keys the hub signs with are here",
        "put them back, or replace them: tierline keys status, tierline keys rotate ROLE",
        check_roles,
        10.0,
    ),
    Check(
        "keys.metadata",
        "when the update repository's metadata expires",
        "root: tierline keys renew-root; the others are signed by the running hub, see keys.roles",
        check_metadata,
        10.0,
    ),
    Check(
        "keys.timestamp",
        "how old the newest timestamp is",
        "see the hub's log: it signs one every hour while it runs; see keys.roles and disk.writable",
        check_timestamp,
        10.0,
    ),
    Check(
        "keys.authority",
        "the certificate authority: there, and its life",
        "restore ca/ from a backup: without it no node can be let in or renew; roll over in time: tierline hub authority",
        check_authority,
    ),
    Check(
        "keys.names",
        "the names in the hub's certificate, and its life",
        "start the hub with --public-name for every name and address that nodes use; it issues a new certificate at once",
        check_names,
    ),
    *FLEET,
)


def _repository(subject: HubSubject) -> Repository:
    from cloud_hub.keys import HubKeys, read_roles
    from cloud_hub.tuf_repository import Repository as Opened
    from sync.trust import Keyring, SigningKey

    def open_it() -> Repository:
        # Only to look: the key of documents signs nothing here, so any will do.
        roles = read_roles(subject.keys())
        return Opened(subject.data, HubKeys(SigningKey.generate(), Keyring(()), roles), subject.clock, repair=False)

    return subject.shared("repository", open_it)


def _names_of(cert: x509.Certificate) -> set[str]:
    try:
        found = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    names = {name.lower() for name in found.get_values_for_type(x509.DNSName)}
    return names | {str(ip_address(str(address))) for address in found.get_values_for_type(x509.IPAddress)}
