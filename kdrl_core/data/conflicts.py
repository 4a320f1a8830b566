"""Questions that stand in several rows with different answers. At least one of their answers is wrong."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.config import VerificationConfig
from kdrl_core.types import VerdictKind
from kdrl_core.verify import Verifier
from kdrl_core.verify.values import shortened

_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """One question with its rows."""

    rows: tuple[int, ...]
    """Positions in the table."""
    answers: tuple[str, ...]
    places: tuple[str, ...]
    """File and row of each, or its problem_id."""

    def __str__(self) -> str:
        shown = [f"{place} {shortened(answer)}" for place, answer in zip(self.places, self.answers, strict=True)]
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        return f"{', '.join(shown[:_SHOWN])}{more}"


def find_conflicts(
    problems: pa.Table, keys: npt.NDArray[np.int64], place: Callable[[int], str], limits: VerificationConfig
) -> list[Conflict]:
    """The questions whose answers differ, in the order of their first rows. Other spellings of one value, such as `0.5`
    and `1/2`, do not differ: the verifier compares them.

    Args:
        problems: in PROBLEM_SCHEMA; the questions are not read.
        keys: [rows] equal for rows with the same normalised question.
        place: position → file and row; empty: it is not known.
        limits: of the verifier.
    """
    groups = _differing(problems, keys)
    if not groups:
        return []
    answers = {rows: problems["answer"].take(pa.array(rows)).to_pylist() for rows in groups}
    # In sorted order, so that the order of the rows does not decide which answer is the truth of the comparison.
    pairs = {
        rows: [(rf"\boxed{{{other}}}", truth) for other in others]
        for rows, (truth, *others) in ((rows, sorted(set(answers[rows]))) for rows in groups)
    }
    with Verifier(**limits.pool_options) as verifier:
        verdicts = iter(verifier.verify_batch([pair for each in pairs.values() for pair in each], require_format=False))
    found = []
    for rows in groups:
        own = [next(verdicts) for _ in pairs[rows]]
        if any(verdict.kind is not VerdictKind.CORRECT for verdict in own):
            names = problems["problem_id"].take(pa.array(rows)).to_pylist()
            places = tuple(place(row) or name for row, name in zip(rows, names, strict=True))
            found.append(Conflict(rows=rows, answers=tuple(answers[rows]), places=places))
    return found


def _differing(problems: pa.Table, keys: npt.NDArray[np.int64]) -> list[tuple[int, ...]]:
    """The rows of each question whose answers are different texts."""
    repeated = np.flatnonzero(np.bincount(keys)[keys] > 1) if len(keys) else keys
    if not len(repeated):
        return []
    columns = {"key": pa.array(keys[repeated]), "answer": problems["answer"].take(pa.array(repeated))}
    counts = pa.table(columns).group_by("key").aggregate([("answer", "count_distinct")])
    several = counts.filter(pc.greater(counts["answer_count_distinct"], 1))["key"]
    rows: defaultdict[int, list[int]] = defaultdict(list)
    for row in repeated[np.isin(keys[repeated], several.to_numpy())].tolist():
        rows[int(keys[row])].append(row)
    return sorted(tuple(each) for each in rows.values())
