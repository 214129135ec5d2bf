"""The table of every node, whatever its tier; a tier puts its own checks behind it."""

from __future__ import annotations

from sync.doctor.broker import BROKER
from sync.doctor.check import Check
from sync.doctor.disk import DISK
from sync.doctor.identity import CONFIG, IDENTITY, TRUST
from sync.doctor.machine import MACHINE
from sync.doctor.network import NETWORK
from sync.doctor.subject import NodeSubject


def _grouped(*parts: tuple[Check[NodeSubject], ...]) -> tuple[Check[NodeSubject], ...]:
    """Checks of one group side by side, groups in the order in which they first come."""
    checks = [check for part in parts for check in part]
    order = list(dict.fromkeys(check.group for check in checks))
    return tuple(sorted(checks, key=lambda check: order.index(check.group)))


NODE: tuple[Check[NodeSubject], ...] = _grouped(CONFIG, MACHINE, DISK, IDENTITY, NETWORK, TRUST, BROKER)
