"""One file that carries updates where no network goes: signed metadata, signed documents, files. A hub writes, a node reads.

A tar archive (POSIX ustar) of plain files under fixed names, in this order:

    index.json            what is inside
    tuf/<name>.json       the update repository's metadata
    documents/<n>.json    envelopes of desired documents, settings and policies
    blobs/<hex>           files by their sha256

It is trusted for nothing: what it holds is verified like what any other source says. This reader takes only what this writer
writes: a name of another form, an entry of another type, a size beyond its bound ends the reading, so no path can leave the
folder and no header can make it use memory or disk beyond the bounds.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import msgspec

from sync.durable import disk, write_new
from sync.errors import DigestMismatch, Malformed, StoreFailed
from sync.messages import MAX_MESSAGE_BYTES
from sync.trust import check_digest

FORMAT = 1
INDEX = "index.json"
MAX_INDEX_BYTES = 1 << 20
MAX_FILES = 4_096
"""Files of one bundle: a node serves at most 128 models."""
MAX_DOCUMENTS = 1_024
MAX_METADATA = 1_024
"""Metadata files: 256 bins, the other roles, and every root there ever was."""
MAX_METADATA_BYTES = 5_000_000
MAX_FILE_BYTES = 4 << 30
MAX_BUNDLE_BYTES = 64 << 30
CHUNK = 256 * 1024
_BLOCK = 512
_METADATA = re.compile(r"tuf/(?:[1-9][0-9]{0,15}\.(?:root|targets|snapshot|bin-[0-9a-f]{2})|timestamp)\.json")
_DOCUMENT = re.compile(r"documents/[0-9]{1,4}\.json")
_BLOB = re.compile(r"blobs/[0-9a-f]{64}")


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """`made`: Unix seconds. `expires`: when the metadata inside does. `nodes`: whom documents are inside for. `files`:
    digest -> bytes. `documents`: how many."""

    format: int
    made: float
    expires: float = 0.0
    nodes: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    files: dict[str, int]
    documents: int = 0


# --- writing --------------------------------------------------------------------------------------------------------


def heading(name: str, size: int) -> bytes:
    """The block before a file of `size` bytes."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> bytes:
    """What follows a file of `size` bytes."""
    return b"\0" * (-size % _BLOCK)


END = b"\0" * (2 * _BLOCK)


def small_members(index: Index, metadata: Mapping[str, bytes], documents: Iterable[bytes]) -> Iterator[bytes]:
    """Everything before the files. `metadata`: name -> content."""
    members = {INDEX: msgspec.json.encode(index)}
    members |= {f"tuf/{name}": data for name, data in metadata.items()}
    members |= {f"documents/{number}.json": data for number, data in enumerate(documents)}
    for name, data in members.items():
        yield heading(name, len(data)) + data + padding(len(data))


# --- reading --------------------------------------------------------------------------------------------------------


def unpack(file: BinaryIO, folder: Path) -> Index:
    """Write the content of a bundle below `folder`, which must be empty, checking every digest on the way.

    Raises Malformed naming the entry, DigestMismatch, StoreFailed. What was written by then is the caller's to remove.
    """
    index: Index | None = None
    seen: set[str] = set()
    total = 0
    with disk(f"write {folder}"):
        for name in ("tuf", "documents", "blobs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    while (head := _next_head(file)) is not None:
        name, size = head
        total += size
        _check_entry(name, size, total, seen)
        seen.add(name)
        if index is None:
            if name != INDEX:
                raise Malformed(f"bundle: it begins with {name!r}, not with {INDEX}")
            index = _read_index(file, size)
        elif name.startswith("blobs/"):
            _take_blob(file, folder, name, size, index)
        else:
            content = _read(file, size, name)
            with disk(f"write {folder / name}"):
                write_new(folder / name, content)
        _skip(file, len(padding(size)))
    if index is None:
        raise Malformed("bundle: it is empty")
    _check_whole(index, seen)
    return index


def _check_entry(name: str, size: int, total: int, seen: set[str]) -> None:
    limits = ((_METADATA, MAX_METADATA_BYTES), (_DOCUMENT, MAX_MESSAGE_BYTES), (_BLOB, MAX_FILE_BYTES))
    limit = MAX_INDEX_BYTES if name == INDEX else next((most for form, most in limits if form.fullmatch(name)), None)
    if limit is None:
        raise Malformed(f"bundle: {name[:100]!r} is no name of a bundle")
    if size > limit:
        raise Malformed(f"bundle: {name} has {size} bytes, at most {limit} are accepted")
    if total > MAX_BUNDLE_BYTES:
        raise Malformed(f"bundle: more than {MAX_BUNDLE_BYTES} bytes")
    if name in seen:
        raise Malformed(f"bundle: {name} is there twice")
    if len(seen) > MAX_FILES + MAX_DOCUMENTS + MAX_METADATA:
        raise Malformed("bundle: too many entries")


def _read_index(file: BinaryIO, size: int) -> Index:
    try:
        index = msgspec.json.decode(_read(file, size, INDEX), type=Index)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"bundle: {INDEX}: {error}") from error
    if index.format != FORMAT:
        raise Malformed(f"bundle: format {index.format}, this release reads format {FORMAT}")
    if len(index.files) > MAX_FILES or not 0 <= index.documents <= MAX_DOCUMENTS:
        raise Malformed(f"bundle: at most {MAX_FILES} files and {MAX_DOCUMENTS} documents are accepted")
    for digest, length in index.files.items():
        check_digest(digest)
        if not 0 < length <= MAX_FILE_BYTES:
            raise Malformed(f"bundle: {digest} has {length} bytes, 1 to {MAX_FILE_BYTES} are accepted")
    return index


