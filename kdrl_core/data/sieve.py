"""The rules of the data filter. Each is a method that keeps some of the rows alive and counts the rows that it drops.

The rules need only small columns (labels, codes, ids, answers), so the same code serves a table in memory and files
that do not fit. `kdrl_core.data.filter` describes the rules, their order and the reasons for it.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from math import ceil

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.config import StageConfig, VerificationConfig
from kdrl_core.data.conflicts import find_conflicts
from kdrl_core.data.decontamination import Overlap
from kdrl_core.data.filter_report import RuleCount
from kdrl_core.data.labels import MISSING_LABEL, Labels, Rows, label_column, label_names
from kdrl_core.errors import DataError
from kdrl_core.types import VerdictKind
from kdrl_core.verify import Verifier
from kdrl_core.verify.accuracy import FAILED_COMPARISON, PARTLY_READ, UNREADABLE_TRUTH
from kdrl_core.verify.values import shortened

_NUMBER = re.compile(r"[+-]?\d{1,40}(?:\.\d{1,40}|/[1-9]\d{0,40})?|\\frac\{\d{1,40}\}\{[1-9]\d{0,40}\}", re.ASCII)
_PROBE = r"\boxed{98765432123456789}"
"""An answer that is not the ground truth of any problem."""
_OFF = "off"
_SHOWN = 3


class Sieve:
    """The rows that are still alive, and the count of each rule so far.

    Args:
        problems: in PROBLEM_SCHEMA; the questions are not read.
        keys: [rows] equal for rows with the same normalised question.
        digests: rows → hash of each question, not normalised. It ranks duplicates, whatever the order of the input.
        labels: [rows] failures by label, as from `label_column`, and the names of all labels in the data; None: read
            them from `problems`.
    """

    def __init__(
        self,
        *,
        stage: str,
        config: StageConfig,
        problems: pa.Table,
        keys: Rows,
        digests: Callable[[pa.Array], pa.ChunkedArray],
        labels: tuple[Mapping[str, Labels], set[str]] | None = None,
    ) -> None:
        self.stage = stage
        self.config = config
        self.data = config.data
        self.problems = problems
        self.num_samples = self.data.difficulty.num_samples
        self.alive: Rows = np.arange(problems.num_rows, dtype=np.int64)
        self.counts: list[RuleCount] = []
        self.notes: list[str] = []
        """What is told of single rows, with their places."""
        self._keys = keys
        self._digests = digests
        if labels is None:
            columns = {name: label_column(problems, name) for name in self.data.difficulty.names}
            labels = columns, label_names(problems)
        self.student = labels[0][self.data.difficulty.student]
        self.others = [labels[0][name] for name in self.data.difficulty.others]
        self._known_labels = labels[1]

    def note(self, rule: str, dropped: int, description: str) -> None:
        """Count what a rule dropped."""
        self.counts.append(RuleCount(rule=rule, dropped=dropped, description=description))

    def keep(self, rule: str, mask: npt.NDArray[np.bool_], description: str) -> None:
        """Keep the rows of `alive` where `mask` is true."""
        self.note(rule, len(self.alive) - int(mask.sum()), description)
        self.alive = self.alive[mask]

    def drop_conflicting(self, limits: VerificationConfig, place: Callable[[int], str]) -> None:
        """conflicting_answers: a question whose rows have different answers. `place` names the file and row of a
        position, or is empty. With conflicting_answers=fail, raises DataError."""
        choice = self.data.conflicting_answers
        is_kept = np.ones(len(self.alive), dtype=bool)
        description = "one question with different answers"
        if conflicts := find_conflicts(self.problems, self._keys, limits):
            shown = [
                f"{place(rows[0]) or self.problems['problem_id'][rows[0]]} {shortened(answer)}"
                for answer, rows in list(conflicts[0].items())[:_SHOWN]
            ]
            number = f"{len(conflicts)} question{'s' * (len(conflicts) > 1)} with different answers"
            told = f"{number}, the first: {', '.join(shown)}"
            if choice == "fail":
                raise DataError(
                    f"{self.stage}: {told}; correct the answers, remove the wrong rows, or set "
                    f"{self.stage}.data.conflicting_answers=drop or keep"
                )
            description = number if choice == "drop" else f"off: {number}, one row of each stays"
            self.notes.append(f"conflicting_answers: {told}")
        if choice == "drop":
            is_kept[[row for answers in conflicts for rows in answers.values() for row in rows]] = False
        self.keep("conflicting_answers", is_kept, description)

    def drop_duplicates(self) -> None:
        """duplicates: of rows with the same normalised question, keep the best labelled; ties: first by content."""
        codes = self._keys
        is_kept = np.ones(len(codes), dtype=bool)
        repeated = np.flatnonzero(np.bincount(codes)[codes] > 1) if len(codes) else codes
        if len(repeated):
            rows = self.problems.take(pa.array(repeated))
            columns = {"problem_id": rows["problem_id"], "digest": self._digests(pa.array(repeated))}
            columns |= {name: rows[name] for name in ("answer", "source")}
            labels = np.stack([self.student, *self.others], axis=1)[repeated]
            columns["code"] = pa.array(codes[repeated])
            columns["unlabelled"] = pa.array((labels == MISSING_LABEL).sum(axis=1))
            columns |= {f"label{index}": pa.array(labels[:, index]) for index in range(labels.shape[1])}
            keys = ["code", "unlabelled", *(name for name in columns if name not in ("code", "unlabelled"))]
            order = pc.sort_indices(pa.table(columns), [(key, "ascending") for key in keys]).to_numpy()
            ordered = codes[repeated][order]
            is_kept[repeated[order[1:][ordered[1:] == ordered[:-1]]]] = False
        self.keep("duplicates", is_kept[self.alive], "the same question again, up to white space")

    def apply_label_rules(self) -> None:
        """missing_labels, drop_passes_at_least, drop_all_failed, min_pass_rate. Rows with unknown labels pass."""
        data, n = self.data, self.num_samples
        self._missing_labels()

        bound = data.drop_passes_at_least
        student = self.student[self.alive]
        is_easy = (student != MISSING_LABEL) & (n - student >= (n + 1 if bound is None else bound))
        self.keep(
            "drop_passes_at_least",
            ~is_easy,
            _OFF if bound is None else f"student passes ≥ {bound} of {n} (failures ≤ {n - bound}), B.1.1",
        )

        labels = np.stack([self.student, *self.others], axis=1)[self.alive]
        is_hopeless = (labels == n).all(axis=1) & data.drop_all_failed
        self.keep(
            "drop_all_failed",
            ~is_hopeless,
            f"{n} failures of {n} for every label, B.1.1" if data.drop_all_failed else _OFF,
        )

        rate = data.min_pass_rate
        least = 0 if rate is None else ceil(_exact(rate) * n)
        student = self.student[self.alive]
        is_hard = (student != MISSING_LABEL) & (n - student < least)
        self.keep(
            "min_pass_rate",
            ~is_hard,
            _OFF if rate is None else f"student pass rate < {rate:g} (failures > {n - least}), B.3",
        )

    def _missing_labels(self) -> None:
        data = self.data
        needed: dict[str, Labels] = {}
        is_read = (data.drop_passes_at_least, data.max_unsolved_share, data.min_pass_rate)
        if data.drop_all_failed or any(bound is not None for bound in is_read):
            needed[data.difficulty.student] = self.student
        if data.drop_all_failed:
            needed |= dict(zip(data.difficulty.others, self.others, strict=True))
        is_missing = np.zeros(len(self.alive), dtype=bool)
        for label in needed.values():
            is_missing |= label[self.alive] == MISSING_LABEL
        if is_missing.any() and data.missing_labels == "fail":
            raise self._no_label(needed, is_missing)
        if not needed:
            description = "off: no rule reads a label"
        elif data.missing_labels == "drop":
            description = f"no label of {', '.join(needed)}"
        elif is_missing.any():
            description = f"off: {int(is_missing.sum())} rows without a label of {', '.join(needed)} pass"
        else:
            description = f"off: every row has a label of {', '.join(needed)}"
        self.keep("missing_labels", ~is_missing | (data.missing_labels != "drop"), description)

    def _no_label(self, needed: dict[str, Labels], is_missing: npt.NDArray[np.bool_]) -> DataError:
        known = sorted(self._known_labels)
        if unknown := [name for name in needed if name not in known]:
            return DataError(
                f"{self.stage}: no row has the difficulty label {', '.join(unknown)} (labels found: "
                f"{', '.join(known) or 'none'}); "
                f"set {self.stage}.data.difficulty or {self.stage}.data.missing_labels=keep"
            )
        first = pc.min(self.problems["problem_id"].take(pa.array(self.alive[is_missing])))
        return DataError(
            f"{self.stage}: {int(is_missing.sum())} of {len(self.alive)} problems lack a difficulty label of "
            f"{', '.join(needed)}, first {first}; set {self.stage}.data.missing_labels=drop or keep"
        )

    def drop_long_prompts(self, is_short: npt.NDArray[np.bool_]) -> None:
        """max_prompt_tokens; `is_short` is aligned with `alive`."""
        self.keep("max_prompt_tokens", is_short, f"prompt longer than {self.config.max_prompt_tokens} tokens, B.1.1")

    def drop_contaminated(self, overlaps: Sequence[Overlap | None] | None) -> None:
        """decontamination; `overlaps` is aligned with `alive`; None: the rule is off."""
        config = self.data.decontamination
        if config is None or overlaps is None:
            self.note("decontamination", 0, _OFF)
            return
        found = Counter(overlap.benchmark for overlap in overlaps if overlap is not None)
        counts = ", ".join(f"{number} {name}" for name, number in sorted(found.items())) or "none"
        self.keep(
            "decontamination",
            np.array([overlap is None for overlap in overlaps], dtype=bool),
            f"shares ≥ {config.min_overlap:g} of its {config.ngram}-grams with a benchmark problem: {counts}",
        )

    def drop_unparsable(self, limits: VerificationConfig) -> None:
        """unparsable_answers. With unparsable_answers=fail, raises DataError for the first of them."""
        choice = self.data.unparsable_answers
        if choice == "keep":
            self.note("unparsable_answers", 0, _OFF)
            return
        answers = self.problems["answer"].take(pa.array(self.alive))
        bad, partly = unparsable_answers(pc.unique(answers).to_pylist(), limits)
        is_bad = pc.is_in(answers, value_set=pa.array(sorted(bad), pa.string()))
        if bad and choice == "fail":
            first = pc.min(self.problems["problem_id"].take(pa.array(self.alive)).filter(is_bad)).as_py()
            raise DataError(
                f"{self.stage}: math-verify cannot parse the answers of {pc.sum(is_bad)} problems, first {first}; "
                f"correct them or set {self.stage}.data.unparsable_answers=drop"
            )
        shown = ", ".join(repr(answer[:20]) for answer in sorted(bad)[:3])
        description = "ground truth that math-verify cannot parse" + (f": {shown}" if bad else "")
        self.keep("unparsable_answers", ~is_bad.to_numpy(), description)
        if partly:
            count = pc.sum(pc.is_in(answers, value_set=pa.array(sorted(partly), pa.string())))
            self.notes.append(
                f"unparsable_answers: {count} ground truths are readable only in part, so responses are compared with "
                f"their text: {', '.join(repr(answer[:40]) for answer in sorted(partly)[:3])}"
            )

    def sample(self, seed: int) -> None:
        """max_unsolved_share and max_problems. Both choose rows by rank; the second keeps the cap of the first."""
        data, n = self.data, self.num_samples
        share = None if data.max_unsolved_share is None else _exact(data.max_unsolved_share)
        student = self.student[self.alive]
        is_unsolved = student == n
        num_solved = int(((student != MISSING_LABEL) & ~is_unsolved).sum())
        chosen = np.ones(len(self.alive), dtype=bool)
        description = _OFF
        if share is not None:
            unsolved = self._ranked(np.flatnonzero(is_unsolved), seed, "max_unsolved_share")
            limit = _cap(num_solved, len(unsolved), share)
            chosen[unsolved[limit:]] = False
            description = (
                f"student fails all {n}: at most {float(share):g} of the result, "
                f"kept {limit} of {len(unsolved)} beside {num_solved} solved, B.1.1"
            )
        self.keep("max_unsolved_share", chosen, description)

        size = data.max_problems
        chosen = np.ones(len(self.alive), dtype=bool)
        if size is not None and size < len(self.alive):
            ranked = self._ranked(np.arange(len(self.alive)), seed, "max_problems")
            student = self.student[self.alive][ranked]
            unsolved, others = ranked[student == n], ranked[student != n]
            solved_among = np.cumsum(np.insert(student[student != n] != MISSING_LABEL, 0, False))
            num_unsolved = int((student[:size] == n).sum())
            while share is not None and num_unsolved > 0:
                num_others = min(size - num_unsolved, len(others))
                if num_unsolved <= _cap(int(solved_among[num_others]), num_unsolved, share):
                    break
                num_unsolved -= 1
            chosen[:] = False
            chosen[unsolved[:num_unsolved]] = True
            chosen[others[: size - num_unsolved]] = True
        self.keep("max_problems", chosen, _OFF if size is None else f"a seeded sample of {size} is kept")

    def alive_sorted(self) -> Rows:
        """The rows alive, by problem_id."""
        ids = self.problems["problem_id"].take(pa.array(self.alive))
        rows: Rows = self.alive[pc.sort_indices(ids).to_numpy()]
        return rows

    def _ranked(self, positions: Rows, seed: int, rule: str) -> Rows:
        """Positions in `alive`, in the order of a hash of (seed, rule, stage, problem_id)."""
        ids: Sequence[str] = self.problems["problem_id"].take(pa.array(self.alive[positions])).to_pylist()
        prefix = hashlib.sha256(f"{seed}\0{rule}\0{self.stage}\0".encode())
        ranks: list[tuple[bytes, int]] = []
        for problem_id, position in zip(ids, positions.tolist(), strict=True):
            digest = prefix.copy()
            digest.update(problem_id.encode())
            ranks.append((digest.digest(), position))
        return np.array([position for _, position in sorted(ranks)], dtype=np.int64)


def _cap(num_solved: int, num_unsolved: int, share: Fraction) -> int:
    """The largest number of unsolved rows u ≤ num_unsolved with u ≤ share · (num_solved + u), in exact arithmetic."""
    if share == 1:
        return num_unsolved
    return min(num_unsolved, share.numerator * num_solved // (share.denominator - share.numerator))


def _exact(share: float) -> Fraction:
    """0.1 as one tenth, not as the nearest double."""
    return Fraction(str(share))


def unparsable_answers(answers: Iterable[str], limits: VerificationConfig) -> tuple[set[str], set[str]]:
    """The answers that cannot be read, so that hardly a response to their problem could be found right, and those that
    can be read only in part, which are compared as text.

    The verifier's own killable workers read them: each distinct truth is compared with a number, and the verdict says
    whether the truth can be read. A truth that exhausts time or memory counts as unreadable. Plain numbers and
    fractions need no worker.
    """
    doubtful = sorted({answer for answer in answers if not _NUMBER.fullmatch(answer)})
    if not doubtful:
        return set(), set()
    with Verifier(**limits.pool_options) as verifier:
        verdicts = verifier.verify_batch([(_PROBE, answer) for answer in doubtful], require_format=False)
    failed = (VerdictKind.TIMEOUT, VerdictKind.ERROR)
    judged = list(zip(doubtful, verdicts, strict=True))
    bad = {
        answer
        for answer, verdict in judged
        if verdict.kind in failed or verdict.reason.startswith((UNREADABLE_TRUTH, FAILED_COMPARISON))
    }
    return bad, {answer for answer, verdict in judged if verdict.reason == PARTLY_READ}
