"""Votes of answers for maj@k. Two answers cast the same vote if they are written alike after slips are repaired.

The ground truth plays no part. The spelling is math-verify's own normalisation of LaTeX: ``\\dfrac{1}{2}``, ``1/2`` and
``0.5`` are one vote, as are ``$5$`` and ``5.``. Expressions that are equal only by algebra are different votes.
"""

from contextlib import suppress

from kdrl_core.verify.normalise import normalise

_MAX_CHARS = 300
"""Longer answers are votes as they stand: math-verify's patterns take quadratic time, and there is no deadline here."""


def vote_of(answer: str) -> str:
    """The vote of an answer; empty if the answer is blank."""
    text = " ".join(normalise(answer).split())
    if len(text) <= _MAX_CHARS:
        from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex

        config = NormalizationConfig(basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none")
        with suppress(Exception):  # a foreign parser, and texts that a model wrote; the text itself is then the vote
            text = normalize_latex(text, config)
    return "".join(text.split())
