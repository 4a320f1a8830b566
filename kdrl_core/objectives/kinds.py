"""The variants that a recipe can name, and what each of them needs: one table each for objectives, estimators, maskings
and aggregations.

A recipe takes its legal values from here. This module imports no torch, so that a recipe is read in an instant. The
functions behind the names are in kl.py, advantages.py and loss.py; each asserts that it has the same names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveKind:
    """What a stage's objective is made of."""

    teacher: Literal["none", "scores", "samples"] = "none"
    """What the teacher does: nothing, score the student's responses, or give responses of its own."""
    advantages: Literal["none", "rewards", "shaped rewards"] = "none"
    """What the advantages (2) are made from; none: they are 0."""
    distils: bool = False
    """The loss has the distillation term β · KL."""
    is_masked: bool = False
    """`kd_masking` may restrict that term (Sec. 3.4)."""
    loss: Literal["joint", "likelihood"] = "joint"
    """The joint loss (8), or the likelihood of the responses (14)."""


OBJECTIVES: dict[str, ObjectiveKind] = {
    "grpo": ObjectiveKind(advantages="rewards"),
    "kdrl": ObjectiveKind(teacher="scores", advantages="rewards", distils=True, is_masked=True),
    "kd_rkl": ObjectiveKind(teacher="scores", distils=True),
    "reward_shaping": ObjectiveKind(teacher="scores", advantages="shaped rewards"),
    "sft": ObjectiveKind(teacher="samples", loss="likelihood"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """How KL(π_θ ‖ π_T) enters the loss."""

    expectation: "str | Callable[[Tensor], Tensor] | None" = None
    """What update.parquet records, as the name of an estimator or as a function; None: the estimator's own values.

    Needed where only the gradient differs from another estimator's, or where the values need the whole vocabulary."""
    needs_topk: bool = False
    """It sums over the vocabulary, with the teacher's best tokens (A.3), instead of using the sampled tokens alone."""
    is_policy_gradient: bool = False
    """It enters the loss as the policy gradient −ρ sg(R) of (5)."""
    is_for_reference: bool = False
    """A recipe may use it as `ref_kl_estimator`."""
    is_local: bool = False
    """It was registered under a plain name, which other processes (the ranks of DeepSpeed) do not know."""


ESTIMATORS: dict[str, Estimator] = {
    "k1": Estimator(is_policy_gradient=True),
    "k2": Estimator(is_for_reference=True),
    "k3": Estimator(is_for_reference=True),
    "k3_k2grad": Estimator(expectation="k3"),
    "topk": Estimator(expectation="k2", needs_topk=True),
}
"""`register_estimator` adds to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A masking or an aggregation."""

    needs_groups: bool = False
    """It looks at all responses to a prompt together."""


MASKINGS: dict[str, Variant] = {"none": Variant(), "response": Variant(), "group": Variant(needs_groups=True)}
AGGREGATIONS: dict[str, Variant] = {"token_mean": Variant(), "group_mean": Variant(needs_groups=True)}
SFT_AGGREGATIONS = ("response_mean", "token_mean")
"""Of the likelihood: each response weighs the same (14), or each token does."""
