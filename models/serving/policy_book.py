"""The routing policy in force: met by the updater as an activator, read by the router on every request.

A policy names no files, so activating one is a decode and one assignment. Requests that are under way keep the policy they
started with, because the router reads it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from models.policy import Policy, Rule, decode_policy, rule_for


class PolicyBook:
    """Holds one policy. Until a document arrives the defaults of `models.policy.Rule` apply."""

    def __init__(self, tier: str, policy: Policy | None = None) -> None:
        self._tier = tier
        self._policy = policy or Policy()
        self._rules: dict[str, Rule] = {}

    @property
    def policy(self) -> Policy:
        return self._policy

    def rule(self, model: str, known: bool) -> Rule:
        """The rule for a model on this tier. `known`: the name is one we serve, so remembering its rule is bounded."""
        rule = self._rules.get(model)
        if rule is None:
            rule = rule_for(self._policy, model, self._tier)
            if known:
                self._rules[model] = rule
        return rule

    def plan(self, body: bytes, capabilities: Mapping[str, object]) -> Sequence[str]:
        """No files. Raises InvalidPolicy naming the field."""
        decode_policy(body)
        return ()

    async def prepare(self, body: bytes, blobs: Mapping[str, Path]) -> object:
        return decode_policy(body)

    async def commit(self, token: object) -> None:
        if not isinstance(token, Policy):
            raise TypeError(f"expected what prepare returned, got {type(token).__name__}")
        self._policy, self._rules = token, {}

    async def discard(self, token: object) -> None:
        """Nothing was loaded, nothing to release."""

    def verdict(self) -> str:
        """A policy that decoded is in force at once; its effect on quality is judged by the hub, over many nodes."""
        return "good"

    def settled(self) -> None:
        """Nothing was kept for the probation."""
