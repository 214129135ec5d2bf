"""Log settings over the protocol: what they change is really written, what they cannot is refused by name."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest

from models.errors import CallerError, InvalidRequest
from models.serving.logs import MAX_VERBOSE_LEVEL, LogSettings
from models.serving.process import JsonLines

ALL = {"debug", "info", "warning", "error", "critical"}


class Logged:
    """A logger of its own with a handler at its root, and settings for it."""

    def __init__(self) -> None:
        self.handler = logging.StreamHandler(io.StringIO())
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.own = logging.getLogger("tierline-test-logs")
        self.own.addHandler(self.handler)
        self.own.propagate = False
        self.own.setLevel(logging.INFO)
        self.below = logging.getLogger("tierline-test-logs.below")
        self.settings = LogSettings("tierline-test-logs")

    def written(self) -> str:
        stream = self.handler.stream = io.StringIO()
        for name in ("debug", "info", "warning", "error", "critical"):
            getattr(self.below, name)(name)
        return stream.getvalue()

    def classes(self) -> set[str]:
        return {line.split()[-1] for line in self.written().splitlines()}


@pytest.fixture
def logged() -> Iterator[Logged]:
    logged = Logged()
    yield logged
    logged.own.handlers.clear()
    logged.own.setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        ({}, {"info", "warning", "error", "critical"}),
        ({"log_info": False}, {"warning", "error", "critical"}),
        ({"log_warning": False}, {"info", "error", "critical"}),
        ({"log_info": False, "log_warning": False}, {"error", "critical"}),
        ({"log_error": False}, {"info", "warning"}),
        ({"log_info": False, "log_warning": False, "log_error": False}, set()),
        ({"log_verbose_level": 1}, ALL),
        ({"log_verbose_level": MAX_VERBOSE_LEVEL, "log_info": False}, ALL - {"info"}),
        ({"log_file": ""}, {"info", "warning", "error", "critical"}),
    ],
)
def test_what_is_switched_off_is_not_written(logged: Logged, settings: dict[str, object], classes: set[str]) -> None:
    assert logged.settings.update(settings) == logged.settings.values()
    assert logged.classes() == classes
    assert {name: logged.settings.values()[name] for name in settings} == settings


def test_what_is_switched_on_again_is_written_again(logged: Logged) -> None:
    logged.settings.update({"log_info": False, "log_error": False})
    logged.settings.update({"log_info": True, "log_error": True})
    assert logged.classes() == ALL - {"debug"}


def test_the_records_of_others_are_not_ours_to_hide(logged: Logged) -> None:
    logged.settings.update({"log_info": False, "log_warning": False, "log_error": False})
    stream = logged.handler.stream = io.StringIO()
    logged.handler.handle(logging.LogRecord("another", logging.INFO, "", 0, "theirs", None, None))
    assert "theirs" in stream.getvalue()


def test_times_can_be_iso_8601_and_the_default_again(logged: Logged) -> None:
    default = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} info"
    assert re.match(default, logged.written())
    for _ in range(2):
        logged.settings.update({"log_format": "ISO8601"})
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ info", logged.written())
    logged.settings.update({"log_format": "default"})
    assert re.match(default, logged.written())


def test_structured_logs_keep_their_form(logged: Logged) -> None:
    formatter = JsonLines("node")
    logged.handler.setFormatter(formatter)
    logged.settings.update({"log_format": "ISO8601"})
    assert logged.handler.formatter is formatter


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("log_file", "/etc/passwd"),
        ("log_file", None),
        ("log_info", 1),
        ("log_info", "true"),
        ("log_warning", None),
        ("log_error", []),
        ("log_verbose_level", -1),
        ("log_verbose_level", True),
        ("log_verbose_level", 1.0),
        ("log_verbose_level", "1"),
        ("log_verbose_level", MAX_VERBOSE_LEVEL + 1),
        ("log_format", "iso8601"),
        ("log_format", None),
        ("log_format", {}),
        ("log_colour", True),
        ("", True),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_nothing_changes(logged: Logged, name: str, value: object) -> None:
    before = logged.settings.values()
    with pytest.raises(InvalidRequest, match=f"setting '{name}'") as caught:
        logged.settings.update({"log_info": False, name: value})
    assert isinstance(caught.value, CallerError)
    assert logged.settings.values() == before
    assert logged.classes() == ALL - {"debug"}
