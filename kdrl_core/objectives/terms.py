"""Terms of one's own in the joint loss: functions that a recipe names, `stage2.terms: [{function, coefficient}]`.

    def too_certain(responses):                        # kdrl_core.objectives.Responses
        return (responses.logprobs > -0.01).float() * responses.logprobs

Such a function maps the tensors of a micro-batch to a value for each token, [B, T], which is minimised if its
coefficient is above 0. What it returns on padding does not matter. The gradient flows into `logprobs` and `entropy`,
which are 0 on padding. The mean is the one of all other terms, over the response tokens of the optimiser step. A
function gets no ρ and no w: it weighs by ρ = `(responses.logprobs - responses.old_logprobs).exp()` itself, as it needs.
On-policy `old_logprobs` are the logprobs themselves, without gradient, so ρ is 1.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from kdrl_core.objectives.checks import check_shape
from kdrl_core.objectives.inputs import Objective, Responses
from kdrl_core.objectives.plugins import faults_told, parse_reference


def own_terms(
    responses: Responses, objective: Objective, mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """Sum of coefficient × mean over the terms, and each mean by the name of its metric, `term/<function>`.

    Args:
        responses: with 0 on padding where a gradient flows.
        mean: over the response tokens of the optimiser step.

    Raises:
        RecipeError: a function cannot be loaded, its code is not that with which the run began, it raises, or it
            returns something else than a tensor [B, T].
    """
    if responses.old_logprobs is None:
        responses = replace(responses, old_logprobs=responses.logprobs.detach())
    total: Tensor | float = 0.0
    metrics: dict[str, Tensor] = {}
    for name, coefficient in objective.terms:
        reference = parse_reference(name)
        with faults_told(name):
            values = reference.load()(responses)
            check_shape("what it returns", values, responses.logprobs.shape, "[B, T]")
        metrics[f"term/{reference.function}"] = value = mean(values)
        if coefficient != 0.0:
            total = total + coefficient * value
    return total, metrics
