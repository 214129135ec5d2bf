"""What the documents show must be true of the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import tierline
from device_agent import load_agent_config
from edge_node.config import load_edge_config
from models.serving.access.settings import Client, Settings, Tenant, decode_settings
from models.serving.model_settings import ModelSettings, read_settings
from models.serving.websocket.session import _ACTS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/**/*.md")])
README = (ROOT / "README.md").read_text()
SERVING = (ROOT / "docs" / "serving.md").read_text()
ACCESS = (ROOT / "docs" / "access.md").read_text()
SUBCOMMANDS = (
    r"(?:hub|edge|device|worker) (?=(?:enrol|revoke|decommission|denied|authority|settings|deployments|join|leave)\b)"
    r"|keys (?=(?:init|status|rotate|renew-root|sign|install|revoke|reissue|export-root)\b)"
    r"|bundle (?=(?:export|import)\b)"
)


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        tierline.main([*command.split(), "--help"])
    return capsys.readouterr().out


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_the_pages_compiles(page: Path) -> None:
    for code in blocks("python", page.read_text()):
        compile(code, str(page), "exec")


def test_the_readmes_node_configuration_is_accepted(tmp_path: Path) -> None:
    text, _ = blocks("toml")
    path = tmp_path / "edge.toml"
    path.write_text(text)
    assert load_edge_config(path).node.id == "acme.gateway-1"
    path.write_text(re.sub(r"^# (\[up\]|url)", r"\1", text, flags=re.MULTILINE))
    assert load_edge_config(path).up is not None


def test_the_readmes_device_configuration_is_accepted(tmp_path: Path) -> None:
    _, text = blocks("toml")
    path = tmp_path / "agent.toml"
    path.write_text(text)
    assert load_agent_config(path).node.id == "acme.phone-1"


def test_every_command_the_readme_names_exists() -> None:
    named = set(re.findall(r"(?:^|`|; )tierline ([a-z-]+)", README, re.MULTILINE))
    assert {"broker", "hub", "publish", "deploy", "node-add", "edge", "serve", "nodes"} <= named
    assert named <= set(tierline.COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_dependency_says_what_it_weighs() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    project = tomllib.loads("\n".join(lines))["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    for dependency in wanted:
        if not dependency.startswith("tierline["):
            stated = [line for line in lines if line.strip().startswith(f'"{dependency}"')]
            assert stated
            assert all(re.search(r"# +[\d.]+", line) for line in stated), stated


def test_constraints_are_exact_versions_without_addresses() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line), line


def test_the_six_files_that_show_the_main_flow_exist() -> None:
    walk = (ROOT / "docs" / "architecture.md").read_text()
    for name in (
        "models/serving/predictor.py",
        "edge_node/node.py",
        "sync/messages.py",
        "sync/updater.py",
        "cloud_hub/rollout.py",
    ):
        assert name in walk
        assert (ROOT / name).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_a_page_gives_a_command_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, rest in re.findall(
        rf"(?:^|`|\()tierline ((?:token |model |{SUBCOMMANDS})?[a-z-]+)([^`|#\n]*)", page.read_text(), re.MULTILINE
    ):
        if command in tierline.COMMANDS or " " in command:
            assert options_in(rest) <= options_in(help_of(command, capsys)), f"tierline {command}{rest}"


def test_every_test_that_a_page_names_as_a_proof_exists() -> None:
    written = "\n".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    known = set(re.findall(r"def (test_\w+)", written))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert named
    assert not named - known


def test_every_attack_the_security_page_names_is_in_the_table() -> None:
    page = (ROOT / "docs" / "security.md").read_text().split("## Updates")[1].split("## Identity")[0]
    table = (ROOT / "tests" / "integration" / "sync" / "test_update_attacks.py").read_text()
    rows = set(re.findall(r'^    "([^"]+)": \(', table, re.MULTILINE))
    lines = [line.rpartition(" | ")[2] for line in page.splitlines() if line.startswith("|")]
    quoted = [name for line in lines for name in re.findall(r"`([^`]+)`", line)]
    for name in (name for name in quoted if not name.startswith(("test_", "make "))):
        assert any(row.startswith(name.removesuffix("...").strip()) for row in rows), name


def test_every_option_of_serve_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert options_in(help_of("serve", capsys)) - {"--help"} <= options_in(SERVING + ACCESS)


def test_options_named_alone_belong_to_the_commands_of_their_page(capsys: pytest.CaptureFixture[str]) -> None:
    serve = options_in(help_of("serve", capsys))
    issue = options_in(help_of("token issue", capsys))
    assert options_in(" ".join(re.findall(r"`(--[^`]*)`", SERVING))) <= serve | options_in(
        help_of("model profile", capsys)
    )
    assert options_in(" ".join(re.findall(r"`(--[^`]*)`", ACCESS))) <= serve | issue
    assert issue - {"--help"} <= options_in(ACCESS)


def test_the_settings_of_a_model_are_shown_whole_and_accepted(tmp_path: Path) -> None:
    (shown,) = blocks("toml", SERVING)
    path = tmp_path / "model.toml"
    path.write_text(shown)
    assert set(tomllib.loads(shown)) == set(ModelSettings.__struct_fields__)
    assert read_settings(path) != ModelSettings()


def test_access_files_are_accepted_and_every_field_is_explained() -> None:
    for shown in blocks("toml", ACCESS):
        assert decode_settings(shown.encode()).tenants
    explained = set(re.findall(r"`\[?([a-z_]+)", " ".join(re.findall(r"^\| (`.*?) \|", ACCESS, re.MULTILINE))))
    assert {name for kind in (Settings, Tenant, Client) for name in kind.__struct_fields__} <= explained


def test_every_message_of_a_session_is_explained() -> None:
    assert {"infer", *_ACTS} == set(re.findall(r"^\| `(\w+)` with ", SERVING, re.MULTILINE))


def test_every_reason_against_batching_is_one_that_the_code_gives() -> None:
    code = "".join((ROOT / "models" / "serving" / name).read_text() for name in ("batching.py", "loaded.py"))
    table = SERVING.partition("| `off`, because |")[2].partition("\n\n")[0]
    reasons = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert len(reasons) == 9
    for reason in reasons:
        assert re.sub(r"^\d+ .*: |^input 'x' ", "", reason) in code, reason


def test_every_make_target_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name for page in PAGES for name in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "test", "bench"} <= named <= targets