def _check_whole(index: Index, seen: set[str]) -> None:
    wanted = {f"blobs/{digest.removeprefix('sha256:')}" for digest in index.files}
    wanted |= {f"documents/{number}.json" for number in range(index.documents)} | {"tuf/timestamp.json"}
    missing = wanted - seen
    if missing:
        raise Malformed(f"bundle: {len(missing)} files are missing, the first is {min(missing)}")


def _next_head(file: BinaryIO) -> tuple[str, int] | None:
    """Name and size of the next entry; None at the end mark. Raises Malformed for anything but a plain file."""
    block = file.read(_BLOCK)
    if block == b"\0" * _BLOCK:
        return None
    if len(block) < _BLOCK:
        raise Malformed("bundle: it ends before its end mark")
    try:
        entry = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise Malformed(f"bundle: not a tar archive of ours: {error}") from error
    if entry.type != tarfile.REGTYPE or entry.size < 0:
        raise Malformed(f"bundle: {entry.name[:100]!r} is no plain file")
    return entry.name, entry.size


def _take_blob(file: BinaryIO, folder: Path, name: str, size: int, index: Index) -> None:
    digest = f"sha256:{name.removeprefix('blobs/')}"
    if index.files.get(digest) != size:
        raise Malformed(f"bundle: {name} is not in the index with {size} bytes")
    hasher = sha256()
    with disk(f"write {folder}"), (folder / name).open("xb") as target:
        for chunk in _chunks(file, size, name):
            hasher.update(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    if f"sha256:{hasher.hexdigest()}" != digest:
        raise DigestMismatch(f"bundle: {name} has other bytes than its name says")


def _read(file: BinaryIO, size: int, name: str) -> bytes:
    return b"".join(_chunks(file, size, name))


def _chunks(file: BinaryIO, size: int, name: str) -> Iterator[bytes]:
    while size:
        chunk = file.read(min(CHUNK, size))
        if not chunk:
            raise Malformed(f"bundle: it ends inside {name}")
        size -= len(chunk)
        yield chunk


def _skip(file: BinaryIO, size: int) -> None:
    if len(file.read(size)) < size:
        raise Malformed("bundle: it ends before its end mark")


# --- where a node keeps them ----------------------------------------------------------------------------------------


def read_back(folder: Path) -> tuple[Index, list[bytes]]:
    """Index and envelopes of an unpacked bundle. Raises Malformed, StoreFailed."""
    try:
        index = msgspec.json.decode((folder / INDEX).read_bytes(), type=Index)
        documents = [(folder / "documents" / f"{number}.json").read_bytes() for number in range(index.documents)]
    except OSError as error:
        raise StoreFailed(f"could not read {folder}: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Malformed(f"bundle: {INDEX}: {error}") from error
    return index, documents


def write_index(folder: Path, index: Index) -> None:
    """The last file of an unpacked bundle."""
    with disk(f"write {folder / INDEX}"):
        write_new(folder / INDEX, msgspec.json.encode(index))


def remove(folder: Path) -> None:
    """An unpacked bundle that is of no use any more. What cannot be removed stays."""
    shutil.rmtree(folder, ignore_errors=True)
