"""When two answers cast the same vote (maj@k): by how they are written, once slips of writing are taken out.

No ground truth enters. The spelling is math-verify's own normalisation of LaTeX, so that ``\\dfrac{1}{2}``, ``1/2`` and
``0.5`` are one vote, as are ``$5$`` and ``5.``; expressions that are equal by algebra alone are not.
"""

from contextlib import suppress

from kdrl_core.verify.normalise import normalise

_MAX_CHARS = 300
"""What is longer is a vote as it stands: math-verify's patterns take quadratic time, and no deadline is kept here."""


def vote_of(answer: str) -> str:
    """What an answer votes for; empty if it says nothing."""
    text = " ".join(normalise(answer).split())
    if len(text) <= _MAX_CHARS:
        from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex

        config = NormalizationConfig(basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none")
        with suppress(Exception):  # a foreign parser of texts that a model wrote; then the text itself is the vote
            text = normalize_latex(text, config)
    return "".join(text.split())
