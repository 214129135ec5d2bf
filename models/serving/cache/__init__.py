"""The result cache: opt-in per model, in this process and, when configured, in Redis or Valkey."""

from models.serving.cache.cache import Cache, SecondLevel
from models.serving.cache.identity import Identities, RepositoryIdentities

__all__ = ["Cache", "Identities", "RepositoryIdentities", "SecondLevel"]
