"""Accuracy on a benchmark, of one model or over several seeds of the same training, with a 95 % interval.

Two things are random: the problems of a benchmark, and the seeds. They are crossed, since every seed answers the same
problems. So both are drawn anew, independently of each other; the interval is the 2.5 and 97.5 percentile of the drawn
means. Problems are many: they are drawn with replacement (bootstrap). Seeds are few, and a bootstrap's interval would
be far too narrow (over 5 seeds its half-width is 0.63 of the right one). So the mean over seeds is drawn from Student's
t with S − 1 degrees of freedom around the observed mean, scaled by the spread of the seeds. This is exact if only the
seeds vary and are normally distributed. With one seed this is the bootstrap over problems alone. All models with the
same number of seeds and problems share the same draws, so differences are paired: a problem that is hard for both
models cancels out.

A bootstrap draws nothing that it has not seen. If all problems of a benchmark have the same score, such as 0, every
draw is the same, and the interval would be a point. If at most three problems differ from the others, more than 2.5 %
of the draws have none of them (e⁻³ = 5 %), and the interval ends at that point. Then each end is the wider one of the
bootstrap's and of Wilson's score interval. Wilson's n is the number of problems, however many samples and seeds there
are, since those answer the same problems: 0 of 256 gives 0 to 1.5 %. For a difference of two accuracies d, the same is
asked of the problems that tell the two apart: of n there are none, so Wilson's interval says that their share is at
most z² / (n + z²), and each of them can change d by at most 1 − d or 1 + d: two times 0 of 256 differ by −1.5 to 1.5
points. (For two zeros this is Newcombe's interval, too.) In a mean of benchmarks, what an interval is widened by is
added as squares.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, sqrt
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from kdrl_core.ledger.names import derive_seed
from kdrl_core.verify.normalise import vote_of

_RESAMPLES, _SEED_RESAMPLES = 1_000, 4_000
_Z = 1.959964
"""97.5 % point of the normal distribution."""
_FEW = 3
"""So many problems may differ from the others without the bootstrap's interval reaching away from those."""

Scores = NDArray[np.float64]
"""[S, P]: share of right samples of each seed and problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Mean over problems of the share of right samples, in [0, 1], with a 95 % interval."""

    mean: float
    low: float
    high: float


