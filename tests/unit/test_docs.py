"""What the documents show must be true of the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import tierline
from device_agent import load_agent_config
from edge_node.config import load_edge_config

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/**/*.md")])
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_readme_compiles(code: str) -> None:
    compile(code, "README.md", "exec")


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
