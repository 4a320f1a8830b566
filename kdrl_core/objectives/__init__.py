"""The objectives of KDRL as pure functions of tensors and numbers, to be read beside the paper. Imports torch alone.

B = prompts × G responses, grouped contiguously; T = response tokens; V = vocabulary; K = the teacher's best tokens.
`logprobs` are those of softmax(logits / temperature), the policy that is sampled, for student and teacher alike.
"""

from kdrl_core.objectives.advantages import group_advantages
from kdrl_core.objectives.aggregate import group_mean, token_mean
from kdrl_core.objectives.baselines import kd_rkl_loss, sft_loss
from kdrl_core.objectives.kl import KLEstimator, kl_estimate, kl_policy_gradient
from kdrl_core.objectives.loss import LOSS_METRICS, kdrl_loss
from kdrl_core.objectives.masking import KDMasking, kd_mask
from kdrl_core.objectives.schedule import BetaSchedule
from kdrl_core.objectives.shaping import shape_rewards
from kdrl_core.objectives.topk import topk_kl

__all__ = [
    "LOSS_METRICS",
    "BetaSchedule",
    "KDMasking",
    "KLEstimator",
    "group_advantages",
    "group_mean",
    "kd_mask",
    "kd_rkl_loss",
    "kdrl_loss",
    "kl_estimate",
    "kl_policy_gradient",
    "sft_loss",
    "shape_rewards",
    "token_mean",
    "topk_kl",
]
