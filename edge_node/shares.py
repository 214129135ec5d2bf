"""What each device may take of the mirror: downloads at once, and bytes in a while. In the event loop; decides, does no I/O."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from models.errors import Overloaded
from models.serving.caller import Peer

SLOT_SECONDS = 1.0
"""When to come back for a download slot: devices add their own jitter."""
MAX_DEVICES = 10_000
"""Devices whose use is remembered; beyond them, those that used least are forgotten."""


class MirrorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[mirror]`. `slots`: downloads at once; `device_slots`: of one device. `window_bytes`: what one device may take in
    `window_seconds`; a transfer that has begun is not cut. A device is known by its certificate, else by its address."""

    slots: int = 32
    device_slots: int = 4
    window_bytes: int = 16 << 30
    window_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for field in ("slots", "device_slots", "window_bytes", "window_seconds"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} {getattr(self, field)} is not above 0")


@dataclass(slots=True)
class _Device:
    """`used`: bytes, as of `at` (monotonic seconds); they are forgiven evenly over the window."""

    running: int = 0
    used: float = 0.0
    at: float = 0.0


class Share:
    """One download. Its slot is free again when nobody holds this object any more: sent, cut off or never begun."""

    def __init__(self, sent: Callable[[int], None]) -> None:
        self.sent = sent


class Shares:
    """`sent`: bytes to all devices. `refused`, by what had been used up: bytes, device_slots, slots."""

    def __init__(self, settings: MirrorSettings, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.sent = 0
        self.refused: Counter[str] = Counter()
        self._settings = settings
        self._monotonic = monotonic
        self._devices: dict[str, _Device] = {}
        self._running = 0

    @property
    def running(self) -> int:
        """Downloads under way."""
        return self._running

    def charge(self, peer: Peer, size: int) -> None:
        """Count `size` bytes. Raises Overloaded, saying when to come back, for a device that has had its share."""
        device = self._check(peer)
        device.used += size

    def take(self, peer: Peer) -> Share:
        """A download slot. Raises Overloaded, saying when to come back."""
        device, settings = self._check(peer), self._settings
        if device.running >= settings.device_slots:
            self.refused["device_slots"] += 1
            raise Overloaded(f"this device has {device.running} downloads under way", SLOT_SECONDS)
        if self._running >= settings.slots:
            self.refused["slots"] += 1
            raise Overloaded(f"{self._running} downloads are under way", SLOT_SECONDS)
        device.running += 1
        self._running += 1

        def count(size: int) -> None:
            device.used += size
            self.sent += size

        share = Share(count)
        weakref.finalize(share, self._release, device)
        return share

    def _release(self, device: _Device) -> None:
        device.running -= 1
        self._running -= 1

    def _check(self, peer: Peer) -> _Device:
        name, settings = peer.certificate or peer.address, self._settings
        device = self._devices.get(name)
        if device is None:
            self._forget()
            device = self._devices[name] = _Device(at=self._monotonic())
        now, rate = self._monotonic(), settings.window_bytes / settings.window_seconds
        device.used, device.at = max(0.0, device.used - (now - device.at) * rate), now
        if device.used >= settings.window_bytes:
            self.refused["bytes"] += 1
            # Until a tenth of the window is free again: coming back for a single byte would be of no use.
            raise Overloaded(
                f"this device has had its {settings.window_bytes} bytes of {settings.window_seconds:g} s",
                (device.used - 0.9 * settings.window_bytes) / rate,
            )
        return device

    def _forget(self) -> None:
        if len(self._devices) >= MAX_DEVICES:
            idle = [name for name, device in self._devices.items() if not device.running]
            for name in sorted(idle, key=lambda name: self._devices[name].used)[: MAX_DEVICES // 10]:
                del self._devices[name]
