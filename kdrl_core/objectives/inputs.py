"""What goes into the joint loss: the objective, the responses' tensors, and the counts of the whole optimiser step.

B = prompts × G responses, grouped contiguously; T = response tokens. Every logprob is that of softmax(logits / T) at
the sampling temperature T. Importing this module imports no torch: recipes make an `Objective` of their fields. The
checks of plain values are here too: a `ValueError` names the argument, what was expected and what was given.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral
from typing import TYPE_CHECKING, SupportsFloat

from kdrl_core.objectives.kinds import ESTIMATORS, OBJECTIVES, ObjectiveKind

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The plain values of one step's objective. The record goes from the recipe to the loss as it is."""

    kind: str = "kdrl"
    """A name of `OBJECTIVES`."""
    beta: float = 0.0
    """β ≥ 0 of this step (Sec. 3.3)."""
    kl_estimator: str = "k2"
    """"k1" (as policy gradient (5)) | "k2" (6) | "k3" (7) | "k3_k2grad" | "topk" (A.3), or a registered one."""
    kd_masking: str = "none"
    """"none" | "response" | "group" (Sec. 3.4)."""
    topk_floor: float = -20.0
    """Log-probability of the tokens outside the teacher's top-K, for "topk"."""
    group_size: int | None = None
    """G ≥ 2; None where nothing needs the groups."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation (2)."""
    clip_low: float | None = None
    """Clip ρ at 1 − clip_low, as PPO does; None: no bound on that side. On-policy ρ is 1, and no bound acts."""
    clip_high: float | None = None
    """Clip ρ at 1 + clip_high."""
    tis_cap: float | None = None
    """Bound of w, above 0; with `Responses.rollout_logprobs`."""
    ref_beta: float = 0.0
    """β_ref ≥ 0, coefficient of the penalty to the reference policy (Table 3)."""
    ref_kl_estimator: str = "k3"
    """As `kl_estimator`, without "topk"."""
    entropy_coef: float = 0.0
    """c ≥ 0, coefficient of the entropy bonus (Tables 3, 5)."""
    aggregation: str = "token_mean"
    """"token_mean" | "group_mean" (Eq. 2 to the letter); of SFT "response_mean" (14) | "token_mean"."""
    terms: Sequence[tuple[str, float]] = ()
    """Terms of one's own: function as `file.py:name`, coefficient."""

    @property
    def variant(self) -> ObjectiveKind:
        """What this kind of objective is made of."""
        return OBJECTIVES[self.kind]

    @property
    def kd_beta(self) -> float:
        """Coefficient of the distillation term; 0 where the objective has none (reward shaping uses β elsewhere)."""
        return self.beta if self.variant.distils else 0.0

    @property
    def kd_estimator(self) -> str:
        """Estimator of the distillation term; without that term, the estimator of its metrics."""
        return self.kl_estimator if self.variant.distils else "k2"

    @property
    def needs_topk(self) -> bool:
        """Whether the loss reads the teacher's best tokens (A.3)."""
        estimator = ESTIMATORS.get(self.kd_estimator)
        return estimator is not None and estimator.needs_topk


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """Tensors of a batch or micro-batch. Where `response_mask` is 0, a [B, T] tensor may hold anything, also NaN.

    The gradient flows into `logprobs`, `entropy` and `topk` alone. Any float dtype."""

    logprobs: "Tensor"
    """[B, T] log π_θ of the sampled tokens. Values that are not finite (training has diverged) reach the loss, and so
    do those of `entropy` and `topk` on the same tokens."""
    response_mask: "Tensor"
    """[B, T], 1 on response tokens, EOS included."""
    advantages: "Tensor"
    """[B] Â; if all are 0, only KD-RKL remains."""
    teacher_logprobs: "Tensor | None" = None
    """[B, T] log π_T; None only where β = 0, or with "topk"."""
    rewards: "Tensor | None" = None
    """[B], read by `kd_masking` only; None where that is "none" or `kd_weights` is given."""
    kd_weights: "Tensor | None" = None
    """[B] ≥ 0, m made beforehand by `kd_mask`, in place of `kd_masking`: for micro-batches that split groups."""
    topk: "Tensor | None" = None
    """[B, T] of `topk_kl`, which takes the mask as well (NaN logits on padding would spoil its backward pass)."""
    old_logprobs: "Tensor | None" = None
    """[B, T] log π_θold; None is strictly on-policy, ρ = 1 with gradient ∇log π_θ."""
    rollout_logprobs: "Tensor | None" = None
    """[B, T] the engine's logprobs, for w; with `Objective.tis_cap`."""
    ref_logprobs: "Tensor | None" = None
    """[B, T] of the frozen reference policy; may be None where `ref_beta` is 0."""
    entropy: "Tensor | None" = None
    """[B, T] of the policy in nats; may be None where `entropy_coef` is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts over the whole optimiser step, for micro-batches. None: the batch is the whole step, so it is counted.

    With them, losses and metrics of micro-batches add up to those of the whole step, however it is cut."""

    tokens: "float | Tensor | None" = None
    """Response tokens."""
    responses: float | None = None
    """Responses, for "response_mean"."""
    kd_tokens: "float | Tensor | None" = None
    """Response tokens on which KD acts, for the metric kd/kl_unmasked."""
    num_groups: float | None = None
    """Groups, for "group_mean"."""
    group_tokens: "Tensor | Sequence[int] | None" = None
    """[B] response tokens of each response's whole group, for "group_mean"."""


