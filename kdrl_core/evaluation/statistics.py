"""Accuracy of a benchmark and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import fmean, stdev

import numpy as np

from kdrl_core.verify.normalise import vote_of

_RESAMPLES = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Mean over problems of the share of right samples, in [0, 1], with a 95 % interval."""

    mean: float
    low: float
    high: float


def accuracy(correct: Sequence[Sequence[float]], *, seed: int) -> Accuracy:
    """Avg@k of a benchmark with a percentile bootstrap over problems.

    Args:
        correct: per problem the accuracy rewards of its k samples.
        seed: of the bootstrap.
    """
    per_problem = np.array([np.mean(samples) for samples in correct])
    rng = np.random.default_rng(seed)
    means = rng.choice(per_problem, size=(_RESAMPLES, len(per_problem))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Accuracy(mean=float(per_problem.mean()), low=float(low), high=float(high))


def standard_error(correct: Sequence[Sequence[float]]) -> float:
    """Standard error of Avg@k over problems; 0 for a single problem, which says nothing of the spread."""
    return stdev(fmean(samples) for samples in correct) / sqrt(len(correct)) if len(correct) > 1 else 0.0


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased pass@k of one problem, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374, Eq. 1)."""
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} right in {num_samples} samples is not defined")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, … up to `limit`."""
    return [2**exponent for exponent in range(limit.bit_length())]


def majority(answers: Sequence[str | None], correct: Sequence[float]) -> float:
    """maj@k of one problem: the accuracy of its most frequent answer.

    Answers count as one where `vote_of` spells them alike: no ground truth enters the vote. Tied answers
    share the win equally (the expected value of a random pick); a response without an answer casts no vote, and without
    any vote the problem is lost.

    Args:
        answers: the answer found in each response, None where there is none.
        correct: the accuracy reward of each response.
    """
    rewards: dict[str, list[float]] = {}
    for answer, reward in zip(answers, correct, strict=True):
        if answer is not None and (text := vote_of(answer)):
            rewards.setdefault(text, []).append(reward)
    if not rewards:
        return 0.0
    most = max(map(len, rewards.values()))
    return fmean(fmean(votes) for votes in rewards.values() if len(votes) == most)
