"""Randomness by name: every draw is a function of (seed, stage, step, prompt, sample), never of what was drawn before.

So a run that is killed anywhere and resumed draws the same numbers as one that was not.
"""

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray


def derive_seed(*names: object) -> int:
    """A 64-bit seed from names, e.g. `derive_seed(seed, stage, step, prompt_id, sample)`; equal names, equal seed."""
    message = "\x1f".join(str(name) for name in names)
    return int.from_bytes(hashlib.blake2b(message.encode(), digest_size=8).digest(), "little")


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) of the counter-based generator keyed by `seed`; a longer draw begins with a shorter."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def prompts_of_step(
    problem_ids: Sequence[str], *, seed: int, stage: str, step: int, prompts_per_step: int
) -> list[str]:
    """The problems of one step: consecutive slices of one shuffled pass over the pool after another.

    No problem is left out of a pass and none stands twice in a step: where a step spans two passes, the second
    pass puts the problems that the step already has at its end.

    Raises:
        ValueError: the pool is smaller than a step.
    """
    if len(problem_ids) < prompts_per_step:
        raise ValueError(f"problem_ids: {len(problem_ids)} problems are fewer than prompts_per_step={prompts_per_step}")
    ids = tuple(sorted(problem_ids))
    epoch, offset = divmod(step * prompts_per_step, len(ids))
    chosen = _pass(ids, seed, stage, epoch, prompts_per_step)[offset : offset + prompts_per_step]
    if missing := prompts_per_step - len(chosen):
        chosen += _pass(ids, seed, stage, epoch + 1, prompts_per_step)[:missing]
    return list(chosen)


def _pass(ids: tuple[str, ...], seed: int, stage: str, epoch: int, prompts_per_step: int) -> tuple[str, ...]:
    for earlier in range(epoch):  # each pass depends on the tail of the one before: fill the cache upwards
        _shuffled(ids, seed, stage, earlier, prompts_per_step)
    return _shuffled(ids, seed, stage, epoch, prompts_per_step)


@cache
def _shuffled(ids: tuple[str, ...], seed: int, stage: str, epoch: int, prompts_per_step: int) -> tuple[str, ...]:
    shuffled = sorted(ids, key=lambda problem_id: derive_seed(seed, stage, "epoch", epoch, problem_id))
    carried = (len(ids) * epoch) % prompts_per_step
    if carried:
        tail = set(_shuffled(ids, seed, stage, epoch - 1, prompts_per_step)[-carried:])
        shuffled = [i for i in shuffled if i not in tail] + [i for i in shuffled if i in tail]
    return tuple(shuffled)
