"""Lengths of responses, of which only the mean and the longest are known:

    P(length > x) = (1 − x / longest)^(longest / mean − 1)

It is nearly exponential if the mean is far below the longest; if it is the longest, all are equal. Lengths are tokens.
"""

_GOLDEN = 0.6180339887498949


def response_lengths(count: int, *, mean: float, longest: float, engines: int = 1) -> list[float]:
    """The lengths of `count` responses that are spread as the distribution says; of `engines` that share them evenly,
    those of the one with the longest. In an order without trend."""
    ranks = range(0, count, engines)
    if mean >= longest:
        return [longest] * len(ranks)
    exponent = 1 / (longest / mean - 1)
    order = sorted(range(len(ranks)), key=lambda number: number * _GOLDEN % 1.0)
    return [longest * (1 - ((ranks[number] + 0.5) / count) ** exponent) for number in order]


def cut(mean: float, longest: float, limit: float) -> tuple[float, float]:
    """Mean and longest if responses are cut at `limit`."""
    if limit >= longest:
        return mean, longest
    return mean * (1 - (1 - limit / longest) ** (longest / mean)), limit


def mean_square(mean: float, longest: float) -> float:
    """Mean of the squared length."""
    return 2 * mean**2 * longest / (longest + mean)
