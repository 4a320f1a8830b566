"""Verification: the verdict (reward and reason) on a response. Imports neither math-verify nor torch by itself."""

from kdrl_core.verify.pool import Verifier, verify, verify_batch
from kdrl_core.verify.screening import FormatResult, VerdictOptions, check_format, verifier_version

__all__ = ["FormatResult", "VerdictOptions", "Verifier", "check_format", "verifier_version", "verify", "verify_batch"]
