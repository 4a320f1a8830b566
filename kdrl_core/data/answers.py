r"""Ground truths that math-verify cannot read, so that no response to their problem could be found right.

The verifier's own killable workers read them: each distinct truth is compared with a number, and the verdict says
whether the truth is mathematics. A truth that exhausts time or memory counts as unreadable. Plain numbers and
fractions need no worker.
"""

import re
from collections.abc import Iterable

from kdrl_core.config import VerificationConfig
from kdrl_core.types import VerdictKind
from kdrl_core.verify import Verifier
from kdrl_core.verify.accuracy import UNREADABLE_TRUTH

_NUMBER = re.compile(r"[+-]?\d{1,40}(?:\.\d{1,40}|/[1-9]\d{0,40})?|\\frac\{\d{1,40}\}\{[1-9]\d{0,40}\}", re.ASCII)
_PROBE = r"\boxed{98765432123456789}"
"""An answer that is no problem's ground truth."""


def unparsable_answers(answers: Iterable[str], limits: VerificationConfig) -> set[str]:
    """The answers that math-verify cannot parse."""
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
