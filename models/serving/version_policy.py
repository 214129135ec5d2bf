"""Which versions of a model are served, of those that lie in its folder: all, the newest few, or those named.

The three policies are those of Triton's model configuration (`ModelVersionPolicy`). Versions are numbers. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import msgspec

MAX_VERSIONS = 1024
"""Most versions a policy may name: each is a session in memory."""


class AllVersions(msgspec.Struct, frozen=True):
    """Every version found."""


class Latest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `latest` highest numbers."""

    latest: Annotated[int, msgspec.Meta(ge=1, le=MAX_VERSIONS)] = 1


class Specific(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """These numbers and no other."""

    specific: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0)], ...], msgspec.Meta(min_length=1, max_length=MAX_VERSIONS)
    ]


Policy = AllVersions | Latest | Specific

Written = Literal["all", "latest"] | dict[Literal["latest", "specific"], int | tuple[int, ...]]
"""How a settings file says it: `"all"`, `"latest"`, `{ latest = 2 }` or `{ specific = [1, 3] }`."""


def read_policy(written: Written) -> Policy:
    """The policy that was written. Raises msgspec.ValidationError."""
    if written == "all":
        return AllVersions()
    if written == "latest":
        return Latest()
    if len(written) == 1:
        return msgspec.convert(written, Latest) if "latest" in written else msgspec.convert(written, Specific)
    raise msgspec.ValidationError("Expected either `latest` or `specific`")


def choose_versions(policy: Policy, present: Iterable[str]) -> list[str]:
    """Those of `present` that are to be served, by ascending number: the last one answers when none is asked for."""
    ordered = sorted(present, key=lambda version: (int(version), version))
    if isinstance(policy, Latest):
        return ordered[-policy.latest :]
    if isinstance(policy, Specific):
        return [version for version in ordered if int(version) in policy.specific]
    return ordered


def triton_policy(policy: Policy) -> Mapping[str, object]:
    """The policy in the JSON form of Triton's model configuration."""
    if isinstance(policy, Latest):
        return {"latest": {"num_versions": policy.latest}}
    if isinstance(policy, Specific):
        return {"specific": {"versions": list(policy.specific)}}
    return {"all": {}}
