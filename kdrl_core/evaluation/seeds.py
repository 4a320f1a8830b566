"""Accuracy over several seeds of the same training, and how sure it is.

Two things are drawn by chance: the problems of a benchmark, and the seeds. They are crossed, since every seed answers
the same problems; so the bootstrap draws both anew, seeds and problems with replacement and independently, and takes
the mean over what is drawn (percentile interval, 95 %). With one seed this is the bootstrap over problems alone. The
same draws serve every model that has as many seeds and problems, which makes differences paired: what a hard problem
takes from both cancels out.

With few seeds the interval is too narrow, as bootstraps of few draws are: over 5 seeds by about 11 % (the square root
of 4/5) where seeds are all that varies.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kdrl_core.evaluation.statistics import Accuracy
from kdrl_core.ledger.seeds import derive_seed

_RESAMPLES = 2_000

Scores = NDArray[np.float64]
"""[S, P]: of each seed and problem the share of right samples."""


def over_seeds(scores: Mapping[str, Scores]) -> Accuracy:
    """Mean of the benchmarks' accuracies (Table 1's avg; of one benchmark its own) with its interval.

    Args:
        scores: by benchmark; all with the same seeds in the same order.
    """
    return _summary(np.mean([array.mean() for array in scores.values()]), _draws(scores))


def paired_difference(ours: Mapping[str, Scores], theirs: Mapping[str, Scores]) -> Accuracy:
    """`over_seeds` of ours − theirs: the same seeds and problems in the same order."""
    return over_seeds({name: array - theirs[name] for name, array in ours.items()})


def _draws(scores: Mapping[str, Scores]) -> NDArray[np.float64]:
    num_seeds = len(next(iter(scores.values())))
    seeds = _weights("seeds", num_seeds)
    means = [np.einsum("rs,sp,rp->r", seeds, array, _weights(name, array.shape[1])) for name, array in scores.items()]
    return np.asarray(np.mean(means, axis=0))


def _weights(name: str, count: int) -> NDArray[np.float64]:
    """[R, count]: how often each is drawn, as shares."""
    rng = np.random.default_rng(derive_seed("bootstrap", name, count))
    return np.asarray(rng.multinomial(count, np.full(count, 1.0 / count), size=_RESAMPLES) / count)


def _summary(mean: float | np.floating, draws: NDArray[np.float64]) -> Accuracy:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Accuracy(mean=float(mean), low=float(low), high=float(high))
