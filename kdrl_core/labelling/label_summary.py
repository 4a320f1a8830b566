"""Summary of a labelling: the histogram of failures, pass@k, and the shares of failed verdicts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import pyarrow as pa

from kdrl_core.types import FinishReason, VerdictKind


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSummary:
    """Counts over the problems that have the label now; shares and lengths over the responses sampled for it."""

    label: str
    num_samples: int
    num_problems: int
    num_labelled: int
    """Problems with the label, whether it was measured now or there before."""
    num_sampled: int
    """Problems whose label this call measured, or an earlier call that it continues."""
    num_too_long: int
    """Problems without the label because their prompt is longer than max_prompt_tokens."""
    histogram: tuple[int, ...]
    """[num_samples + 1]: problems with 0, 1, … failures; those in the last entry were never solved."""
    pass_at: dict[int, float]
    """k → mean over problems of the unbiased pass@k; 1 is the mean accuracy, num_samples the share solved at all."""
    timeout_share: float
    """Of the sampled responses: verdicts that hit verification.timeout_s and count as wrong."""
    error_share: float
    """Of the sampled responses: verdicts that broke (memory, ground truth) and count as wrong."""
    clip_ratio: float
    length_mean: float


def pass_at_k(failures: int, num_samples: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 − C(failures, k) / C(num_samples, k).

    Raises ValueError unless 0 ≤ failures ≤ num_samples and 1 ≤ k ≤ num_samples.
    """
    if not (0 <= failures <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"pass@{k} of {failures} failures out of {num_samples}: k and failures lie within the samples")
    return 1.0 - comb(failures, k) / comb(num_samples, k)


def summarize_labels(
    label: str, num_samples: int, failures: Sequence[int | None], samples: pa.Table, *, num_too_long: int
) -> LabelSummary:
    """Sum up.

    Args:
        failures: of every problem of the output; None without the label.
        samples: the responses, with columns sample, verdict, finish_reason and length.
    """
    known = [count for count in failures if count is not None]
    counts = Counter(known)
    ks = sorted({1, num_samples, *(2**i for i in range(1, num_samples.bit_length()) if 2**i <= num_samples)})
    kinds = Counter(samples["verdict"].to_pylist())
    total = max(1, len(samples))
    return LabelSummary(
        label=label,
        num_samples=num_samples,
        num_problems=len(failures),
        num_labelled=len(known),
        num_sampled=samples["sample"].to_pylist().count(0),
        num_too_long=num_too_long,
        histogram=tuple(counts[count] for count in range(num_samples + 1)),
        pass_at={k: sum(pass_at_k(count, num_samples, k) for count in known) / max(1, len(known)) for k in ks},
        timeout_share=kinds[VerdictKind.TIMEOUT.value] / total,
        error_share=kinds[VerdictKind.ERROR.value] / total,
        clip_ratio=samples["finish_reason"].to_pylist().count(FinishReason.LENGTH.value) / total,
        length_mean=sum(samples["length"].to_pylist()) / total,
    )
