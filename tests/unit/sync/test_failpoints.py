"""Fail points do nothing unless they are armed, and a typo is an error."""

from __future__ import annotations

import pytest

from sync.failpoints import POINTS, VARIABLE, FailpointReached, reach


def test_unarmed_points_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for point in POINTS:
        reach(point)


def test_an_armed_point_raises_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "updater.floor=error,updater.fetched=pause:0")
    reach("updater.verified")
    reach("updater.fetched")
    with pytest.raises(FailpointReached):
        reach("updater.floor")


@pytest.mark.parametrize("setting", ["updater.flor=kill", "updater.floor=explode", "updater.floor"])
def test_a_typo_is_an_error(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv(VARIABLE, setting)
    with pytest.raises(ValueError, match="TIERLINE_FAILPOINTS"):
        reach("updater.floor")
