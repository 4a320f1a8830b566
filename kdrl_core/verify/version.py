"""Which verifier a verdict is of."""

from importlib.metadata import version

RULES = 1
"""Raised with every change of kdrl_core.verify that changes a verdict: what is kept of earlier ones is not theirs."""


def verifier_version() -> str:
    """kdrl's rules and the installed math-verify: verdicts of one version can be compared."""
    return f"{RULES}, math-verify {version('math-verify')}"
