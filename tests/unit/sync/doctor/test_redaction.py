from __future__ import annotations

import pytest

from sync.credentials import new_key, private_pem
from sync.doctor.redaction import GONE, Redaction, secrets_in, secrets_of_environment
from sync.identity import Membership


@pytest.mark.parametrize(
    "text",
    [
        "mqtts://edge:canary77@broker:8883",
        "http://canary77@proxy:3128/x",
        "Authorization: Bearer canary77canary",
        '{"password": "canary77", "x": 1}',
        "token=canary77 and more",
        "api_key: canary77",
        "tln_canary77canary77canary77",
        "eyJhbGciOiJFUzI1NiJ9.canary77.canary77",
        "$7$101$canary77$canary77",
        "AKIACANARY77CANARY77",
    ],
)
def test_what_looks_like_a_secret_goes(text: str) -> None:
    clean = Redaction().text(text)
    assert "canary77" not in clean.lower()
    assert GONE in clean


def test_a_private_key_goes_whole_also_when_its_end_is_cut_off() -> None:
    key = private_pem(new_key()).decode()
    for text in (f"before\n{key}after", f"before\n{key[:100]}"):
        clean = Redaction().text(text)
        assert key.splitlines()[1][:20] not in clean
        assert clean.startswith("before\n")


@pytest.mark.parametrize(
    "text",
    [
        "node.credential: others may read it (mode 0644), 0600 is needed",
        "the token's file is readable by its owner alone",
        "sha256:0404d080fad64ab20944f226d0d362b4302e085a4496906f645f735b1a966fbe",
        "https://hub.example:8443/tuf/timestamp.json (8 ms)",
        "see that the hub takes the node's token: it is refused",
        "time.sleep(1): 12:30:01",
    ],
)
def test_what_is_no_secret_stays_readable(text: str) -> None:
    assert Redaction().text(text) == text


def test_a_known_secret_goes_wherever_it_stands_and_however_it_is_written() -> None:
    redaction = Redaction(["p@ss word/1"])
    for text in ("it is p@ss word/1!", "it is p%40ss%20word%2F1!"):
        assert redaction.text(text) == f"it is {GONE}!"
    assert redaction.value({"p@ss word/1": ["p@ss word/1", 3, None]}) == {GONE: [GONE, 3, None]}


def test_secrets_are_found_by_the_names_they_stand_under() -> None:
    environ = {
        "DB_PASSWORD": "canary-1",
        "HOME": "/home/x",
        "PROXY": "http://u:canary-2@h",
        "MY_TOKEN": "canary-3",
        "KEYBOARD": "de",
    }
    assert sorted(secrets_of_environment(environ)) == ["canary-1", "canary-2", "canary-3"]
    raw = {"node": {"proxy": "http://u:canary-4@h:1", "credential": "canary-5", "labels": {"api_token": "canary-6"}}}
    assert sorted(secrets_in(raw)) == ["canary-4", "canary-5", "canary-6"]


def test_the_path_of_a_credential_is_no_secret() -> None:
    assert "credential" in Membership.__struct_fields__
    assert secrets_in({"node": {"credential": "etc/token.txt", "identity": "identity"}}) == []
