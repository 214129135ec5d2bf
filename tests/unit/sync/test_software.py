"""What a statement about the node's own software must say, and what no file in it may be called."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sync.errors import Malformed
from sync.software import MAX_WHEELS, decode_software, encode_software, name_of

DIGEST = "sha256:" + "a" * 64
WHEEL = {"name": "tierline-0.2.0-py3-none-any.whl", "digest": DIGEST, "size": 10}
GOOD = {"version": "0.2.0", "wheels": [WHEEL]}


def with_wheel(**fields: object) -> dict[str, Any]:
    return {**GOOD, "wheels": [{**WHEEL, **fields}]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "software"),
        ({"version": "0.2.0"}, "wheels"),
        ({**GOOD, "version": "; rm"}, "version"),
        ({**GOOD, "wheels": []}, "wheels: 0 given"),
        ({**GOOD, "wheels": [WHEEL] * (MAX_WHEELS + 1)}, f"wheels: {MAX_WHEELS + 1} given"),
        ({**GOOD, "wheels": [WHEEL, WHEEL]}, r"wheels\[1\].name: tierline is there twice"),
        ({**GOOD, "version": "0.2.1"}, "no tierline-0.2.1"),
        (with_wheel(name="numpy-0.2.0-py3-none-any.whl"), "no tierline-0.2.0"),
        (with_wheel(digest="sha256:../x"), "digest"),
        (with_wheel(size=0), r"wheels\[0\].size"),
        *((with_wheel(name=name), r"wheels\[0\].name") for name in (
            "../tierline-0.2.0-py3-none-any.whl",
            "/etc/tierline-0.2.0-py3-none-any.whl",
            "tierline-0.2.0.tar.gz",
            "-e tierline-0.2.0-py3-none-any.whl",
            "tierline-0.2.0-py3-none-any.whl --index-url=http://x",
            "tierline-0.2.0-py3-none-any.whl\n",
            "",
        )),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_its_field(body: object, words: str) -> None:
    with pytest.raises(Malformed, match=words):
        decode_software(json.dumps(body).encode())


def test_a_field_of_a_later_hub_changes_neither_the_meaning_nor_the_name() -> None:
    plain = decode_software(json.dumps(GOOD).encode())
    grown = decode_software(json.dumps({**with_wheel(later=1), "later": 1}).encode())
    assert name_of(grown) == name_of(plain)
    assert decode_software(encode_software(grown)) == plain
