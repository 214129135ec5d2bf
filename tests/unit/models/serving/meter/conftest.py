"""Fixtures of what meters anything."""

from __future__ import annotations

import pytest
from meter_fakes import Clock, Index, Scripted

from models.serving.meter.registry import Registry


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index() -> Index:
    return Index()


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def scripted(clock: Clock) -> Scripted:
    return Scripted(clock)
