"""Settings of the hub replace those of the node field by field; what makes no sense is refused by its field."""

from __future__ import annotations

import msgspec
import pytest

from sync.errors import Malformed
from sync.settings import Settings, SettingsBook, decode_settings
from sync.states import DEADLINES, MIN_DEADLINES
from sync.windows import Window

OWN = Settings(windows=(Window(start="01:00", minutes=30),), bandwidth=5_000.0)


def test_what_the_hub_names_replaces_the_nodes_own_and_the_rest_stays() -> None:
    found = decode_settings(b'{"bandwidth": null, "max_hold_seconds": 5}', OWN)
    assert (found.bandwidth, found.max_hold_seconds, found.windows) == (None, 5.0, OWN.windows)


def test_fields_of_a_later_release_are_ignored() -> None:
    window = {"start": "01:00", "minutes": 5, "x": 1}
    given = {"moon": "full", "deadlines": {"dreaming": -1}, "quality": {"new": 1}, "windows": [window]}
    assert decode_settings(msgspec.json.encode(given)).windows[0].minutes == 5


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"bandwidth": 1}, "bandwidth"),
        ({"bandwidth": "fast"}, "bandwidth"),
        ({"max_hold_seconds": 0}, "max_hold_seconds"),
        ({"max_hold_seconds": 1e12}, "max_hold_seconds"),
        ({"probation_seconds": -1}, "probation_seconds"),
        ({"force": -1}, "force"),
        ({"deadlines": {"fetching": 0}}, "deadlines.fetching"),
        ({"windows": [{"start": "x", "minutes": 1}]}, r"windows\[0\].start"),
        ({"quality": {str(number): 1 for number in range(65)}}, "quality"),
        ([], "settings"),
    ],
)
def test_nonsense_is_refused_by_its_field(body: object, field: str) -> None:
    with pytest.raises(Malformed, match=field):
        decode_settings(msgspec.json.encode(body))


async def test_whoever_watches_hears_of_the_settings_in_force_now_and_later() -> None:
    book, heard = SettingsBook(OWN), []
    book.watch(lambda settings: heard.append(settings.bandwidth))
    await book.commit(await book.prepare(b'{"bandwidth": 9000}', {}))
    assert heard == [5_000.0, 9_000.0]
    assert book.current.windows == OWN.windows


@pytest.mark.parametrize("state", MIN_DEADLINES)
async def test_a_deadline_too_short_for_any_update_counts_as_the_shortest_and_the_rest_holds(
    state: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As an older hub may send it."""
    book = SettingsBook(OWN)
    body = msgspec.json.encode({"deadlines": {state: 0.5, "dreaming": 0.1}, "bandwidth": 9_000})
    await book.commit(await book.prepare(body, {}))
    assert book.current.deadlines == {state: MIN_DEADLINES[state], "dreaming": 0.1}
    assert book.current.bandwidth == 9_000.0
    assert f"deadlines.{state}: 0.5 s is too short for any update" in caplog.text


async def test_the_nodes_own_configuration_cannot_go_below_either_and_longer_deadlines_stay() -> None:
    book = SettingsBook(Settings(deadlines={"committing": 0.1, "fetching": 600.0}))
    assert book.current.deadlines == {"committing": MIN_DEADLINES["committing"], "fetching": 600.0}
    await book.commit(await book.prepare(b"{}", {}))
    assert book.current.deadlines == {"committing": MIN_DEADLINES["committing"], "fetching": 600.0}
    assert Settings(deadlines=dict(DEADLINES)) == SettingsBook(Settings(deadlines=dict(DEADLINES))).current
