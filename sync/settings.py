"""How a node updates: windows, bandwidth, holds, deadlines, probation. From its own configuration and from the hub.

The body of a document of kind `settings`; what it names replaces, field by field, what the node's configuration says.
Unknown fields are ignored: a hub may be newer than its nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from sync.errors import Malformed
from sync.states import DEADLINES, MIN_DEADLINES
from sync.windows import Window, check_windows

MIN_BANDWIDTH = 1_000.0
"""Bytes per second below which no update would ever end."""
MAX_SECONDS = 30 * 86_400.0
MAX_QUALITY_FIELDS = 64

log = logging.getLogger(__name__)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """`windows`: () = always open. `bandwidth`: bytes per second that all transfers of this node may take together, None = all.

    `max_hold_seconds`: how long holds may delay one update, and the longest single hold. `force`: updates of models up to
    this revision wait neither for holds nor for windows. `probation_seconds`: how long a version without enough traffic
    stays on probation. `deadlines`: state -> seconds, for those of `sync.states.DEADLINES`; below
    `MIN_DEADLINES` these count. `quality`: what live traffic is judged by, read by `models.serving.quality`.
    """

    windows: tuple[Window, ...] = ()
    bandwidth: float | None = None
    max_hold_seconds: float = 900.0
    force: int = 0
    probation_seconds: float = 30.0
    deadlines: dict[str, float] = {}
    quality: dict[str, Any] = {}


def check_settings(settings: Settings) -> Settings:
    """Raises Malformed naming the field."""
    check_windows(settings.windows)
    if settings.bandwidth is not None and not (isfinite(settings.bandwidth) and settings.bandwidth >= MIN_BANDWIDTH):
        raise Malformed(f"bandwidth: {settings.bandwidth} is not {MIN_BANDWIDTH:g} bytes per second or more")
    _check_seconds("max_hold_seconds", settings.max_hold_seconds)
    _check_seconds("probation_seconds", settings.probation_seconds)
    if settings.force < 0:
        raise Malformed(f"force: {settings.force} is no revision")
    for state, seconds in settings.deadlines.items():
        if state in DEADLINES:  # a state of a later release is not ours to judge
            _check_seconds(f"deadlines.{state}", seconds)
    if len(settings.quality) > MAX_QUALITY_FIELDS:
        raise Malformed(f"quality: {len(settings.quality)} fields given, at most {MAX_QUALITY_FIELDS} are accepted")
    return settings


def _check_seconds(field: str, seconds: float) -> None:
    if not 0 < seconds <= MAX_SECONDS:
        raise Malformed(f"{field}: {seconds} is not between 0 and {MAX_SECONDS:g} seconds")


def decode_settings(body: bytes, base: Settings | None = None) -> Settings:
    """`base` with what `body` names in place of its own. Raises Malformed naming the field."""
    try:
        given = msgspec.json.decode(body, type=dict[str, Any])
        known = {name: value for name, value in given.items() if name in Settings.__struct_fields__}
        merged = {**msgspec.to_builtins(base or Settings()), **known}
        return check_settings(msgspec.convert(merged, Settings))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"settings: {error}") from error


def too_short(settings: Settings) -> dict[str, float]:
    """State -> seconds of the deadlines that are below `sync.states.MIN_DEADLINES`."""
    return {state: given for state, given in settings.deadlines.items() if given < MIN_DEADLINES.get(state, 0.0)}


def lengthened(settings: Settings) -> Settings:
    """With the shortest useful deadline in place of each that is shorter.

    Not refused: an older hub, or a file written for an older release, may say one, and a node that refused all of its
    settings for it would lose its windows too.
    """
    short = too_short(settings)
    if not short:
        return settings
    for state, given in short.items():
        log.warning("deadlines.%s: %g s is too short for any update: %g s count", state, given, MIN_DEADLINES[state])
    longer = {state: MIN_DEADLINES[state] for state in short}
    return msgspec.structs.replace(settings, deadlines={**settings.deadlines, **longer})


class SettingsBook:
    """Meets `sync.activation.Activator` for documents of kind `settings`. `base`: the node's own configuration."""

    def __init__(self, base: Settings | None = None) -> None:
        self.base = lengthened(check_settings(base or Settings()))
        self.current = self.base
        self._watchers: list[Callable[[Settings], None]] = []

    def watch(self, changed: Callable[[Settings], None]) -> None:
        """Call `changed` now and whenever other settings are in force."""
        self._watchers.append(changed)
        changed(self.current)

    def plan(self, body: bytes, capabilities: Mapping[str, object]) -> Sequence[str]:
        return ()

    async def prepare(self, body: bytes, blobs: Mapping[str, Path]) -> object:
        """Raises Malformed naming the field."""
        return lengthened(decode_settings(body, self.base))

    async def commit(self, token: object) -> None:
        if not isinstance(token, Settings):
            raise TypeError("expected what prepare returned")
        self.current = token
        for changed in self._watchers:
            changed(token)

    async def discard(self, token: object) -> None:
        """Nothing to release."""

    def verdict(self) -> str:
        return "good"

    def settled(self) -> None:
        """Nothing was kept for the probation."""
