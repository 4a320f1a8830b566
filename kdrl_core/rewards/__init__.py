"""Rewards as functions (docs/rewards.md). Imports nothing heavy: a user's function imports `Score` from here."""

from kdrl_core.rewards.score import Score

__all__ = ["Score"]
