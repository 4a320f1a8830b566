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
    from kdrl_core.objectives.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Import torch with the first name that is used: recipes need `kinds` and `inputs` alone, which need none."""
        public = import_module("kdrl_core.objectives.public")
        if name not in ("__all__", *public.__all__):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(public, name)
