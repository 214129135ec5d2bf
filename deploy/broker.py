"""The MQTT broker: mosquitto when it is found, else amqtt on loopback for evaluation. Configuration generated.

Access list and password hashes come from the hub (`/api/v1/broker/access`) and are reread without a restart when a node is
added. A system service on 1883 is never touched: ours has its own port and folder.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from deploy.processes import DeployError, Process, free_port, wait_until
from sync.credentials import new_key, private_pem, request
from sync.durable import write_whole
from sync.topics import HUB_USER, access_list

RECOMMENDED = (2, 0, 21)
"""Older versions work; this one ignores no receive-maximum and keeps keepalives on time."""
HASH_ROUNDS = 101
"""PBKDF2-SHA512 rounds as mosquitto_passwd writes them. The secrets are random 256-bit tokens: nothing to guess."""


def find_mosquitto() -> str | None:
    """Path of the broker. Debian puts it into /usr/sbin, which an ordinary user's PATH lacks."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def mosquitto_version(binary: str) -> tuple[int, ...]:
    """Version as numbers, () when it cannot be read."""
    shown = subprocess.run([binary, "-h"], capture_output=True, text=True, timeout=10, check=False).stdout
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", shown)
    return tuple(int(part) for part in found.groups()) if found else ()


MAX_CONNECTIONS = 20_000
"""Of one listener. A broker closes half-open connections late or never; a bound keeps them from taking every descriptor."""


def has_websockets(binary: str) -> bool:
    """Whether this mosquitto was built with them: not every distribution's is."""
    return b"libwebsockets" in Path(binary).read_bytes()


@dataclass(frozen=True, slots=True)
class Secure:
    """The listener for enrolled nodes: TLS 1.3, a certificate needed. `names`: by which nodes reach it. `websocket_port`:
    another one, for networks that let nothing but 443 out."""

    names: tuple[str, ...]
    port: int = 8883
    bind: str = "0.0.0.0"  # noqa: S104 - it asks everybody for a certificate
    websocket_port: int | None = None


