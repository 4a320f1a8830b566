"""The objectives of KDRL as pure functions of tensors and numbers, to be read beside the paper. Imports torch alone.

    paper       formula                                          here
    (2)         Â_i = (r_i − mean(r)) / std(r)                   group_advantages
    (2)         (1/Σ|o_i|) Σ_i Σ_t ρ_{i,t} Â_i                   kdrl_loss, beta=0; its means: token_mean, group_mean
    (3), (14)   log π_θ(o), o ∼ π_T                              sft_loss
    (4), (5)    ρ sg(R), R = log π_T − log π_θ                   kd_rkl_loss; per token kl_policy_gradient, or k1
    (6), (7)    k2 = ½ R², k3 = e^R − R − 1                      kl_estimate
    (8), (27)   J_GRPO − β KL_k2; (Â_i + β R) ∇log π_θ           kdrl_loss
    2.3, A.3    KL(π_θ ‖ top-K of π_T), the rest at a floor      topk_kl, into kdrl_loss as topk
    3.1         r'_i = r_i + β Σ_t R_{i,t}                       shape_rewards, then group_advantages
    3.3         β = max(β_init − δ · step, β_min)                BetaSchedule
    3.4         1[r_i = 0] R, 1[all r_j = 0] R                   kd_mask, or kd_masking of kdrl_loss
    Tables 3, 5 + β_ref KL_k3(π_θ ‖ π_ref), − c H                ref_… and entropy_… of kdrl_loss
    beyond      w = min(π_θold / π_rollout, cap); k3_k2grad      tis_cap of kdrl_loss; kl_estimate
    beyond      an estimator of your own                         register_estimator

The paper's J is maximised; every loss here is minimised, and is −J. B = prompts × G responses, grouped contiguously;
T = response tokens; V = vocabulary; K = the teacher's best tokens. `logprobs`, the student's and the teacher's, are
those of softmax(logits / temperature), which is what responses are sampled from. Half precision is computed, and
returned, in float32.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdrl_core.objectives.advantages import group_advantages, kd_mask, shape_rewards, training_signals
    from kdrl_core.objectives.baselines import kd_rkl_loss, sft_loss
    from kdrl_core.objectives.inputs import BetaSchedule, Objective, Responses, Totals
    from kdrl_core.objectives.keywords import kdrl_loss
    from kdrl_core.objectives.kl import kl_estimate, kl_policy_gradient, recorded_kl, register_estimator
    from kdrl_core.objectives.loss import LOSS_METRICS, group_mean, joint_loss, token_mean
    from kdrl_core.objectives.topk import topk_kl
else:

    def __getattr__(name: str) -> Any:
        """Import torch when a name is first used: recipes need only `kinds` and `inputs`, which import no torch."""
        if name in __all__:
            for part in ("inputs", "advantages", "baselines", "keywords", "kl", "loss", "topk"):
                if hasattr(module := import_module(f"{__name__}.{part}"), name):
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