@dataclass(frozen=True, slots=True)
class BetaSchedule:
    """β(step) = max(β_init − δ · step, β_min) (Sec. 3.3): `BetaSchedule(init, decay, minimum)(step)`, steps from 0.

    A function of the optimiser step alone, so that a resumed run has the same β. Computed in decimal, so that the
    values are exact and β reaches the minimum at exactly the right step (5e-3, 5e-5, 1e-3: step 80).

    Args:
        init: β_init ≥ 0.
        decay: δ ≥ 0 per step; 0 keeps β constant.
        minimum: β_min ≥ 0. If it is above `init`, β is β_min at every step; recipes refuse that.

    Raises:
        ValueError: a value is negative or not finite, or (when called) `step` is negative or not a whole number.
    """

    init: float
    decay: float = 0.0
    minimum: float = 0.0

    def __post_init__(self) -> None:
        for name in ("init", "decay", "minimum"):
            check_not_negative(name, getattr(self, name))

    def __call__(self, step: int) -> float:
        if not (as_number(step) >= 0 and as_number(step).is_integer()):
            raise ValueError(f"step: expected a whole number of at least 0, given {step!r:.50}")
        init, decay, minimum = (Decimal(str(value)) for value in (self.init, self.decay, self.minimum))
        return float(max(init - decay * int(step), minimum))


def check_choice(argument: str, name: str, choices: Iterable[str]) -> None:
    """`name` is one of the variants."""
    choices = tuple(choices)
    if name not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}, given {name!r}")


def check_not_negative(argument: str, value: object) -> None:
    """`value` is a finite number of at least 0, or a 0-d tensor of one."""
    if not 0.0 <= as_number(value) < math.inf:
        raise ValueError(f"{argument}: expected a finite number of at least 0, given {value!r:.50}")


def check_positive(argument: str, value: object) -> None:
    """`value` is a finite number above 0, or a 0-d tensor of one."""
    if not 0.0 < as_number(value) < math.inf:
        raise ValueError(f"{argument}: expected a finite number above 0, given {value!r:.50}")


def check_log_probability(argument: str, value: object) -> None:
    """`value` is a finite number of at most 0."""
    if not -math.inf < as_number(value) <= 0.0:
        raise ValueError(f"{argument}: expected a finite log-probability, at most 0, given {value!r:.50}")


def as_number(value: object) -> float:
    """`value` as a float; NaN if it is not a single number (None, text, a bool, a vector)."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat) or getattr(value, "ndim", 0) != 0:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def check_group_size(group_size: object, num_rows: int | None = None) -> None:
    """`group_size` is an integer of at least 2 and, where `num_rows` is given, divides it."""
    if isinstance(group_size, bool) or not isinstance(group_size, Integral) or group_size < 2:
        raise ValueError(f"group_size: expected an integer of at least 2, given {group_size!r}")
    if num_rows is not None and num_rows % int(group_size):
        raise ValueError(
            f"group_size: expected a divisor of the number of responses {num_rows}, given {group_size}; "
            "pass whole groups, contiguously"
        )
