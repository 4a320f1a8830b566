r"""Ground truths that math-verify cannot read: no response to their problem could ever be found right.

Read as the verifier reads them, by its own killable workers: each distinct truth is compared with a number, and the
verdict tells whether the truth was mathematics. A truth that exhausts time or memory counts as unreadable. Plain
numbers and fractions need no worker.
"""

import re
from collections.abc import Iterable

from kdrl_core.config import VerificationConfig
from kdrl_core.types import VerdictKind
from kdrl_core.verify import Verifier
from kdrl_core.verify.accuracy import UNREADABLE_TRUTH

_NUMBER = re.compile(r"[+-]?\d{1,40}(?:\.\d{1,40}|/[1-9]\d{0,40})?|\\frac\{\d{1,40}\}\{[1-9]\d{0,40}\}", re.ASCII)
_PROBE = r"\boxed{98765432123456789}"
"""An answer that is nobody's ground truth."""


def unparsable_answers(answers: Iterable[str], limits: VerificationConfig) -> set[str]:
    """Those of the answers that math-verify cannot parse."""
    doubtful = sorted({answer for answer in answers if not _NUMBER.fullmatch(answer)})
    if not doubtful:
        return set()
    with Verifier(**limits.pool_options) as verifier:
        verdicts = verifier.verify_batch([(_PROBE, answer) for answer in doubtful], require_format=False)
    failed = (VerdictKind.TIMEOUT, VerdictKind.ERROR)
    return {
        answer
        for answer, verdict in zip(doubtful, verdicts, strict=True)
        if verdict.kind in failed or verdict.reason == UNREADABLE_TRUTH
    }
