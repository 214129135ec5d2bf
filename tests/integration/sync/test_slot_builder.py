"""A slot is made of the verified wheels and nothing else: by pip, offline, by hash, and tried before it counts."""

from __future__ import annotations

import base64
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import pytest

from sync import slot_builder
from sync.errors import Rejected, Unavailable
from sync.slot_builder import SlotBuilder
from sync.slots import Slots
from sync.software import Software, Wheel

MODULE = """
import sys
if sys.argv[1:] == ["--version"]:
    print("tierline {version}")
elif sys.argv[1:] == ["fail"]:
    sys.exit("this version cannot read the configuration")
elif sys.argv[1:] == ["hang"]:
    import time; time.sleep(60)
elif sys.argv[1:] == ["borrow"]:
    import msgspec
"""


def make_wheel(folder: Path, version: str = "9.0", needs: str = "") -> Path:
    """A wheel as the binary distribution format (PyPA) has it: two files of metadata and a list of hashes."""
    path = folder / f"tierline-{version}-py3-none-any.whl"
    info = f"tierline-{version}.dist-info"
    files = {
        "tierline.py": MODULE.format(version=version),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tierline\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n"
        for name, text in files.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(name, text)
    return path


def of(path: Path, version: str = "9.0") -> tuple[Software, Mapping[str, Path]]:
    digest = f"sha256:{sha256(path.read_bytes()).hexdigest()}"
    return Software(version, (Wheel(path.name, digest, path.stat().st_size),)), {digest: path}


def builder(folder: Path, *probe: str, inherit: bool = False) -> SlotBuilder:
    return SlotBuilder(Slots(folder / "slots"), sys.executable, inherit=inherit, probe=probe or ("--version",))


def said(python: str, *arguments: str) -> str:
    ran = subprocess.run([python, "-I", *arguments], capture_output=True, text=True, check=False, timeout=30)
    return ran.stdout + ran.stderr


async def test_a_slot_runs_its_own_version_and_sees_nothing_of_ours(tmp_path: Path) -> None:
    making = builder(tmp_path)
    slot = await making.build("a", *of(make_wheel(tmp_path)))
    python = str(making.slots.python(slot))
    assert (slot.name, slot.version) == ("a", "9.0")
    assert "No module named 'msgspec'" in said(python, "-c", "import tierline, msgspec")
    assert not (making.slots.root / "wheels").exists()


async def test_a_slot_may_borrow_dependencies_but_never_the_software_itself(tmp_path: Path) -> None:
    making = builder(tmp_path, "borrow", inherit=True)
    slot = await making.build("b", *of(make_wheel(tmp_path)))
    assert said(str(making.slots.python(slot)), "-m", "tierline", "--version") == "tierline 9.0\n"


async def test_bytes_that_are_not_those_that_were_named_are_not_installed(tmp_path: Path) -> None:
    software, _ = of(make_wheel(tmp_path))
    (tmp_path / "other").mkdir()
    other = make_wheel(tmp_path / "other", needs="Summary: not this one\n")
    with pytest.raises(Rejected, match=r"installing failed(?s:.*)Expected sha256"):
        await builder(tmp_path).build("a", software, {software.wheels[0].digest: other})


async def test_nothing_is_fetched_that_was_not_named(tmp_path: Path) -> None:
    """A dependency that is not there is not looked for anywhere: the trial of the slot finds it missing."""
    path = make_wheel(tmp_path, needs="Requires-Dist: msgspec\n")
    with pytest.raises(Rejected, match=r"trying it failed(?s:.*)msgspec"):
        await builder(tmp_path, "borrow").build("a", *of(path))


@pytest.mark.parametrize(
    ("probe", "words"),
    [("fail", "this version cannot read the configuration"), ("borrow", "No module named 'msgspec'")],
)
async def test_a_version_that_fails_its_trial_is_refused_with_its_last_words(
    tmp_path: Path, probe: str, words: str
) -> None:
    with pytest.raises(Rejected, match=words):
        await builder(tmp_path, probe).build("a", *of(make_wheel(tmp_path)))


async def test_a_wheel_that_is_another_version_than_announced_is_refused(tmp_path: Path) -> None:
    software, blobs = of(make_wheel(tmp_path))
    with pytest.raises(Rejected, match=r"it says it is 'tierline 9\.0.*9\.1 was announced"):
        await builder(tmp_path).build("a", Software("9.1", software.wheels), blobs)


async def test_a_trial_that_hangs_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_builder, "PROBE_SECONDS", 2.0)
    with pytest.raises(Unavailable, match="trying it was not over within 2 s"):
        await builder(tmp_path, "hang").build("a", *of(make_wheel(tmp_path)))


async def test_what_was_left_in_a_slot_is_gone_from_the_next_one(tmp_path: Path) -> None:
    making = builder(tmp_path)
    leftover = making.slots.folder("a") / "lib" / "leftover.py"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("")
    await making.build("a", *of(make_wheel(tmp_path)))
    assert not leftover.exists()
