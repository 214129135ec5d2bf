"""Which version answers, as bytes that no other version shares: the first part of every key."""

from __future__ import annotations

import itertools
import secrets
import weakref
from typing import Protocol

from models.errors import NotReady
from models.serving.loaded import Identity

MAX_MEMO = 1024
"""Names and versions whose identity is remembered; a caller that invents names must not grow this without end."""


class Identities(Protocol):
    """Tells what would answer a request now. Synchronous and fast: asked for every request of a cached model."""

    def lookup(self, model: str, version: str | None) -> tuple[bytes, bool]:
        """(digest, lasting) of what answers to `model`, `version` None = the default.

        Raises an error of `models.errors` when nothing does, or when it cannot be told now: then nothing is cached.

        Lasting: the digest means the same in every process and after every restart. Otherwise it holds for this one
        load of a model and must not leave the process.
        """
        ...


class _Identified(Protocol):
    @property
    def identity(self) -> Identity: ...


class _Registered(_Identified, Protocol):
    @property
    def loaded(self) -> _Identified | None: ...


class RegisteredModels(Protocol):
    """What `models.serving.repository.Repository` is to this module."""

    def registered(self, model: str, version: str | None) -> _Registered: ...


class RepositoryIdentities:
    """Identities of the models of a repository, also of those that were evicted from memory.

    A signed package is named by its manifest, the file that was loaded and the engine that runs it: variants of one version
    answer differently. A model without digests is named anew each time that it is loaded, for its file may have changed.
    """

    def __init__(self, repository: RegisteredModels) -> None:
        self._registered = repository.registered
        self._process = secrets.token_bytes(16)
        self._loads = itertools.count()
        # Weakly: a version that was unloaded must not be kept in memory by its name.
        self._known: dict[tuple[str, str | None], tuple[weakref.ref[Identity], bytes, bool]] = {}
        self._tokens: dict[int, tuple[weakref.ref[Identity], bytes]] = {}

    def lookup(self, model: str, version: str | None) -> tuple[bytes, bool]:
        registered = self._registered(model, version)
        identity = registered.identity
        if not identity.variant:
            if registered.loaded is None:
                raise NotReady(f"model '{model}' is not in memory now")
            identity = registered.loaded.identity
        known = self._known.get((model, version))
        if known is not None and known[0]() is identity:
            return known[1], known[2]
        lasting = bool(identity.variant)
        digest = _signed(identity) if lasting else self._token(identity)
        if len(self._known) >= MAX_MEMO:
            self._known.clear()
        self._known[model, version] = weakref.ref(identity), digest, lasting
        return digest, lasting

    def _token(self, identity: Identity) -> bytes:
        """The same for every name of one load, never again for another load."""
        known = self._tokens.get(id(identity))
        if known is not None and known[0]() is identity:
            return known[1]
        for gone in [key for key, (alive, _) in self._tokens.items() if alive() is None]:
            del self._tokens[gone]
        token = self._process + next(self._loads).to_bytes(8, "little")
        self._tokens[id(identity)] = weakref.ref(identity), token
        return token


def _signed(identity: Identity) -> bytes:
    parts = (
        identity.package,
        identity.version,
        identity.engine,
        identity.precision,
        identity.digest,
        identity.variant,
    )
    encoded = [part.encode() for part in parts]
    return b"".join([len(part).to_bytes(4, "little") + part for part in encoded])
