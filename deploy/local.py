"""All roles as processes on this machine, on ports the system chose: broker, hub, cloud worker, edge node, device agent.

Nothing here knows how a role works. It writes the configuration an operator would write, starts the command an operator
would start, and speaks to the hub over its management API.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3

from deploy.broker import Broker
from deploy.processes import DeployError, Process, announced, tierline, wait_until

TENANT = "demo"
API_TIMEOUT_SECONDS = 30.0
MODEL_TIMEOUT_SECONDS = 60.0  # fetched, tried in a child, loaded and warmed


class HubApi:
    """The management API, as any script would call it."""

    def __init__(self, url: str, token: str, ca: Path | None = None) -> None:
        """`ca`: PEM of whom an https hub is trusted by, None = the machine's own trust."""
        self.url = url
        self._token = token
        self._http = urllib3.PoolManager(
            retries=False, timeout=API_TIMEOUT_SECONDS, ca_certs=str(ca) if ca is not None else None
        )

    def close(self) -> None:
        """Close idle connections."""
        self._http.clear()

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One call, JSON both ways. Raises DeployError with the API's own words when it refuses."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self._token}", "content-type": "application/json"}
        answer = self._http.request(method, self.url + path, body=data, headers=headers)
        if answer.status >= 300:
            raise DeployError(f"{method} {path}: {answer.status} {answer.data.decode(errors='replace')[:500]}")
        return json.loads(answer.data) if answer.data else None


class Cluster:
    """One deployment in one folder. Start what you need in order; `stop` ends everything that was started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.broker = Broker(folder / "broker")
        self.processes: dict[str, Process] = {}
        self.urls: dict[str, str] = {}
        self._configs: dict[str, Path] = {}
        self._api: HubApi | None = None

    @property
    def api(self) -> HubApi:
        if self._api is None:
            raise DeployError("the hub was not started")
        return self._api

    @property
    def hub_data(self) -> Path:
        return self.folder / "hub"

    def start_broker(self) -> None:
        self.broker.start()

    def start_hub(self) -> None:
        port = _port_of(self.urls.get("hub"))
        process = self._start(
            "hub",
            tierline(
                *("hub", "--data", str(self.hub_data), "--http-port", str(port), "--broker", self.broker.url),
                *("--broker-password-file", str(self.broker.hub_password)),
            ),
        )
        self.urls["hub"] = str(announced(process, self.hub_data / "hub.json")["url"])
        self._api = HubApi(self.urls["hub"], (self.hub_data / "admin.token").read_text().strip())

    def start_worker(self, name: str = "cloud-1") -> None:
        self._start_node(name, "cloud", "worker", self.urls["hub"])

    def start_edge(self, name: str = "edge-1", up: str = "cloud-1", env: Mapping[str, str] | None = None) -> None:
        self._start_node(name, "edge", "edge", self.urls["hub"], ("[up]", f'url = "{self.urls[up]}"'), env)

    def start_device(self, name: str = "device-1", edge: str = "edge-1") -> Process:
        return self._start(name, tierline("device", str(self.configure_device(name, edge))), talk=True)

    def configure_device(self, name: str, edge: str = "edge-1") -> Path:
        """Make a device known and write its configuration; its files come from the edge node."""
        return self._configure(name, "device", self.urls[edge], top=(f'edge = "{self.urls[edge]}"',))

    def _start_node(
        self,
        name: str,
        tier: str,
        command: str,
        source: str,
        tables: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start a serving node. Started again, it comes back on the port its neighbours know."""
        config = self._configure(name, tier, source, tables=tables)
        port = _port_of(self.urls.get(name))
        process = self._start(name, tierline(command, str(config), "--http-port", str(port)), env=env)
        self.urls[name] = str(announced(process, self.folder / name / f"{command}.json")["url"])

    def _configure(
        self, name: str, tier: str, source: str, *, top: Sequence[str] = (), tables: Sequence[str] = ()
    ) -> Path:
        """Make the node known to hub and broker and write its configuration; once."""
        if name in self._configs:
            return self._configs[name]
        node_id = f"{TENANT}.{name}"
        made = self.api.call("POST", "/api/v1/nodes", {"id": node_id, "tier": tier, "labels": {}})
        access = self.api.call("GET", "/api/v1/broker/access")
        self.broker.admit(access["passwords"], access["acl"])
        folder = self.folder / name
        folder.mkdir()
        _write_secret(folder / "token", made["token"])
        (folder / "root.json").write_bytes((self.hub_data / "root.json").read_bytes())
        node = [
            "[node]",
            f'id = "{node_id}"',
            f'tier = "{tier}"',
            f'broker = "{self.broker.url}"',
            f'sources = ["{source}"]',
            'root = "root.json"',
            'credential = "token"',
            'data = "."',
        ]
        path = folder / "node.toml"
        path.write_text("\n".join([*top, *node, *tables]) + "\n")
        self._configs[name] = path
        return path

    def _start(
        self, name: str, command: Sequence[str], *, talk: bool = False, env: Mapping[str, str] | None = None
    ) -> Process:
        process = Process(name, command, self.logs / f"{name}.log", talk=talk, env=env)
        self.processes[name] = process
        return process

    def publish(self, folder: Path) -> None:
        """Publish a package folder with the command a publisher would use."""
        arguments = ("--hub", self.urls["hub"], "--token-file", str(self.hub_data / "admin.token"))
        process = Process("publish", tierline("publish", str(folder), *arguments), self.logs / "publish.log")
        wait_until(f"{folder.name} is published", lambda: not process.alive, API_TIMEOUT_SECONDS)
        code = process.returncode
        process.stop()
        if code:
            raise DeployError(f"publishing {folder} failed\n{process.tail()}")

    def deploy(self, name: str, tier: str, model: str, package: str, version: str) -> None:
        """Say that every node of `tier` should answer `model` with `package/version`."""
        body = {
            "tenant": TENANT,
            "selector": {"tier": tier},
            "models": {model: f"{package}/{version}"},
        }
        self.api.call("PUT", f"/api/v1/deployments/{name}", body)

    def wait_for_model(self, name: str, model: str, timeout: float = MODEL_TIMEOUT_SECONDS) -> None:
        """Wait until the node answers `model`: starting it returns as soon as it listens, models come by themselves."""
        url = f"{self.urls[name]}/v2/models/{model}/ready"

        def ready() -> bool:
            try:
                return urllib3.request("GET", url, retries=False, timeout=API_TIMEOUT_SECONDS).status == 200
            except urllib3.exceptions.HTTPError:
                return False

        wait_until(f"{name} answers {model}", ready, timeout, self.processes[name])

    def node(self, name: str) -> Mapping[str, Any]:
        """What the hub knows of a node."""
        found: Mapping[str, Any] = self.api.call("GET", f"/api/v1/nodes/{TENANT}.{name}")
        return found

    def stop(self) -> None:
        """End everything, last started first. One that resists does not save the others."""
        with ExitStack() as everything:
            everything.callback(self.broker.stop)
            for process in self.processes.values():
                everything.callback(process.stop)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that is stopped on leaving the block, whatever happened in it."""
    deployment = Cluster(folder)
    try:
        yield deployment
    finally:
        deployment.stop()


def _port_of(url: str | None) -> int:
    return (urlsplit(url).port or 0) if url else 0


def _write_secret(path: Path, secret: str) -> None:
    path.touch(mode=0o600)
    path.write_text(secret)
