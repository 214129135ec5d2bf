"""Live traffic of every model, kept as counts, and the verdict on versions that are new. Belongs to the event loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from models.errors import InvalidRequest
from models.serving.quality import BASELINE_ANSWERS, MIN_BASELINE, Record, Rules, fault, read_rules

log = logging.getLogger("tierline.quality")

MAX_RECORDS = 3
"""Versions remembered per model: the one in force, the one before, and one that was tried and taken back."""


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A version that another one made room for. `old`: record of that one. `latency_ms`: what its contract promises."""

    record: Record
    old: Record | None
    latency_ms: float | None


class Serving(NamedTuple):
    """`is_new`: to be judged. `latency_ms`: 95th percentile that its contract promises."""

    package: str
    version: str
    is_new: bool
    latency_ms: float | None


class QualityWatch:
    """`path`: file in which counts outlive the process, None = they do not. `rules`: where settings say nothing else."""

    def __init__(self, path: Path | None = None, rules: Rules | None = None) -> None:
        self.rules = self._base = rules or Rules()
        self.live: dict[str, Record] = {}
        """Model -> what is counted of the version in force."""
        self.patience: dict[str, float] = {}
        """Model -> seconds that its runs take at most, as a rule: who waits no longer than that says nothing of a version."""
        self.newcomers: dict[str, Newcomer] = {}
        self.can_compare = False
        """Whether somebody asks the previous version at all: set by who does, when it found something to compare."""
        self._judged: dict[str, tuple[int, int, int]] = {}
        self._path = path
        self._known = _read(path)

    def configure(self, given: Mapping[str, Any]) -> None:
        """Other rules from settings; those that make no sense change nothing."""
        try:
            self.rules = read_rules({**msgspec.to_builtins(self._base), **given})
            self._judged = {}
        except InvalidRequest as error:
            log.warning("the old quality rules stay: %s", error)

    def begin(self, serving: Mapping[str, Serving]) -> None:
        """Model -> what answers from now on."""
        self.newcomers = {}
        self.live = {}
        self.patience = {}
        self.can_compare = False
        self._judged = {}
        for model, (package, version, is_new, latency_ms) in serving.items():
            key = f"{package}/{version}"
            records = self._known.setdefault(model, [])
            old = next((each for each in reversed(records) if each.key != key and not each.bad), None)
            record = next((each for each in records if each.key == key), None)
            if record is not None:
                records.remove(record)
            if record is None or record.bad:
                record = Record(package, version)
            records.append(record)
            del records[:-MAX_RECORDS]
            self.live[model] = record
            usual = old or record
            self.patience[model] = usual.p95() if sum(usual.latency) >= MIN_BASELINE else 0.0
            if is_new:
                self.newcomers[model] = Newcomer(record, old, latency_ms)
        self._known = {model: records for model, records in self._known.items() if model in serving}

    def fault(self) -> str | None:
        """What is wrong with a newcomer; from then on it is nothing to compare others with."""
        for model, newcomer in self.newcomers.items():
            record = newcomer.record
            counts = (record.requests, record.looked, record.compared)
            if self._judged.get(model) == counts:
                continue  # nothing came since
            found = fault(newcomer.record, newcomer.old, self.rules, newcomer.latency_ms)
            if found is not None:
                newcomer.record.bad = True
                return f"model '{model}' ({newcomer.record.key}): {found}"
            self._judged[model] = counts
        return None

    def standing(self, *, shadowing: bool) -> str:
        """`undecided`, `good so far` or `good`, and what it rests on. `shadowing`: the previous version can still be asked."""
        rules = self.rules
        seen = sum(newcomer.record.answers for newcomer in self.newcomers.values())
        compared = sum(newcomer.record.compared for newcomer in self.newcomers.values())
        if seen < rules.answers:
            return f"undecided: {seen} of {rules.answers} answers"
        if shadowing and rules.shadow and compared < rules.shadow_answers and self.can_compare:
            return f"undecided: {compared} of {rules.shadow_answers} answers compared with the previous version"
        # Each is watched for itself: one that is seldom asked must not hide behind a busy one.
        if min((newcomer.record.answers for newcomer in self.newcomers.values()), default=0) < rules.watch_answers:
            return f"good so far: {seen} answers, {compared} compared with the previous version"
        return "good"

    def age(self, record: Record) -> None:
        """After more than `BASELINE_ANSWERS`: let the past of `record` weigh half, once nobody counts on its number."""
        if record.answers > max(BASELINE_ANSWERS, self.rules.answers, self.rules.watch_answers):
            record.age()

    def save(self) -> None:
        """Blocks: a disk may take its time. One that refuses costs the comparison after a restart, nothing else."""
        if self._path is None:
            return
        staged = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(msgspec.json.encode(self._known))
            staged.replace(self._path)
        except OSError as error:
            log.warning("what traffic said of the versions could not be kept: %s", error)


def _read(path: Path | None) -> dict[str, list[Record]]:
    if path is None:
        return {}
    try:
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, list[Record]])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}  # absent, torn, or of another release: counting starts anew
    blank = Record("", "")
    return {model: [each for each in records if _shape(each) == _shape(blank)] for model, records in known.items()}


def _shape(record: Record) -> list[int]:
    return [len(each) for each in (record.latency, record.confidence, record.before, record.before_latency)]
