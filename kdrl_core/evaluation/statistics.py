"""Accuracy of a benchmark and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
