"""What an operator may say about one model, in `model.toml` beside its version folders. Without the file: all defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from models.errors import PackageError
from models.serving.version_policy import AllVersions, Policy, Written, read_policy

SETTINGS_FILE = "model.toml"
MAX_SETTINGS_BYTES = 64 * 1024
"""A settings file is a dozen lines."""
MAX_BATCH_ROWS = 4096
"""Largest batch that may be asked for: beyond it a run only gets longer."""
MAX_ENGINE_THREADS = 256


class ModelSettings(msgspec.Struct, frozen=True):
    """How one model is served.

    `version_policy`: which of its versions. `batching`: `auto` = as measured at load, `off`, or the most rows of one run.
    `cache`: whether answers are kept; off by default, because only the operator knows that equal inputs may get equal
    answers. `isolation`: `process` runs it in a process of its own. `preload`: False = tried at the start, then closed
    until it is first asked for. `warmup`: False = not run before it serves, for a model that made-up inputs harm; it then
    never runs in the event loop. `memory_mb`: what one loaded version costs, None = measured. `max_run_seconds`: longest
    run whose request carries no deadline, None = the server's. `threads`: of one run inside the engine, None = the server's.
    """

    version_policy: Policy = AllVersions()
    batching: Literal["auto", "off"] | int = "auto"
    cache: bool = False
    isolation: Literal["none", "process"] = "none"
    preload: bool = True
    warmup: bool = True
    memory_mb: float | None = None
    max_run_seconds: float | None = None
    threads: int | None = None


_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version_policy: Written = "all"
    batching: Literal["auto", "off"] | Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH_ROWS)] = "auto"
    cache: bool = False
    isolation: Literal["none", "process"] = "none"
    preload: bool = True
    warmup: bool = True
    memory_mb: _Positive | None = None
    max_run_seconds: _Positive | None = None
    threads: Annotated[int, msgspec.Meta(ge=1, le=MAX_ENGINE_THREADS)] | None = None


def read_settings(path: Path) -> ModelSettings:
    """The settings in the file at `path`, defaults when there is none. Raises PackageError naming the file and the field."""
    where = f"{path.parent.name}/{path.name}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SETTINGS_BYTES + 1)
    except FileNotFoundError:
        return ModelSettings()
    except OSError as error:
        raise PackageError(f"{where}: {error.strerror or error}") from error
    if len(data) > MAX_SETTINGS_BYTES:
        raise PackageError(f"{where}: more than {MAX_SETTINGS_BYTES} bytes")
    try:
        written = msgspec.toml.decode(data, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PackageError(f"{where}: {error}") from error
    try:
        policy = read_policy(written.version_policy)
    except msgspec.ValidationError as error:
        raise PackageError(f"{where}: version_policy: {error}") from error
    values = {name: getattr(written, name) for name in _File.__struct_fields__ if name != "version_policy"}
    return ModelSettings(version_policy=policy, **values)
