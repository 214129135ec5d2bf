"""What a power cut may leave of a folder, from the file-system calls that a process really made. Pure but for `write_state`.

`parse` reads the output of `strace` and returns what happened to files below one folder, in order. `states` walks along it and
yields what may be on the disk when the power goes there. The model is deliberately harsher than ext4 (POSIX promises no more):

- what `fsync` or `fdatasync` of a file returned for is kept; of later writes any subset may be kept, or the file may have
  grown with zeros where the data should be, or the last write may be torn in the middle;
- an entry of a folder (a file created, renamed, removed) is kept once the folder was synced; of later ones any subset may be
  kept, whatever became of the files' data; one rename is never half done.

Taken for granted: folders that exist before the recording, sectors that are not written. SQLite's `-shm` is made anew by every
opener and left out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

SYSCALLS = (
    "openat,open,creat,read,pread64,write,writev,pwrite64,pwritev,lseek,ftruncate,fallocate,fsync,fdatasync,"
    "rename,renameat,renameat2,unlink,unlinkat,link,linkat,mkdir,mkdirat,rmdir"
)
SECTOR = 512
MARK = b"ACK "
"""A line with this at its start, written to standard output, says that what follows must survive from here on."""

_LINE = re.compile(r"^(\d+) +(.*)$")
_CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+)(?:<((?:\\x[0-9a-f]{2})*)>)?", re.DOTALL)
_DESCRIPTOR = re.compile(r"^(\d+)<((?:\\x[0-9a-f]{2})*)>")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True)
class Write:
    """`data` at `offset` of file number `inode`; `data` None = the file is cut to `offset` bytes."""

    inode: int
    offset: int
    data: bytes | None


@dataclass(frozen=True)
class Entry:
    """What changed in the folder `folder`: names that went, and (name, inode) that came. Both at once or not at all."""

    folder: str
    gone: tuple[str, ...] = ()
    came: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Sync:
    """`inode`: of a file. `folder`: of a folder, then `inode` is None."""

    inode: int | None = None
    folder: str = ""


@dataclass(frozen=True)
class Mark:
    text: str


Operation = Write | Entry | Sync | Mark
Unsynced = TypeVar("Unsynced", Write, Entry)


class Unknown(Exception):
    """A call this model has no rule for: then the proof would prove nothing."""


class _Reader:
    """Follows descriptors and paths through a trace."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._paths: dict[str, int] = {}
        self._offsets: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._appends: set[int] = set()
        self._count = 0
        self.found: list[Operation] = []

    def known(self, path: Path) -> int:
        """A file that was there before the recording."""
        self._count += 1
        self._paths[str(path)] = self._count
        self._sizes[self._count] = path.stat().st_size
        return self._count

    def take(self, name: str, arguments: str, result: int, opened: str) -> None:
        if result < 0:
            return
        if name in ("write", "writev") and arguments.startswith("1<"):
            self._mark(arguments)
        elif name in ("openat", "open", "creat"):
            self._open(name, arguments, result, opened)
        elif name.startswith(("rename", "unlink", "link", "mkdir", "rmdir")):
            self._change(name, [_bytes(each).decode() for each in _STRING.findall(arguments)])
        else:
            self._use(name, arguments, result)

    def _mark(self, arguments: str) -> None:
        for line in b"".join(_bytes(each) for each in _STRING.findall(arguments)).splitlines():
            if line.startswith(MARK):
                self.found.append(Mark(line.removeprefix(MARK).decode()))

    def _mine(self, path: str) -> bool:
        return path.startswith(f"{self._root}/") and not path.endswith("-shm")

    def _open(self, name: str, arguments: str, descriptor: int, opened: str) -> None:
        path = _bytes(opened).decode()
        self._appends.discard(descriptor)
        self._offsets[descriptor] = 0
        if not self._mine(path):
            return
        if path not in self._paths and ("O_CREAT" in arguments or name == "creat"):
            self._count += 1
            self._paths[path], self._sizes[self._count] = self._count, 0
            self._entry(path, came=self._count)
        elif "O_TRUNC" in arguments or name == "creat":
            self._write(self._paths[path], 0, None)
        if "O_APPEND" in arguments:
            self._appends.add(descriptor)

    def _entry(self, path: str, *, came: int | None = None) -> None:
        folder, _, name = path.rpartition("/")
        self.found.append(Entry(folder, () if came else (name,), ((name, came),) if came else ()))

    def _change(self, name: str, paths: list[str]) -> None:
        if not any(self._mine(path) for path in paths):
            return
        if name.startswith("mkdir"):
            return
        if name.startswith("unlink"):
            self._paths.pop(paths[0], None)
            self._entry(paths[0])
        elif name.startswith("rename"):
            inode = self._paths.pop(paths[0])
            self._paths[paths[1]] = inode
            (folder, _, old), (other, _, new) = paths[0].rpartition("/"), paths[1].rpartition("/")
            if folder == other:
                self.found.append(Entry(folder, (old,), ((new, inode),)))
            else:  # two folders: durable when each was synced, so two changes
                self.found += [Entry(other, (), ((new, inode),)), Entry(folder, (old,))]
        else:
            raise Unknown(f"{name} {paths}")

    def _use(self, name: str, arguments: str, result: int) -> None:
        found = _DESCRIPTOR.match(arguments)
        if found is None:
            return
        descriptor, path = int(found[1]), _bytes(found[2]).decode()
        if name in ("fsync", "fdatasync") and (path == self._root or path.startswith(f"{self._root}/")):
            inode = self._paths.get(path)
            self.found.append(Sync(inode) if inode is not None else Sync(folder=path))
            return
        inode = self._paths.get(path) if self._mine(path) else None
        if name == "lseek":
            self._offsets[descriptor] = result
        elif name == "read":
            self._offsets[descriptor] = self._offsets.get(descriptor, 0) + result
        elif inode is not None and name in ("write", "pwrite64"):
            self._written(descriptor, inode, name, arguments, result)
        elif inode is not None and name == "ftruncate":
            self._write(inode, int(arguments.rpartition(",")[2]), None)
        elif inode is not None and name not in ("pread64",):
            raise Unknown(f"{name}({arguments[:200]})")

    def _written(self, descriptor: int, inode: int, name: str, arguments: str, result: int) -> None:
        (data,) = (_bytes(each) for each in _STRING.findall(arguments))
        if name == "pwrite64":
            self._write(inode, int(arguments.rpartition(",")[2]), data[:result])
            return
        offset = self._sizes[inode] if descriptor in self._appends else self._offsets.get(descriptor, 0)
        self._offsets[descriptor] = offset + result
        self._write(inode, offset, data[:result])

    def _write(self, inode: int, offset: int, data: bytes | None) -> None:
        self._sizes[inode] = offset if data is None else max(self._sizes[inode], offset + len(data))
        self.found.append(Write(inode, offset, data))


