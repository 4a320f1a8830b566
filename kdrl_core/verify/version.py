"""The version of the verifier."""

from importlib.metadata import version

RULES = 1
"""Raise this with every change of kdrl_core.verify that changes a verdict. Stored verdicts of other versions are then
not taken for this one's."""


def verifier_version() -> str:
    """The versions of kdrl's rules and of the installed math-verify. Verdicts of one version can be compared."""
    return f"{RULES}, math-verify {version('math-verify')}"