class Broker:
    """One broker process. `kind` is `mosquitto` or `amqtt`; `note` says what a user should know about it.

    It listens on loopback with passwords, for the hub beside it and for evaluation, and where `secure` says with certificates.
    `hub_password`: file with the password of the hub's user, made at the first start. `port`: None = a free one.
    """

    def __init__(self, folder: Path, port: int | None = None, secure: Secure | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.resolve()
        self.hub_password = self._folder / "hub-password"
        self._admitted: tuple[str, ...] | None = None
        self.secure = secure
        self._process: Process | None = None
        self.port = port or free_port()
        self.binary = find_mosquitto()
        self.kind = "mosquitto" if self.binary else "amqtt"
        self.note = self._note()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Raises DeployError when it does not come up, or when neither broker is installed. Only the hub may connect yet."""
        if self._accepts():
            raise DeployError(f"something else listens on port {self.port}")
        if not self.hub_password.exists():
            write_whole(self.hub_password, secrets.token_urlsafe(32).encode())
        if self._admitted is None:
            self.admit(f"{HUB_USER}:{_hash(self.hub_password.read_text())}\n", access_list(()))
        if self.secure is not None:
            self._check_secure(self.secure)
        command = self._mosquitto() if self.binary else self._amqtt()
        self._process = Process("broker", command, self._folder / "broker.log")
        wait_until(f"{self.kind} accepts connections", self._accepts, 30.0, self._process)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.alive

    @property
    def pid(self) -> int:
        """Raises DeployError when it was not started."""
        if self._process is None:
            raise DeployError("the broker was not started")
        return self._process.pid

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        """At once, as by a power cut; `start` brings it back on the same port."""
        if self._process is not None:
            self._process.kill()

    def forget(self) -> None:
        """While it is down: lose every session and retained message, as a new machine would."""
        shutil.rmtree(self._folder / "data", ignore_errors=True)

    def request(self) -> str:
        """A certificate request, PEM. The key is made once and stays in the folder."""
        path = self._folder / "server.key"
        key: object = None
        with suppress(FileNotFoundError, ValueError, TypeError):
            key = load_pem_private_key(path.read_bytes(), None)
        if not isinstance(key, EllipticCurvePrivateKey):
            # None yet, or a damaged one: the certificate is asked for right after, so a new key costs nothing.
            key = new_key()
            write_whole(path, private_pem(key))
        return request(key, "broker")

    def install(self, certificate: str, bundle: str) -> None:
        """Show this certificate from the next connection on, and trust nodes whose certificates lead to `bundle`."""
        write_whole(self._folder / "server.crt", certificate.encode())
        write_whole(self._folder / "ca.pem", bundle.encode())
        self._reread()

    def admit(self, passwords: str, acl: str, revocations: str = "", version: str = "") -> None:
        """Let in exactly these users, with what the list entitles them to. Takes effect at once.

        The texts are what the hub's `/api/v1/broker/access` gives. `version` names them; without it they are compared.
        """
        told = (version,) if version else (passwords, acl, revocations)
        if told == self._admitted:
            return
        write_whole(self._folder / "acl", acl.encode())
        write_whole(self._folder / "passwords", passwords.encode())
        if revocations:
            write_whole(self._folder / "revoked.pem", revocations.encode())
        self._admitted = told
        self._reread()

    def _reread(self) -> None:
        if self.binary and self._process is not None:
            self._process.hang_up()

    def _note(self) -> str:
        if not self.binary:
            return "mosquitto was not found: amqtt stands in, without passwords or access list, for evaluation on loopback only"
        version = mosquitto_version(self.binary)
        shown = ".".join(map(str, version))
        if version and version < RECOMMENDED:
            return f"mosquitto {shown} ({'.'.join(map(str, RECOMMENDED))} or newer is recommended in production)"
        return f"mosquitto {shown}"

    def _accepts(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(0.2)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _mosquitto(self) -> list[str]:
        assert self.binary is not None
        data = self._folder / "data"
        data.mkdir(exist_ok=True)
        lines = [
            # Before the listeners: it says to whom the settings after each of them belong.
            *(["per_listener_settings true"] if self.secure is not None else []),
            f"listener {self.port} 127.0.0.1",
            f"password_file {self._folder / 'passwords'}",
            *self._rights(),
            *self._secure_lines(),
            "persistence true",
            f"persistence_location {data}/",
            # The default of 1800 s loses every retained message at a kill.
            "autosave_interval 5",
            "set_tcp_nodelay true",
            "max_packet_size 1048576",
            "max_keepalive 1200",
            # For each client, the hub among them: what a thousand nodes say at once, three messages each, must not be dropped.
            "max_queued_messages 20000",
            "max_queued_bytes 67108864",
            "persistent_client_expiration 7d",
            "log_dest stderr",
            "connection_messages true",
        ]
        if os.geteuid() == 0:
            # Started as root it would become a user who cannot write into our folder, and never save anything.
            lines.append(f"user {getpass.getuser()}")
        config = self._folder / "mosquitto.conf"
        config.write_text("\n".join(lines) + "\n")
        return [self.binary, "-c", str(config)]

    def _rights(self) -> list[str]:
        return [
            "allow_anonymous false",
            f"acl_file {self._folder / 'acl'}",
            # Without it one valid user could evict any other by its client id.
            "use_username_as_clientid true",
            "allow_zero_length_clientid false",
            f"max_connections {MAX_CONNECTIONS}",
        ]

    def _secure_lines(self) -> list[str]:
        secure = self.secure
        if secure is None:
            return []
        ports = [(secure.port, "mqtt")]
        if secure.websocket_port is not None:
            ports.append((secure.websocket_port, "websockets"))
        lines = []
        for port, protocol in ports:
            lines += [
                f"listener {port} {secure.bind}",
                f"protocol {protocol}",
                f"cafile {self._folder / 'ca.pem'}",
                f"certfile {self._folder / 'server.crt'}",
                f"keyfile {self._folder / 'server.key'}",
                f"crlfile {self._folder / 'revoked.pem'}",
                "tls_version tlsv1.3",
                "require_certificate true",
                "use_identity_as_username true",
                *self._rights(),
            ]
        return lines

    def _check_secure(self, secure: Secure) -> None:
        if self.binary is None:
            raise DeployError("amqtt cannot ask for certificates: install mosquitto (apt-get install mosquitto)")
        if secure.websocket_port is not None and not has_websockets(self.binary):
            raise DeployError(
                f"{self.binary} was built without WebSockets: put a TLS proxy that speaks them in front, or use another build"
            )
        for name in ("server.crt", "ca.pem", "revoked.pem"):
            if not (self._folder / name).exists():
                raise DeployError(f"{self._folder / name} is missing: the hub gives it")

    def _amqtt(self) -> list[str]:
        if importlib.util.find_spec("amqtt") is None:
            raise DeployError(
                "no MQTT broker: install mosquitto (apt-get install mosquitto) or pip install 'tierline[amqtt]'"
            )
        config = {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{self.port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
        path = self._folder / "amqtt.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        return [sys.executable, "-m", "amqtt.scripts.broker_script", "-c", str(path)]


def _hash(password: str) -> str:
    salt = os.urandom(12)
    derived = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, HASH_ROUNDS)
    return f"$7${HASH_ROUNDS}${base64.b64encode(salt).decode()}${base64.b64encode(derived).decode()}"
