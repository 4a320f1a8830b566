"""The names of `kdrl_core.objectives`, which imports this module when the first of them is used."""

from kdrl_core.objectives.advantages import group_advantages, kd_mask, shape_rewards, training_signals
from kdrl_core.objectives.aggregate import group_mean, token_mean
from kdrl_core.objectives.baselines import kd_rkl_loss, sft_loss
from kdrl_core.objectives.inputs import BetaSchedule, Objective, Responses, Totals
from kdrl_core.objectives.kl import kl_estimate, kl_policy_gradient, recorded_kl, register_estimator
from kdrl_core.objectives.loss import LOSS_METRICS, joint_loss, kdrl_loss
from kdrl_core.objectives.topk import topk_kl

__all__ = [
    "LOSS_METRICS",
    "BetaSchedule",
    "Objective",
    "Responses",
    "Totals",
    "group_advantages",
    "group_mean",
    "joint_loss",
    "kd_mask",
    "kd_rkl_loss",
    "kdrl_loss",
    "kl_estimate",
    "kl_policy_gradient",
    "recorded_kl",
    "register_estimator",
    "sft_loss",
    "shape_rewards",
    "token_mean",
    "topk_kl",
    "training_signals",
]
