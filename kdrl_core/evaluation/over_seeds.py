"""Accuracy over several seeds of the same training, and how sure it is.

Two things are drawn by chance: the problems of a benchmark, and the seeds. They are crossed, since every seed answers
the same problems; so both are drawn anew, independently of each other, and the interval is that of the drawn means
(percentiles, 95 %). Problems are many, and drawn with replacement (bootstrap). Seeds are few, where a bootstrap's
interval is far too narrow (over 5 seeds its half-width is 0.63 of what it should be): the mean over seeds is drawn from
Student's t with S − 1 degrees of freedom around it, at the spread that the seeds have, which is exact where seeds are
all that varies and normally distributed. With one seed this is the bootstrap over problems alone. The same draws serve
every model that has as many seeds and problems, which makes differences paired: what a hard problem takes from both
cancels out.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kdrl_core.evaluation.statistics import Accuracy
from kdrl_core.ledger.seeds import derive_seed

_RESAMPLES = 4_000

Scores = NDArray[np.float64]
"""[S, P]: of each seed and problem the share of right samples."""


def over_seeds(scores: Mapping[str, Scores]) -> Accuracy:
    """Mean of the benchmarks' accuracies (Table 1's avg; of one benchmark its own) with its interval, within [0, 1].

    Args:
        scores: by benchmark; all with the same seeds in the same order.
    """
    found = _summary(scores)
    return Accuracy(mean=found.mean, low=max(0.0, found.low), high=min(1.0, found.high))


def paired_difference(ours: Mapping[str, Scores], theirs: Mapping[str, Scores]) -> Accuracy:
    """Ours − theirs as `over_seeds`, of any numbers: the same seeds and problems in the same order."""
    return _summary({name: array - theirs[name] for name, array in ours.items()})


def _summary(scores: Mapping[str, Scores]) -> Accuracy:
    num_seeds = len(next(iter(scores.values())))
    seeds = _seed_weights(num_seeds)
    means = [((_problem_weights(name, a.shape[1]) @ a.T) * seeds).sum(axis=1) for name, a in scores.items()]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    mean = float(np.mean([array.mean() for array in scores.values()]))
    return Accuracy(mean=mean, low=float(low), high=float(high))


@lru_cache(maxsize=32)
def _problem_weights(name: str, count: int) -> NDArray[np.float64]:
    """[R, P]: how often each is drawn, as shares."""
    rng = np.random.default_rng(derive_seed("bootstrap", name, count))
    return np.asarray(rng.multinomial(count, np.full(count, 1.0 / count), size=_RESAMPLES) / count)


@lru_cache(maxsize=32)
def _seed_weights(count: int) -> NDArray[np.float64]:
    """[R, S], rows of sum 1: over values x of the seeds, Σ w x is x̄ + t s / √S. Every draw has its mirror image."""
    if count == 1:
        return np.ones((_RESAMPLES, 1))
    rng = np.random.default_rng(derive_seed("bootstrap", "seeds", count))
    normal = rng.standard_normal((_RESAMPLES // 2, count))
    normal -= normal.mean(axis=1, keepdims=True)  # Σ of normal · x is then N(0, (S − 1) s²)
    spread = normal * np.sqrt(1.0 / (count * rng.chisquare(count - 1, (_RESAMPLES // 2, 1))))
    return np.concatenate([1.0 / count + spread, 1.0 / count - spread])
