"""Refusing verdicts with too many timeouts and errors, which would count as wrong answers."""

from collections import Counter
from collections.abc import Sequence

from kdrl_core.errors import VerificationError
from kdrl_core.types import Verdict, VerdictKind


def refuse_failures(verdicts: Sequence[Verdict], where: str, limit: float) -> None:
    """Raise VerificationError if a share above `limit` of the verdicts of `where` are timeouts or errors."""
    failed = [v for v in verdicts if v.kind in (VerdictKind.TIMEOUT, VerdictKind.ERROR)]
    if len(failed) > limit * len(verdicts):
        counts = ", ".join(f"{n} {kind}" for kind, n in Counter(v.kind.value for v in failed).items())
        raise VerificationError(
            f"{where}: {counts} of {len(verdicts)} verdicts, above verification.max_failed_share={limit}; "
            f"first: {failed[0].reason}. Raise verification.timeout_s or memory_limit_mb, then resume"
        )
