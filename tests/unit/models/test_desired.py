from __future__ import annotations

import json

import pytest

from models.desired import Assignment, Desired, decode_desired, digests_of, encode_desired, plan
from models.errors import InvalidManifest, NoUsableVariant
from models.manifest import Blob, Variant


def blob(letter: str) -> Blob:
    return Blob("sha256:" + letter * 64, 10)


DIGITS = Assignment(
    package="digits-int8",
    version="1",
    manifest=blob("a"),
    golden=blob("b"),
    variants=(Variant("onnx", "int8", blob("c")), Variant("litert", "int8", blob("d"))),
)
DESIRED = Desired({"digits": DIGITS})


def test_the_same_state_gives_the_same_bytes() -> None:
    one = encode_desired(Desired({"a": DIGITS, "b": DIGITS}))
    assert one == encode_desired(Desired({"b": DIGITS, "a": DIGITS}))
    assert decode_desired(one).models["a"] == DIGITS


def test_the_envelope_declares_every_file_but_a_node_needs_only_one_variant() -> None:
    assert [digest[7] for digest in digests_of(DESIRED)] == ["a", "b", "c", "d"]
    assert [digest[7] for digest in plan(DESIRED, ("litert",))] == ["a", "b", "d"]


def test_a_node_without_the_engine_refuses_naming_what_is_offered() -> None:
    with pytest.raises(NoUsableVariant, match="onnx int8, litert int8"):
        plan(DESIRED, ("torchscript",))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"null", "desired"),
        (b'{"models": {"digits": {}}}', "models"),
        (b'{"modelz": {}}', "models"),
        (
            json.dumps(
                {"models": {str(n): json.loads(encode_desired(DESIRED))["models"]["digits"] for n in range(129)}}
            ).encode(),
            "models: 129 given",
        ),
    ],
)
def test_a_body_that_is_no_desired_state_is_refused(body: bytes, field: str) -> None:
    with pytest.raises(InvalidManifest, match=field):
        decode_desired(body)
