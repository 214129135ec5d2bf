"""The model of power cuts knows good ways of writing a file from bad ones; what it says of SQLite rests on the same rules."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from proofs.crash_states import Disk, Entry, Mark, Operation, Sync, Unknown, Write, parse, states

OLD, NEW = b"old" * 400, b"new" * 400
BEFORE = Disk({"/d": {"file": 1}}, {1: OLD})

CREATE = Entry("/d", (), (("tmp", 2),))
RENAME = Entry("/d", ("tmp",), (("file", 2),))
IN_PLACE = [Write(1, 0, None), Write(1, 0, NEW), Sync(1), Mark("new")]
NO_FSYNC = [CREATE, Write(2, 0, NEW), RENAME, Mark("new")]
NO_FOLDER = [CREATE, Write(2, 0, NEW), Sync(2), RENAME, Mark("new")]
RIGHT = [CREATE, Write(2, 0, NEW), Sync(2), RENAME, Sync(folder="/d"), Mark("new")]


def outcomes(operations: list[Operation]) -> tuple[int, int]:
    """(states with neither version, states that lost what was promised)."""
    found = list(states(operations, BEFORE, random.Random(0), per_step=40))
    unusable = sum(state.files.get("/d/file") not in (OLD, NEW) for state in found)
    lost = sum(bool(state.marks) and state.files.get("/d/file") != NEW for state in found)
    return unusable, lost


@pytest.mark.parametrize(
    ("operations", "unusable", "lost"),
    [(IN_PLACE, True, False), (NO_FSYNC, True, True), (NO_FOLDER, False, True), (RIGHT, False, False)],
    ids=["in place", "renamed without fsync", "folder not synced", "all synced"],
)
def test_only_the_right_order_of_syncs_survives(operations: list[Operation], unusable: bool, lost: bool) -> None:
    found = outcomes(operations)
    assert (found[0] > 0, found[1] > 0) == (unusable, lost)


def escaped(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def test_a_trace_is_read_with_offsets_renames_and_interrupted_calls(tmp_path: Path) -> None:
    root, tmp, final = str(tmp_path), str(tmp_path / "tmp"), str(tmp_path / "final")
    trace = [
        f'7 openat(AT_FDCWD<{escaped("/")}>, "{escaped(tmp)}", O_WRONLY|O_CREAT, 0666) = 5<{escaped(tmp)}>',
        f'7 write(5<{escaped(tmp)}>, "{escaped("ab")}", 2) = 2',
        f'8 write(5<{escaped(tmp)}>, "{escaped("cd")}", 2 <unfinished ...>',
        f'7 openat(AT_FDCWD<{escaped("/")}>, "{escaped("/elsewhere")}", O_RDONLY) = -1 ENOENT (No such file or directory)',
        "8 <... write resumed>) = 2",
        f'7 pwrite64(5<{escaped(tmp)}>, "{escaped("X")}", 1, 0) = 1',
        f"7 fsync(5<{escaped(tmp)}>) = 0",
        f'7 rename("{escaped(tmp)}", "{escaped(final)}") = 0',
        f"7 fsync(6<{escaped(root)}>) = 0",
        f'7 write(1<{escaped("/out")}>, "{escaped("ACK done")}", 9) = 9',
    ]
    operations, disk = parse(trace, tmp_path, [])
    *_, last = states(operations, disk, random.Random(0))
    assert last.files == {final: b"Xbcd"}
    assert last.marks == ("done",)


def test_a_call_without_a_rule_is_an_error_not_a_gap(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    trace = [
        f'7 openat(AT_FDCWD<{escaped("/")}>, "{escaped(path)}", O_WRONLY|O_CREAT, 0666) = 5<{escaped(path)}>',
        f"7 fallocate(5<{escaped(path)}>, 0, 0, 100) = 0",
    ]
    with pytest.raises(Unknown, match="fallocate"):
        parse(trace, tmp_path, [])