def _bytes(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))


@dataclass
class Disk:
    """What is surely there: folder -> name -> inode, and inode -> bytes."""

    entries: dict[str, dict[str, int]] = field(default_factory=dict)
    data: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """One legal outcome. `files`: path -> bytes. `marks`: what had been promised when the power went. `at`: operations done."""

    files: dict[str, bytes]
    marks: tuple[str, ...]
    at: int

    @property
    def key(self) -> str:
        digest = sha256(repr(self.marks).encode())
        for path, data in sorted(self.files.items()):
            digest.update(path.encode() + sha256(data).digest())
        return digest.hexdigest()


def parse(trace: Iterable[str], root: Path, before: Iterable[Path]) -> tuple[list[Operation], Disk]:
    """What the traced process did below `root`, and what was there `before` (paths of its files). Raises Unknown."""
    reader, disk = _Reader(root), Disk()
    for path in before:
        if not path.name.endswith("-shm"):
            disk.entries.setdefault(str(path.parent), {})[path.name] = (inode := reader.known(path))
            disk.data[inode] = path.read_bytes()
    unfinished: dict[str, str] = {}
    for line in trace:
        found = _LINE.match(line)
        if found is None:
            continue
        thread, text = found[1], found[2].rstrip("\n")
        if text.endswith("<unfinished ...>"):
            unfinished[thread] = text.removesuffix("<unfinished ...>")
            continue
        if text.startswith("<... "):
            text = unfinished.pop(thread, "") + text.partition(" resumed>")[2]
        call = _CALL.match(text)
        if call is not None:
            reader.take(call[1], call[2], int(call[3]), call[4] or "")
    return reader.found, disk


