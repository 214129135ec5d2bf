from __future__ import annotations

from typing import Any

import msgspec
import pytest

from models.serving.version_policy import AllVersions, Latest, Specific, choose_versions, read_policy, triton_policy

PRESENT = ("10", "2", "1", "007")


@pytest.mark.parametrize(
    ("written", "chosen", "triton"),
    [
        ("all", ["1", "2", "007", "10"], {"all": {}}),
        ("latest", ["10"], {"latest": {"num_versions": 1}}),
        ({"latest": 2}, ["007", "10"], {"latest": {"num_versions": 2}}),
        ({"latest": 9}, ["1", "2", "007", "10"], {"latest": {"num_versions": 9}}),
        ({"specific": (7, 1)}, ["1", "007"], {"specific": {"versions": [7, 1]}}),
        ({"specific": (3,)}, [], {"specific": {"versions": [3]}}),
    ],
)
def test_a_policy_chooses_by_number_newest_last(written: Any, chosen: list[str], triton: object) -> None:
    policy = read_policy(written)
    assert choose_versions(policy, PRESENT) == chosen
    assert triton_policy(policy) == triton


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"latest": 0},
        {"latest": 1025},
        {"latest": (1,)},
        {"specific": ()},
        {"specific": (-1,)},
        {"specific": 1},
        {"latest": 1, "specific": (1,)},
    ],
)
def test_a_policy_out_of_range_is_refused(written: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        read_policy(written)


def test_policies_are_values() -> None:
    assert {AllVersions(), AllVersions(), Latest(2), Latest(2), Specific((1,))} == {
        AllVersions(),
        Latest(2),
        Specific((1,)),
    }
