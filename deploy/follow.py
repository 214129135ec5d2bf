"""Keeps a broker at what the hub says: who may come in, who may not any more, and the broker's own certificate."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import urllib3

from deploy.broker import Broker
from deploy.local import HubApi
from deploy.processes import DeployError

REFRESH_SECONDS = 2.0
"""How often the hub is asked whom it knows: a node that was just added waits at most this long."""
LOCAL_NAMES = ("localhost", "127.0.0.1")
"""The hub beside the broker comes this way."""


class Follower:
    """A hub that is away changes nothing; what keeps it from answering is said once."""

    def __init__(self, broker: Broker, hub: str, token_file: Path, ca: Path | None = None) -> None:
        self._broker = broker
        self._hub = hub
        self._token_file = token_file
        self._ca = ca
        self._told = ""
        self._version = ""
        self._bundle = ""
        self._renew_at = 0.0

    def wait_for_certificate(self) -> None:
        """A broker for nodes does not start without the hub's word: it would let in who was revoked meanwhile."""
        while not self.turn():
            time.sleep(REFRESH_SECONDS)

    def follow(self) -> None:
        """Until the broker ends."""
        while self._broker.alive:
            self.turn()
            time.sleep(REFRESH_SECONDS)

    def turn(self) -> bool:
        """Ask once. False when the hub did not answer as it should."""
        try:
            self._ask()
            trouble = ""
        except FileNotFoundError as error:
            trouble = f"{error.filename} is not there yet"
        except (OSError, ValueError, KeyError, urllib3.exceptions.HTTPError, DeployError) as error:
            trouble = str(error)
        if bool(trouble) != bool(self._told):
            print(f"waiting for the hub: {trouble}" if trouble else "letting in whom the hub knows", flush=True)
        self._told = trouble
        return not trouble

    def _ask(self) -> None:
        with closing(HubApi(self._hub, self._token_file.read_text().strip(), self._ca)) as api:
            self._do(api)

    def _do(self, api: HubApi) -> None:
        # What it works by now is told: then the hub ends the connections of those who were revoked meanwhile.
        access = api.call("GET", f"/api/v1/broker/access?have={self._version}")
        # First of all, whatever becomes of the certificate: who was revoked must be kept out.
        self._broker.admit(access["passwords"], access["acl"], access["revocations"], access["version"])
        self._version = access["version"]
        secure = self._broker.secure
        if secure is not None and (access["bundle"] != self._bundle or time.time() > self._renew_at):
            body = {"csr": self._broker.request(), "names": [*secure.names, *LOCAL_NAMES]}
            made = api.call("POST", "/api/v1/broker/certificate", body)
            self._broker.install(made["certificate"], made["bundle"])
            self._renew_at = time.time() + (made["not_after"] - time.time()) / 2
            self._bundle = access["bundle"]