def states(operations: list[Operation], disk: Disk, rng: random.Random, per_step: int = 12) -> Iterator[State]:
    """Every distinct state among up to `per_step` choices after each operation, the extreme ones always among them."""
    seen: set[str] = set()
    for at in range(len(operations) + 1):
        for state in _at(operations[:at], disk, rng, per_step):
            if state.key not in seen:
                seen.add(state.key)
                yield state


def _at(done: list[Operation], disk: Disk, rng: random.Random, per_step: int) -> Iterator[State]:
    """Outcomes of a cut after `done`."""
    writes, entries = _unsynced(done, Write), _unsynced(done, Entry)
    marks = tuple(each.text for each in done if isinstance(each, Mark))
    sure = _replay(disk, [each for each in done if each not in _Same(writes) and each not in _Same(entries)])
    chosen: list[tuple[list[Write], list[Entry]]] = [(writes, entries), ([], []), (writes, []), ([], entries)]
    chosen += [(_some(writes, rng), _some(entries, rng)) for _ in range(per_step - len(chosen))]
    for kept_writes, kept_entries in chosen:
        yield State(_files(_replay(sure, [*kept_entries, *kept_writes])), marks, len(done))
    if writes and writes[-1].data is not None:
        last = writes[-1]
        for hurt in (_torn(last), Write(last.inode, last.offset, bytes(len(last.data or b"")))):
            yield State(_files(_replay(sure, [*entries, *writes[:-1], hurt])), marks, len(done))


class _Same:
    """Membership by identity: two equal writes are two writes."""

    def __init__(self, items: Iterable[Operation]) -> None:
        self._ids = {id(item) for item in items}

    def __contains__(self, item: object) -> bool:
        return id(item) in self._ids


def _unsynced(done: Sequence[Operation], kind: type[Unsynced]) -> list[Unsynced]:
    """Those of `kind` that no later sync covers."""
    safe: set[object] = set()
    found: list[Unsynced] = []
    for operation in reversed(done):
        if isinstance(operation, Sync):
            safe.add(operation.folder if operation.inode is None else operation.inode)
        elif isinstance(operation, kind):
            place = operation.inode if isinstance(operation, Write) else getattr(operation, "folder", "")
            if place not in safe:
                found.append(operation)
    return found[::-1]


def _some(items: list[Unsynced], rng: random.Random) -> list[Unsynced]:
    """A subset in order: often all but one, or a beginning."""
    if not items:
        return []
    match rng.randrange(3):
        case 0:
            lost = rng.randrange(len(items))
            return items[:lost] + items[lost + 1 :]
        case 1:
            return items[: rng.randrange(len(items) + 1)]
        case _:
            return [item for item in items if rng.random() < 0.5]


def _torn(write: Write) -> Write:
    """The first half, in whole sectors."""
    data = write.data or b""
    return Write(write.inode, write.offset, data[: len(data) // 2 // SECTOR * SECTOR or len(data) // 2])


def _replay(disk: Disk, operations: Iterable[Operation]) -> Disk:
    after = Disk({folder: dict(names) for folder, names in disk.entries.items()}, dict(disk.data))
    changed: dict[int, bytearray] = {}
    for operation in operations:
        if isinstance(operation, Entry):
            names = after.entries.setdefault(operation.folder, {})
            for name in operation.gone:
                names.pop(name, None)
            names.update(operation.came)
        elif isinstance(operation, Write):
            if operation.inode not in changed:
                changed[operation.inode] = bytearray(after.data.get(operation.inode, b""))
            _apply(changed[operation.inode], operation)
    after.data.update((inode, bytes(data)) for inode, data in changed.items())
    return after


def _apply(data: bytearray, write: Write) -> None:
    if len(data) < write.offset:
        data.extend(bytes(write.offset - len(data)))
    if write.data is None:
        del data[write.offset :]
    else:
        data[write.offset : write.offset + len(write.data)] = write.data


def _files(disk: Disk) -> dict[str, bytes]:
    return {
        f"{folder}/{name}": disk.data.get(inode, b"")
        for folder, names in disk.entries.items()
        for name, inode in names.items()
    }


def write_state(state: State, root: Path, into: Path) -> None:
    """Put the state's files below `into`, as they lay below `root`."""
    for path, data in state.files.items():
        target = into / Path(path).relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