def accuracy(correct: Sequence[Sequence[float]], *, seed: int) -> Accuracy:
    """Avg@k of a benchmark with a percentile bootstrap over problems, and Wilson's interval where (almost) all problems
    are alike.

    Args:
        correct: accuracy rewards of the k samples, per problem.
        seed: of the bootstrap.
    """
    per_problem = np.array([np.mean(samples) for samples in correct])
    rng = np.random.default_rng(seed)
    means = rng.choice(per_problem, size=(_RESAMPLES, len(per_problem))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    found = Accuracy(mean=float(per_problem.mean()), low=float(low), high=float(high))
    if not _almost_alike(per_problem):
        return found
    floor = wilson(found.mean, len(per_problem))
    return Accuracy(mean=found.mean, low=min(found.low, floor.low), high=max(found.high, floor.high))


def wilson(share: float, count: int) -> Accuracy:
    """Wilson's score interval (95 %) of a share among `count` problems. It is not a point for a share of 0 or 1."""
    center = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    return Accuracy(mean=share, low=min(share, max(0.0, center - half)), high=max(share, min(1.0, center + half)))


def unseen_difference(difference: float, count: int) -> Accuracy:
    """Interval (95 %) of a difference of two accuracies that is the same on each of `count` problems."""
    share = wilson(0.0, count).high
    return Accuracy(
        mean=difference, low=difference - share * (1 + difference), high=difference + share * (1 - difference)
    )


def _almost_alike(per_problem: NDArray[np.float64]) -> bool:
    """Whether at most `_FEW` problems differ from the most frequent value."""
    counts = np.unique(per_problem.round(9), return_counts=True)[1]
    return len(per_problem) - int(counts.max()) <= _FEW


def standard_error(correct: Sequence[Sequence[float]]) -> float:
    """Standard error of Avg@k over problems; 0 where all problems are alike, or there is only one."""
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

    Answers are equal if `vote_of` spells them alike; the vote uses no ground truth. Tied answers share the win equally
    (the expected value of a random pick). A response without an answer casts no vote. Without any vote the accuracy
    is 0.

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


def over_seeds(scores: Mapping[str, Scores]) -> Accuracy:
    """Mean of the benchmarks' accuracies (Table 1's avg) with its interval, clipped to [0, 1].

    Args:
        scores: by benchmark; all with the same seeds in the same order.
    """
    found = _widened(scores, wilson)
    return Accuracy(mean=found.mean, low=max(0.0, found.low), high=min(1.0, found.high))


def accuracy_difference(ours: Mapping[str, Scores], theirs: Mapping[str, Scores]) -> Accuracy:
    """Ours − theirs as `over_seeds`, in [−1, 1]. Both have the same seeds and problems in the same order."""
    found = _widened({name: array - theirs[name] for name, array in ours.items()}, unseen_difference)
    return Accuracy(mean=found.mean, low=max(-1.0, found.low), high=min(1.0, found.high))


def paired_difference(ours: Mapping[str, Scores], theirs: Mapping[str, Scores]) -> Accuracy:
    """As `accuracy_difference`, of quantities that have no largest value, such as lengths: never widened, nor
    clipped."""
    return _summary({name: array - theirs[name] for name, array in ours.items()})


def _widened(scores: Mapping[str, Scores], floor: Callable[[float, int], Accuracy]) -> Accuracy:
    """The mean over benchmarks with its interval; wider where almost all problems of a benchmark are alike."""
    found = _summary(scores)
    down = up = 0.0
    for name, array in scores.items():
        if _almost_alike(array.mean(axis=0)):
            drawn = _summary({name: array})
            least = floor(drawn.mean, array.shape[1])
            down += max(0.0, (least.mean - least.low) ** 2 - (drawn.mean - drawn.low) ** 2) / len(scores) ** 2
            up += max(0.0, (least.high - least.mean) ** 2 - (drawn.high - drawn.mean) ** 2) / len(scores) ** 2
    return Accuracy(
        mean=found.mean,
        low=found.mean - sqrt((found.mean - found.low) ** 2 + down) if down else found.low,
        high=found.mean + sqrt((found.high - found.mean) ** 2 + up) if up else found.high,
    )


def _summary(scores: Mapping[str, Scores]) -> Accuracy:
    num_seeds = len(next(iter(scores.values())))
    seeds = _seed_weights(num_seeds)
    means = [((_problem_weights(name, a.shape[1]) @ a.T) * seeds).sum(axis=1) for name, a in scores.items()]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    mean = float(np.mean([array.mean() for array in scores.values()]))
    return Accuracy(mean=mean, low=float(low), high=float(high))


@lru_cache(maxsize=32)
def _problem_weights(name: str, count: int) -> NDArray[np.float64]:
    """[R, P]: share of the draws that fall on each problem."""
    rng = np.random.default_rng(derive_seed("bootstrap", name, count))
    return np.asarray(rng.multinomial(count, np.full(count, 1.0 / count), size=_SEED_RESAMPLES) / count)


@lru_cache(maxsize=32)
def _seed_weights(count: int) -> NDArray[np.float64]:
    """[R, S], each row sums to 1: with the seeds' values x, Σ w x is x̄ + t s / √S. Every draw has its mirror image."""
    if count == 1:
        return np.ones((_SEED_RESAMPLES, 1))
    rng = np.random.default_rng(derive_seed("bootstrap", "seeds", count))
    normal = rng.standard_normal((_SEED_RESAMPLES // 2, count))
    normal -= normal.mean(axis=1, keepdims=True)  # Σ of normal · x is then N(0, (S − 1) s²)
    spread = normal * np.sqrt(1.0 / (count * rng.chisquare(count - 1, (_SEED_RESAMPLES // 2, 1))))
    return np.concatenate([1.0 / count + spread, 1.0 / count - spread])
