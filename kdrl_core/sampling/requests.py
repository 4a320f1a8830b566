"""What is asked: every prompt a number of times, each response with a seed of its own."""

from collections.abc import Iterable, Sequence

from kdrl_core.ledger import derive_seed
from kdrl_core.types import RolloutRequest


def requests_for(
    prompts: Iterable[tuple[str, Sequence[int]]], samples: int, *seed_names: object
) -> list[RolloutRequest]:
    """`samples` requests per prompt, those of a prompt together.

    Args:
        prompts: (prompt_id, prompt_token_ids), in order.
        seed_names: a response's seed is `derive_seed(*seed_names, prompt_id, sample)`. So it depends neither on the
            other prompts nor on the shard.
    """
    return [
        RolloutRequest(
            prompt_id=prompt_id,
            sample=sample,
            prompt_token_ids=token_ids,
            seed=derive_seed(*seed_names, prompt_id, sample),
        )
        for prompt_id, token_ids in prompts
        for sample in range(samples)
    ]
