"""No two loads and no two versions share an identity, however alike they look."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from models.errors import NotFound, NotReady
from models.serving.cache import RepositoryIdentities
from models.serving.loaded import Identity

SIGNED = Identity("p", "1", "onnx", "fp32", "sha256:manifest", "sha256:file")
UNSIGNED = Identity("p", "1", "onnx")


class Models:
    def __init__(self, identity: Identity | None, *, resident: bool = True) -> None:
        self.identity = identity
        self.resident = resident

    def registered(self, model: str, version: str | None) -> SimpleNamespace:
        if self.identity is None:
            raise NotFound("not here")
        loaded = SimpleNamespace(identity=self.identity) if self.resident else None
        return SimpleNamespace(identity=self.identity, loaded=loaded)


def test_a_signed_version_is_the_same_in_every_process() -> None:
    one, other = (RepositoryIdentities(Models(replace(SIGNED))) for _ in range(2))
    assert one.lookup("m", None) == one.lookup("alias", "1") == other.lookup("m", None)
    assert one.lookup("m", None)[1]


@pytest.mark.parametrize("change", ["package", "version", "engine", "precision", "digest", "variant"])
def test_whatever_differs_makes_another_identity(change: str) -> None:
    models = Models(SIGNED)
    identities = RepositoryIdentities(models)
    before = identities.lookup("m", None)
    models.identity = replace(SIGNED, **{change: "other"})
    assert identities.lookup("m", None) != before


def test_an_unsigned_model_that_is_loaded_again_is_another_and_never_leaves_the_process() -> None:
    models = Models(replace(UNSIGNED))
    identities = RepositoryIdentities(models)
    first = identities.lookup("m", None)
    assert first == identities.lookup("m", "1") == identities.lookup("m", None)
    models.identity = replace(UNSIGNED)
    second = identities.lookup("m", None)
    assert second != first
    assert not second[1]
    assert RepositoryIdentities(models).lookup("m", None) != second


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(NotFound):
        RepositoryIdentities(Models(None)).lookup("m", None)


def test_an_evicted_version_is_known_by_its_digests_or_not_at_all() -> None:
    known = RepositoryIdentities(Models(SIGNED)).lookup("m", None)
    assert RepositoryIdentities(Models(SIGNED, resident=False)).lookup("m", None) == known
    with pytest.raises(NotReady):
        RepositoryIdentities(Models(UNSIGNED, resident=False)).lookup("m", None)
