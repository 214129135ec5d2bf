"""Configuration of a device agent: one TOML file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from models.serving.remote import check_url
from sync.blocks import BlockSettings
from sync.errors import InvalidConfig
from sync.identity import Membership, load_config
from sync.quota import Quota
from sync.settings import Settings


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[node]` who it is and whom it trusts. `edge`: base URL of the edge node to escalate to, None = answer alone.

    `threads`: engine threads for models too slow for the event loop (0.2 ms). Default 1: the device belongs to the
    application. `[updates]`: when and how it updates, as far as the hub's settings say nothing else.
    `[store]`: how much disk its files may take. `[blocks]`: files over MQTT when nothing else delivers them.
    """

    node: Membership
    edge: str | None = None
    threads: int = 1
    updates: Settings = Settings()
    store: Quota = Quota()
    blocks: BlockSettings = BlockSettings()

    def __post_init__(self) -> None:
        if self.edge is not None:
            check_url(self.edge)
        if self.threads < 1:
            raise ValueError(f"threads {self.threads} is not 1 or more")


def load_agent_config(path: Path) -> AgentConfig:
    """Read and check. Raises InvalidConfig naming the file and the field."""
    config = load_config(path, AgentConfig)
    if config.node.tier != "device":
        raise InvalidConfig(f"{path}: node.tier is {config.node.tier!r}, a device agent's is 'device'")
    return config
