from __future__ import annotations

from pathlib import Path

import pytest

from models.serving.access.revoked import MAX_REVOKED_BYTES, load_revoked
from models.serving.access.settings import InvalidAccess


def test_tokens_clients_and_what_was_issued_before_are_covered(tmp_path: Path) -> None:
    path = tmp_path / "revoked.txt"
    path.write_text('# gone\njti t1  # stolen\n\nsub lost\nsub "Pump house" 500\nsub moved 1000\nsub moved 900\n')
    revoked, wrong = load_revoked(path)
    assert not wrong
    assert revoked.covers("c", "t1", 1.0)
    assert not revoked.covers("c", "t2", 1.0)
    assert not revoked.covers("c", None, 1.0)
    assert revoked.covers("lost", None, 1e12)
    assert revoked.covers("lost")  # its certificate too
    assert revoked.covers("moved", None, 999.0)
    assert not revoked.covers("moved", None, 1000.0)
    assert not revoked.covers("moved")
    assert revoked.covers("Pump house", "t2", 499.0)


def test_a_later_line_never_makes_an_earlier_one_weaker(tmp_path: Path) -> None:
    path = tmp_path / "revoked.txt"
    path.write_text("sub lost\nsub lost 5\n")
    assert load_revoked(path)[0].covers("lost", None, 1e12)


@pytest.mark.parametrize(
    "line", ["t1", "jti", "jti a b", "sub a b", "sub a 1.5", "sub a -1", "key k", 'sub "a', "sub a 1 2"]
)
def test_a_line_that_says_nothing_is_named_and_the_others_count(tmp_path: Path, line: str) -> None:
    path = tmp_path / "revoked.txt"
    path.write_text(f"jti before\n{line}\njti after\n")
    revoked, (wrong,) = load_revoked(path)
    assert "line 2" in wrong
    assert revoked.tokens == {"before", "after"}


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidAccess, match="an empty file revokes nothing"):
        load_revoked(tmp_path / "absent")
    (tmp_path / "huge").write_bytes(b"\n" * (MAX_REVOKED_BYTES + 1))
    with pytest.raises(InvalidAccess, match="more than"):
        load_revoked(tmp_path / "huge")
