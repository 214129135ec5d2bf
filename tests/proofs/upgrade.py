"""A real edge node replaces its own software: two wheels of this project, a real hub, a real broker, the real launcher.

    python tests/proofs/upgrade.py

0.1.0 is what is installed here. The node is upgraded to a good version over the hub's document, proves it, and is upgraded
to one that ends at once, which the launcher takes back; then to one whose slot cannot even be tried, which is refused before
anything is switched. Meanwhile a model is served. Ends with 0 when all of that is so.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploy.local import Cluster, cluster
from deploy.processes import Process, tierline, wait_until
from models.zoo import digits

ROOT = Path(__file__).parents[2]
PACKAGES = ("cloud_hub", "edge_node", "device_agent", "sync", "models", "deploy")
GOOD, CRASHING, BROKEN = "0.1.1", "0.1.2", "0.1.3"
CRASH = "raise SystemExit(3)  # a version that does not hold\n"
STEP_SECONDS = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        found = prove(Path(scratch))
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:<40} {value}")
    return 0


def prove(scratch: Path) -> dict[str, Any]:
    wheels = {version: build(scratch, version) for version in (GOOD, CRASHING, BROKEN)}
    found: dict[str, Any] = {}
    with cluster(scratch / "site") as site:
        site.start_broker()
        site.start_hub()
        site.publish(digits.package_folder("edge"))
        site.deploy("digits", "edge", digits.MODEL, digits.PACKAGES["edge"], digits.VERSIONS[0])
        launched = start(site, scratch / "slots")
        until("0.1.0 serves", lambda: serves(site) and software(site), launched)
        found["installed"] = software(site)

        found["seconds to 0.1.1"] = to(site, scratch, wheels[GOOD], GOOD)
        until("0.1.1 is in force", lambda: software(site) == GOOD and standing(site)["state"] == "applied", launched)
        until("it still serves", lambda: serves(site), launched)
        found["upgraded to"] = software(site)

        to(site, scratch, wheels[CRASHING], CRASHING)
        until("0.1.2 was taken back", lambda: bool(standing(site)["error"]), launched)
        until("0.1.1 serves again", lambda: software(site) == GOOD and serves(site), launched)
        found["after 0.1.2"] = f"{software(site)}: {standing(site)['error']}"

        pid = edge_pid(site)
        to(site, scratch, wheels[BROKEN], BROKEN)
        assert "trying it failed" in standing(site)["error"], standing(site)
        assert edge_pid(site) == pid, "a version that could not be tried must not have ended the one that runs"
        found["after 0.1.3"] = f"{software(site)}: {standing(site)['error'][-160:]}"
    return found


# --- the wheels -----------------------------------------------------------------------------------------------------


def build(scratch: Path, version: str) -> Path:
    """A wheel of this tree under another version; built without network."""
    tree = scratch / f"tree-{version}"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=skip)
    for name in ("tierline.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    project = (ROOT / "pyproject.toml").read_text()
    (tree / "pyproject.toml").write_text(re.sub(r'^version = "[^"]+"', f'version = "{version}"', project, flags=re.M))
    node = tree / "edge_node" / "node.py"
    if version == CRASHING:
        # Its check succeeds; it ends when it is to run.
        text = node.read_text()
        marker = "    engines = available_engines()\n"
        assert marker in text
        node.write_text(text.replace(marker, f"    {CRASH}{marker}"))
    elif version == BROKEN:
        node.write_text("raise ImportError('half a version')\n")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(scratch / "wheels")]
    subprocess.run(command, cwd=tree, check=True, timeout=STEP_SECONDS)
    return next((scratch / "wheels").glob(f"tierline-{version}-*.whl"))


# --- the site -------------------------------------------------------------------------------------------------------


def start(site: Cluster, slots: Path) -> Process:
    """The edge node, through the launcher; quick to believe and quick to doubt."""
    config = site._configure("edge-1", "edge", site.urls["hub"])
    command = tierline("launch", "--slots", str(slots), "--inherit", "--trial-seconds", "60")
    command = [*command, "--healthy-seconds", "2", "edge", str(config), "--http-port", "0"]
    return site._start("edge-1", command)


def to(site: Cluster, scratch: Path, wheel: Path, version: str) -> float:
    """Publish and target a version with the commands an operator would use; seconds until the node runs or refuses it."""
    began = time.monotonic()
    common = ("--hub", site.urls["hub"], "--token-file", str(site.hub_data / "admin.token"))
    for arguments in (("publish-software", str(wheel)), ("upgrade", "edges", version, "--select", "tier=edge")):
        subprocess.run(tierline(*arguments, *common), check=True, timeout=STEP_SECONDS, stdout=subprocess.DEVNULL)
    wanted = standing(site)["revision"]
    wait_until(
        f"{version} was decided about",
        lambda: (
            standing(site)["reported"] == wanted and standing(site)["state"] in ("applied", "refused", "rolled_back")
        ),
        STEP_SECONDS,
        site.processes["edge-1"],
    )
    return round(time.monotonic() - began, 1)


def standing(site: Cluster) -> dict[str, Any]:
    nothing = {"revision": 0, "reported": 0, "error": None, "state": ""}
    entry: dict[str, Any] = site.node("edge-1")["documents"].get("software") or nothing
    return entry


def software(site: Cluster) -> str:
    return str((site.node("edge-1").get("capabilities") or {}).get("software", ""))


def serves(site: Cluster) -> bool:
    return site.node("edge-1")["running"] == {digits.MODEL: f"{digits.PACKAGES['edge']}/{digits.VERSIONS[0]}"}


def edge_pid(site: Cluster) -> int:
    return int(json.loads((site.folder / "edge-1" / "edge.json").read_text())["pid"])


def until(what: str, check: Callable[[], object], process: Process) -> None:
    wait_until(what, lambda: bool(check()), STEP_SECONDS, process)


if __name__ == "__main__":
    raise SystemExit(main())
