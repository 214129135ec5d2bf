"""The command: what it prints, what it returns, and that no secret is ever in it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from doctor_nodes import CANARY, NODE, make_node

import tierline
from sync.credentials import new_key, private_pem, write_pair
from sync.doctor.check import Finding, Result
from sync.doctor.render import as_json, as_text, from_json
from tierline import DOCTORS

OFFLINE = ("--only", "config", "--only", "disk", "--only", "store", "--only", "identity", "--only", "trust")


def run(*arguments: str) -> int:
    return tierline.main(["doctor", *arguments])


def test_a_report_is_aligned_and_its_exit_code_says_whether_something_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = make_node(tmp_path)
    assert run("--config", str(node.path), "--only", "config", "--only", "disk") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{NODE}  (edge, tierline ")
    assert "\x1b" not in "".join(shown)
    columns = {line.index(line.split()[2], 8 + len(line.split()[1])) for line in shown if line.startswith("  ok ")}
    assert len(columns) == 1
    (tmp_path / "token").chmod(0o640)
    assert run("--config", str(node.path), "--only", "identity.key") == 1
    assert "  FAIL  key  node.credential: " in capsys.readouterr().out


def test_a_warning_fails_with_strict_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = make_node(tmp_path)
    monkeypatch.setenv("https_proxy", "http://proxy.example:1")
    only = ("--config", str(node.path), "--only", "machine.proxies")
    assert run(*only) == 0
    assert run(*only, "--strict") == 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('[node]\nid = "acme.edge-1"\ntier = "edge"\n', "broker"),
        (
            '[node]\nid = "No Node"\ntier = "edge"\nbroker = "mqtt://127.0.0.1"\nroot = "r"\ndata = "d"\ncredential = "c"',
            "node id",
        ),
        ("[node\n", "line"),
        ('[node]\ntier = "edge"\nwhat = 1\n', "what"),
    ],
)
def test_a_broken_configuration_is_a_finding_and_the_machine_is_checked_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, named: str
) -> None:
    (tmp_path / "node.toml").write_text(content)
    assert run("--config", str(tmp_path / "node.toml"), "--json") == 1
    report = json.loads(capsys.readouterr().out)
    checks = {entry["name"]: entry for entry in report["checks"]}
    assert checks["config.reads"]["status"] == "fail"
    assert named in checks["config.reads"]["found"]
    assert checks["machine.python"]["status"] == "ok"
    assert checks["edge.engines"]["status"] == "ok"
    assert {
        entry["status"] for entry in report["checks"] if entry["name"].startswith(("trust", "broker", "network"))
    } == {"skip"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config", "no-such.toml"), "no-such.toml: no such file"),
        (("--hub-data", "no-such-folder"), "no such folder"),
        (("--config", "a", "--hub-data", "b"), "say one of the two"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert run(*arguments) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_a_check_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", str(make_node(tmp_path).path), "--only", "tea") == 2
    assert "no check 'tea'; groups are config, machine" in capsys.readouterr().err


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """Secrets wherever a node may have them; their list."""
    node = make_node(folder)
    secrets = [
        CANARY,
        "canary-proxy-81c2",
        "canary-env-77aa1",
        "canary-label-5512",
        "canary-url-0f0f",
        "canary-log-31337",
    ]
    monkeypatch.setenv("TIERLINE_TOKEN", secrets[2])
    monkeypatch.setenv("https_proxy", f"http://user:{secrets[4]}@proxy.example:1")
    assert node.path is not None
    text = node.path.read_text()
    text += f'proxy = "http://user:{secrets[1]}@127.0.0.1:1"\n[node.labels]\napi_token = "{secrets[3]}"\n'
    node.path.write_text(text)
    key = new_key()
    write_pair(folder / "identity", key, "no certificate", "no bundle")
    secrets += [line for line in private_pem(key).decode().splitlines() if "-----" not in line]
    log = folder / "edge.log"
    body = "\n".join(private_pem(key).decode().splitlines())
    log.write_text(
        f"connecting with password={secrets[5]}\nkey was {CANARY}\n{body}\nAuthorization: Bearer {secrets[5]}\nall is well\n"
    )
    return node.path, secrets


def test_no_secret_is_printed_whatever_form_the_report_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, secrets = plant(tmp_path, monkeypatch)
    # A token pasted where its file should be named, and a broker with a password in its URL.
    pasted = tmp_path / "pasted.toml"
    pasted.write_text(path.read_text().replace('credential = "token"', f'credential = "{CANARY}"'))
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(path.read_text().replace("mqtt://127.0.0.1:1", f"mqtt://user:{secrets[4]}@127.0.0.1:1"))
    for config in (path, pasted, wrong):
        for extra in ((), ("--json",)):
            run("--config", str(config), "--only", "machine", *OFFLINE, "--only", "network", *extra)
    shown = capsys.readouterr()
    assert "config" in shown.out
    for secret in secrets:
        assert secret not in shown.out + shown.err


def test_a_support_bundle_tells_what_is_needed_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, secrets = plant(tmp_path, monkeypatch)
    out = tmp_path / "bundle.tar.gz"
    arguments = [
        "support-bundle",
        "--config",
        str(path),
        "-o",
        str(out),
        "--log",
        str(tmp_path / "edge.log"),
        "--bodies",
    ]
    assert tierline.main(arguments) == 0
    assert out.stat().st_mode & 0o777 == 0o600
    with tarfile.open(out) as archive:
        files = {member.name: archive.extractfile(member).read().decode() for member in archive}  # type: ignore[union-attr]
    everything = "\n".join(files.values()) + capsys.readouterr().out
    for secret in secrets:
        assert secret not in everything
    names = {name.partition("/")[2] for name in files}
    assert names >= {
        "doctor.json",
        "versions.json",
        "config.json",
        "documents.json",
        "ledger.json",
        "store.json",
        "logs/0-edge.log",
    }
    config = json.loads(files["bundle/config.json"])
    assert config["node"]["id"] == NODE
    assert config["node"]["credential"] == "[left out: str]"
    assert secrets[3] not in str(config["node"]["labels"])
    assert json.loads(files["bundle/documents.json"])[0]["revision"] == 3
    assert "all is well" in files["bundle/logs/0-edge.log"]
    assert tierline.main(arguments) == 1, "an existing file is not overwritten"


def test_a_bundle_leaves_out_bodies_unless_asked_and_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sync.doctor import bundle

    node = make_node(tmp_path)
    (tmp_path / "big.log").write_text("".join(f"line {n} {'x' * 90}\n" for n in range(20_000)))
    monkeypatch.setattr(bundle, "MAX_BUNDLE", 100_000)
    out = tmp_path / "b.tar.gz"
    arguments = ["--config", str(node.path), "-o", str(out), "--lines", "1500", "--log", str(tmp_path / "big.log")]
    assert bundle.support_bundle(arguments, DOCTORS) == 0
    with tarfile.open(out) as archive:
        files = {member.name.partition("/")[2]: archive.extractfile(member) for member in archive}
    assert "logs/0-big.log" not in files
    assert "left out: logs/0-big.log" in capsys.readouterr().out
    documents = files["documents.json"]
    assert isinstance(documents, io.BufferedReader)
    text = bundle.tail(tmp_path / "big.log", 3)
    assert [line.split()[1] for line in text.splitlines()] == ["19997", "19998", "19999"]


def test_a_report_survives_the_way_from_a_node_without_its_control_characters() -> None:
    results = [Result("disk.room", Finding("fail", "\x1b[2Jfull", "make room"), 0.5)]
    there = from_json(as_json({"about": "x"}, results))
    assert there[0].finding == Finding("fail", " [2Jfull", "make room")


def test_colours_come_only_when_they_are_asked_for() -> None:
    results = [Result("a.b", Finding("fail", "found", "fix it"), 0.0)]
    assert "\x1b[1;31mFAIL\x1b[0m" in as_text("x", results, colour=True)
    assert "\x1b" not in as_text("x", results)
