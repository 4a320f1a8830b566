"""Questions that stand in several rows with different answers. At least one of their answers is wrong."""

from collections import defaultdict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.config import VerificationConfig
from kdrl_core.types import VerdictKind
from kdrl_core.verify import Verifier


def find_conflicts(
    problems: pa.Table, keys: npt.NDArray[np.int64], limits: VerificationConfig
) -> list[dict[str, list[int]]]:
    """For each question whose answers differ: answer → positions of its rows. The questions and the answers are in the
    order of their first rows. Answers that the verifier finds equal, such as `0.5` and `1/2`, do not differ.

    Args:
        problems: in PROBLEM_SCHEMA; the questions are not read.
        keys: [rows] equal for rows with the same normalised question.
        limits: of the verifier.
    """
    groups = _differing(problems, keys)
    if not groups:
        return []
    # In sorted order, so that the order of the rows does not decide which answer is the truth of the comparison.
    pairs = [[(rf"\boxed{{{other}}}", truth) for other in others] for truth, *others in map(sorted, groups)]
    with Verifier(**limits.pool_options) as verifier:
        verdicts = iter(verifier.verify_batch([pair for each in pairs for pair in each], require_format=False))
    equal = [[next(verdicts).kind is VerdictKind.CORRECT for _ in each] for each in pairs]
    return [group for group, are_equal in zip(groups, equal, strict=True) if not all(are_equal)]


def _differing(problems: pa.Table, keys: npt.NDArray[np.int64]) -> list[dict[str, list[int]]]:
    """The questions whose answers are different texts."""
    repeated = np.flatnonzero(np.bincount(keys)[keys] > 1) if len(keys) else keys
    if not len(repeated):
        return []
    answers = problems["answer"].take(pa.array(repeated))
    grouped = pa.table({"key": keys[repeated], "answer": answers}).group_by("key")
    counts = grouped.aggregate([("answer", "count_distinct")])
    several = counts.filter(pc.greater(counts["answer_count_distinct"], 1))["key"].to_numpy()
    is_several = np.isin(keys[repeated], several)
    rows = repeated[is_several]
    found: defaultdict[int, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    texts = answers.filter(pa.array(is_several)).to_pylist()
    for row, key, answer in zip(rows.tolist(), keys[rows].tolist(), texts, strict=True):
        found[key][answer].append(row)
    return [dict(group) for group in found.values()]
