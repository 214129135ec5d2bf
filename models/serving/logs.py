"""Triton's logging extension over Python's logging: which of our records are written, changed while the server runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from copy import copy

from models.errors import InvalidRequest

MAX_VERBOSE_LEVEL = 2**32 - 1
"""The protocol's field is a uint32."""
_CLASSES = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
_FORMATS = ("default", "ISO8601")
_ISO8601 = "%Y-%m-%dT%H:%M:%SZ"


class LogSettings(logging.Filter):
    """What is written of the logger `name` and those below it. A verbose level above 0 adds debug records.

    `log_format` chooses the time's form in plain text logs: local time, or ISO 8601 in UTC. Structured logs keep their own.
    """

    def __init__(self, name: str = "tierline") -> None:
        super().__init__(name)
        self._logger = logging.getLogger(name)
        self._values: dict[str, object] = {
            "log_file": "",
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": _FORMATS[0],
        }
        self._plain: dict[logging.Handler, logging.Formatter | None] = {}

    def values(self) -> Mapping[str, object]:
        return dict(self._values)

    def update(self, settings: Mapping[str, object]) -> Mapping[str, object]:
        """Change the settings named, all or none, and return all of them. Raises InvalidRequest, naming the setting."""
        for name, value in settings.items():
            self._check(name, value)
        self._values |= settings
        self._logger.setLevel(self._level())
        for handler in self._handlers():
            # A logger's own filter does not see the records of the loggers below it; a handler's sees all.
            handler.addFilter(self)
            self._set_time(handler)
        return self.values()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is of a class that is on; those of other loggers are not ours to hide."""
        if not super().filter(record):
            return True
        if record.levelno < logging.INFO:
            return self._values["log_verbose_level"] != 0
        severity = min(record.levelno, logging.ERROR) // 10 * 10
        return any(self._values[name] for name, level in _CLASSES.items() if level == severity)

    def _check(self, name: str, value: object) -> None:
        if name not in self._values:
            raise InvalidRequest(f"setting '{name}' is unknown; there are {', '.join(self._values)}")
        if name == "log_file":
            if value != "":
                raise InvalidRequest("setting 'log_file' cannot be changed: this server logs to standard error")
        elif name == "log_format":
            if value not in _FORMATS:
                raise InvalidRequest(f"setting 'log_format' is none of {', '.join(_FORMATS)}")
        elif name == "log_verbose_level":
            if type(value) is not int or not 0 <= value <= MAX_VERBOSE_LEVEL:
                raise InvalidRequest(f"setting 'log_verbose_level' is not a whole number from 0 to {MAX_VERBOSE_LEVEL}")
        elif type(value) is not bool:
            raise InvalidRequest(f"setting '{name}' is neither true nor false")

    def _level(self) -> int:
        """The lowest level that any setting lets through."""
        if self._values["log_verbose_level"]:
            return logging.DEBUG
        return min((level for name, level in _CLASSES.items() if self._values[name]), default=logging.CRITICAL + 1)

    def _handlers(self) -> Iterator[logging.Handler]:
        """Those that our records reach."""
        logger: logging.Logger | None = self._logger
        while logger is not None:
            yield from logger.handlers
            logger = logger.parent if logger.propagate else None

    def _set_time(self, handler: logging.Handler) -> None:
        before = self._plain.setdefault(handler, handler.formatter)
        if type(before) is not logging.Formatter:
            return
        if self._values["log_format"] == _FORMATS[0]:
            handler.setFormatter(before)
            return
        formatter = copy(before)
        formatter.datefmt, formatter.converter = _ISO8601, time.gmtime
        handler.setFormatter(formatter)
