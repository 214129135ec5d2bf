from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from access_writer import AccessWriter
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from models.serving.access.keys import MAX_KEYS, kid_of, load_keys, load_private_key, new_key
from models.serving.access.settings import InvalidAccess

X = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
GOOD = {"kty": "OKP", "crv": "Ed25519", "x": X, "kid": "k"}


def test_the_thumbprint_is_the_one_of_the_standard() -> None:
    """RFC 8037 A.3: the thumbprint of this key is kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k."""
    raw = base64.urlsafe_b64decode(X + "=")
    public = Ed25519PublicKey.from_public_bytes(raw)
    stated = base64.urlsafe_b64decode("kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k=")
    assert kid_of(public) == stated.hex()[:16]


def test_a_new_key_is_readable_by_its_owner_alone_and_loads_on_both_sides(tmp_path: Path) -> None:
    private, public = new_key(tmp_path / "keys")
    assert private.stat().st_mode & 0o777 == 0o600
    assert load_keys(tmp_path / "keys").keys() == {public.stem}
    assert kid_of(load_private_key(private).public_key()) == public.stem


def test_a_json_web_key_set_is_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [GOOD | {"use": "sig", "alg": "EdDSA"}]}))
    assert list(load_keys(path)) == ["k"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([], "no public key"),
        ([GOOD, GOOD], "same kid"),
        ([GOOD | {"d": "secret"}], "is a private key"),
        ([GOOD | {"kty": "EC"}], "not an Ed25519"),
        ([GOOD | {"crv": "Ed448"}], "not an Ed25519"),
        ([GOOD | {"x": X[:-4]}], "x of key 'k'"),
        ([GOOD | {"x": "%" * 43}], "x of key 'k'"),
        ([GOOD | {"kid": ""}], "kid"),
        ([GOOD | {"kid": "a/b"}], "kid"),
        ([GOOD | {"kid": f"k{n}"} for n in range(MAX_KEYS + 1)], "more than 64"),
        ("keys", "not a JSON Web Key Set"),
    ],
)
def test_a_key_set_that_is_not_right_is_refused_by_name(tmp_path: Path, keys: object, words: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": keys}))
    with pytest.raises(InvalidAccess, match=words) as refused:
        load_keys(path)
    assert "keys.json" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_folder_that_is_not_right_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidAccess, match="No such file"):
        load_keys(tmp_path / "absent")
    writer = AccessWriter(tmp_path)
    wrong = tmp_path / "keys" / "wrong.pem"
    for data, words in (
        (b"nothing", "not a public key"),
        (writer.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "a private key"),
        (
            generate_private_key(SECP256R1())
            .public_key()
            .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            "not an Ed25519",
        ),
        (b"x" * 300_000, "more than"),
    ):
        wrong.write_bytes(data)
        with pytest.raises(InvalidAccess, match=words):
            load_keys(tmp_path / "keys")


def test_a_private_key_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    private, public = new_key(tmp_path)
    private.chmod(0o640)
    with pytest.raises(InvalidAccess, match="others may read"):
        load_private_key(private)
    public.chmod(0o600)
    with pytest.raises(InvalidAccess, match="not a private key"):
        load_private_key(public)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    )
    locked.chmod(0o600)
    with pytest.raises(InvalidAccess, match="encrypted"):
        load_private_key(locked)
