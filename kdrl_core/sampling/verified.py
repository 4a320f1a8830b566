"""Responses and their verdicts, the first being judged while the last are still being generated."""

from collections.abc import Mapping, Sequence

from kdrl_core.engines.protocols import OnFinished, RolloutEngine
from kdrl_core.types import Rollout, RolloutRequest, Verdict
from kdrl_core.verify.pool import Verifier


def generate_and_verify(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    verifier: Verifier,
    ground_truths: Mapping[str, str],
    *,
    think_opened: bool,
    on_finished: OnFinished | None = None,
    max_response_tokens: int | None = None,
) -> tuple[list[Rollout], list[Verdict]]:
    """One response and one verdict per request, in order; accuracy alone counts (``require_format=False``).

    Args:
        ground_truths: by `prompt_id`.
        on_finished, max_response_tokens: as `RolloutEngine.generate` takes them.
    """

    def items(rollouts: Sequence[Rollout]) -> list[tuple[str, str]]:
        return [(rollout.text, ground_truths[rollout.prompt_id]) for rollout in rollouts]

    def finished(rollouts: Sequence[Rollout]) -> None:
        verifier.verify_ahead(items(rollouts), require_format=False, think_opened=think_opened)
        if on_finished is not None:
            on_finished(rollouts)

    rollouts = engine.generate(requests, on_finished=finished, max_response_tokens=max_response_tokens)
    verdicts = verifier.verify_batch(items(rollouts), require_format=False, think_opened=think_opened)
    return rollouts, verdicts
