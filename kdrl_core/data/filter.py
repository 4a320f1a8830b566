"""The data filter of B.1.1 and B.3: problems → the pool that a stage trains on.

d = failures of a label out of n = `difficulty.num_samples`; passes = n − d. The rules in order:

==================== =========================================================================================
malformed            rows that cannot be read (data.on_error=drop)
no_answer            the set says that the problem has no answer: `proof`, `notfound`
conflicting_answers  one question with different answers (data.conflicting_answers=keep: one row stays)
duplicates           the same question again, up to white space
missing_labels       a label is missing that one of the rules below needs (data.missing_labels=drop)
drop_passes_at_least passes of the student's label ≥ 15 of 16, that is d ≤ 1 (B.1.1 rule 1)
drop_all_failed      d = n for every label (B.1.1 rule 2)
min_pass_rate        passes / n below the bound (B.3)
max_prompt_tokens    the rendered prompt is longer (B.1.1 rule 4)
decontamination      overlaps a problem of the benchmarks (not in the paper; data.decontamination=null keeps them)
unparsable_answers   math-verify cannot parse the ground truth, so no response could be right (not in the paper)
max_unsolved_share   d = n for the student: at most 10 % **of the result** (B.1.1 rule 3)
max_problems         a seeded sample
==================== =========================================================================================

Departures. The paper lists the cap before the length rule. Here the cap comes last, because a later rule that removes
solved problems would push the share of unsolved ones above it. The sample of `max_problems` keeps the cap as well. A
problem without the student's label counts neither as solved nor as unsolved. The paper does not say whether repeated
problems of its sets stay: to drop them is kdrl's choice.

The result depends on the seed and not on the order of the input: rows are ranked by sha256(seed, rule, stage,
problem_id), ties among duplicates are broken by content, and the result is sorted by problem_id.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.config import ColumnsConfig, DataConfig, Recipe
from kdrl_core.data.decontamination import Decontaminator, Overlap
from kdrl_core.data.filter_report import FilterReport
from kdrl_core.data.labels import Rows, text_codes
from kdrl_core.data.normalize import normalize
from kdrl_core.data.prompts import ChatTokenizer, load_tokenizer, render_prompts
from kdrl_core.data.reading import READING_KEY, Reading
from kdrl_core.data.schema import POOL_SCHEMA, PROBLEM_SCHEMA
from kdrl_core.data.shapes import file_shape
from kdrl_core.data.sieve import Sieve
from kdrl_core.data.text import normalize_questions, question_digests
from kdrl_core.errors import DataError, RecipeError

_BATCH_ROWS = 32_768

_log = logging.getLogger(__name__)

QuestionCheck = tuple[npt.NDArray[np.bool_], list[Overlap | None] | None]
"""Per row, whether its prompt is short enough; per short row, its overlap (None: the rule is off)."""

_REMEDIES = {
    "malformed": "correct the files",
    "no_answer": "give problems with answers",
    "conflicting_answers": "correct the answers, or set {stage}.data.conflicting_answers=keep",
    "duplicates": "give more problems",
    "missing_labels": "set {stage}.data.missing_labels=keep, or give files with labels",
    "drop_passes_at_least": "raise {stage}.data.drop_passes_at_least or give harder problems",
    "drop_all_failed": "set {stage}.data.drop_all_failed=false or give easier problems",
    "min_pass_rate": "lower {stage}.data.min_pass_rate or give easier problems",
    "max_prompt_tokens": "raise {stage}.max_prompt_tokens or give shorter problems",
    "decontamination": "raise {stage}.data.decontamination.min_overlap or give other problems",
    "unparsable_answers": "correct the answers or set {stage}.data.unparsable_answers=keep",
    "max_unsolved_share": "raise {stage}.data.max_unsolved_share or give problems that the student solves",
    "max_problems": "raise {stage}.data.max_problems",
}


def filter_problems(
    table: pa.Table,
    recipe: Recipe,
    *,
    stage: str | None = None,
    tokenizer: ChatTokenizer | None = None,
) -> tuple[pa.Table, FilterReport]:
    """Apply the rules of one stage's `data` section, and render the prompts of the problems that are left.

    Args:
        table: PROBLEM_SCHEMA, or the raw columns of a known format.
        stage: the stage whose rules apply; default: the recipe's last.
        tokenizer: measures and renders prompts; default: the student's.

    Returns:
        the pool in POOL_SCHEMA, sorted by problem_id, and the report, whose counts add up.

    Raises:
        DataError: nothing is left, a needed label is missing (data.missing_labels=fail), a row is malformed
            (data.on_error=fail), or two different questions share a problem_id.
        ModelError: the student's tokenizer is missing or has no chat template.
        RecipeError: the recipe has no such stage.
    """
    stage = check_stage(recipe, stage)
    config = recipe.stage(stage)
    problems, reading = _normalized(table, config.data)
    questions = problems["question"]
    sieve = Sieve(
        stage=stage,
        config=config,
        problems=problems,
        keys=text_codes(normalize_questions(questions)),
        digests=lambda rows: question_digests(questions.take(rows)),
    )
    rendered: list[Prompts] = []

    def check_questions(alive: Rows) -> QuestionCheck:
        prompts = Prompts.render(questions, alive, recipe, tokenizer=tokenizer, limit=config.max_prompt_tokens)
        rendered.append(prompts)
        is_short = prompts.position[alive] >= 0
        if config.data.decontamination is None:
            return is_short, None
        kept = questions.take(pa.array(alive[is_short]))
        return is_short, Decontaminator(config.data.decontamination).find_all(kept.to_pylist())

    report = apply_rules(sieve, recipe, reading, check_questions)
    for note in sieve.notes:
        _log.warning("%s", note)
    return _pool(sieve, rendered[0]), report


def apply_rules(
    sieve: Sieve, recipe: Recipe, reading: Reading, check_questions: Callable[[Rows], QuestionCheck]
) -> FilterReport:
    """Apply all rules in their order.

    Args:
        reading: what was found while the rows were read.
        check_questions: rows → whether the prompt of each is short enough, and the overlaps of those that are short.

    Raises:
        DataError: nothing is left, or a rule refuses the data.
    """
    malformed, no_answer = reading.malformed.total, reading.no_answer.total
    sieve.note("malformed", malformed, "rows that cannot be read (data.on_error=drop)")
    sieve.note("no_answer", no_answer, "the set says that there is none: proof, notfound")
    sieve.drop_conflicting(recipe.verification, reading.place)
    sieve.drop_duplicates()
    _check_ids(sieve.problems, sieve.alive)
    sieve.apply_label_rules()
    is_short, overlaps = check_questions(sieve.alive)
    sieve.drop_long_prompts(is_short)
    sieve.drop_contaminated(overlaps)
    sieve.drop_unparsable(recipe.verification)
    sieve.sample(recipe.seed)
    rows_in = sieve.problems.num_rows + malformed + no_answer
    report = FilterReport(
        stage=sieve.stage,
        rows_in=rows_in,
        rules=tuple(sieve.counts),
        rows_out=len(sieve.alive),
        notes=(*reading.told(), *sieve.notes),
    )
    if report.rows_out == 0:
        raise _empty(report)
    return report


def check_stage(recipe: Recipe, stage: str | None) -> str:
    """The named stage, or the recipe's last. Raises RecipeError if the recipe does not have it."""
    stage = recipe.stages[-1] if stage is None else stage
    if stage not in recipe.stages:
        raise RecipeError(f"recipe {recipe.name} has no stage '{stage}'; it has {', '.join(recipe.stages)}")
    return stage


@dataclass(slots=True)
class Prompts:
    """Rendered prompts. `position[row]` is the place of a row's prompt in `texts` and `token_ids`; −1: it has none."""

    position: Rows
    texts: pa.ChunkedArray
    token_ids: pa.ChunkedArray

    @classmethod
    def render(
        cls, questions: pa.ChunkedArray, rows: Rows, recipe: Recipe, *, tokenizer: ChatTokenizer | None, limit: int
    ) -> Self:
        """Render the questions of `rows`, and keep the prompts of at most `limit` tokens."""
        position = np.full(len(questions), -1, dtype=np.int64)
        texts: list[pa.Array] = []
        token_ids: list[pa.Array] = []
        num_kept = 0
        if len(rows) and tokenizer is None:
            tokenizer = load_tokenizer(recipe.student)
        for start in range(0, len(rows), _BATCH_ROWS):
            assert tokenizer is not None
            batch = rows[start : start + _BATCH_ROWS]
            rendered = render_prompts(questions.take(pa.array(batch)).to_pylist(), tokenizer, recipe)
            fits = np.fromiter((len(ids) <= limit for _, ids in rendered), dtype=bool, count=len(batch))
            texts.append(pa.array([text for text, ids in rendered if len(ids) <= limit], pa.string()))
            token_ids.append(pa.array([ids for _, ids in rendered if len(ids) <= limit], pa.list_(pa.int32())))
            position[batch[fits]] = np.arange(num_kept, num_kept + fits.sum())
            num_kept += int(fits.sum())
        return cls(position, pa.chunked_array(texts, pa.string()), pa.chunked_array(token_ids, pa.list_(pa.int32())))


def _pool(sieve: Sieve, prompts: Prompts) -> pa.Table:
    """The rows that are left, in POOL_SCHEMA, sorted by problem_id."""
    rows = sieve.alive_sorted()
    taken = sieve.problems.take(pa.array(rows))
    student = sieve.student[rows]
    where = pa.array(prompts.position[rows])
    columns = {name: taken[name] for name in ("problem_id", "question", "answer", "source")}
    columns["stage"] = pa.array([sieve.stage] * len(rows), pa.string())
    columns["student_failures"] = pa.array(student, pa.int32(), mask=student < 0)
    columns["prompt"] = prompts.texts.take(where)
    columns["prompt_token_ids"] = prompts.token_ids.take(where)
    return pa.table([columns[name] for name in POOL_SCHEMA.names], schema=POOL_SCHEMA)


def _normalized(table: pa.Table, data: DataConfig) -> tuple[pa.Table, Reading]:
    """The table in PROBLEM_SCHEMA, and what was found while it was read."""
    if _is_normalized(table, data):
        return table, Reading.of(table)
    if {"problem_id", "question", "answer"} <= set(table.schema.names):  # kdrl's own columns, whatever the files have
        data = data.model_copy(update={"format": "problems", "columns": ColumnsConfig()})
    shape = file_shape(table.schema.names, data, origin="table")
    tables: list[pa.Table] = [PROBLEM_SCHEMA.empty_table()]
    reading, first_row = Reading(), 1
    for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
        numbers = range(first_row, first_row + batch.num_rows)
        found = normalize(
            batch, numbers, shape, origin="table", source="table", num_samples=data.difficulty.num_samples
        )
        reading.add(found, data)
        tables.append(found.problems)
        first_row += batch.num_rows
    reading.finish(data)
    return pa.concat_tables(tables), reading


def _is_normalized(table: pa.Table, data: DataConfig) -> bool:
    """Whether `read_problems` made the table and its labels are in range, so that its rows need no second check."""
    if READING_KEY not in (table.schema.metadata or {}) or not table.schema.equals(PROBLEM_SCHEMA):
        return False
    most = max((pc.max(chunk.items).as_py() or 0 for chunk in table["failures"].chunks), default=0)
    has_gaps = any(table[name].null_count for name in ("problem_id", "question", "answer", "source"))
    return most <= data.difficulty.num_samples and not has_gaps


def _check_ids(problems: pa.Table, alive: Rows) -> None:
    """Raise DataError if two different questions share a problem_id, since seeds and files are named by it."""
    problem_ids = problems["problem_id"]
    codes = text_codes(problem_ids.take(pa.array(alive)))
    counts = np.bincount(codes) if len(codes) else codes
    if (counts > 1).any():
        shared = pc.min(problem_ids.take(pa.array(alive[counts[codes] > 1])))
        sources = problems["source"].take(
            pa.array(alive[pc.equal(problem_ids.take(pa.array(alive)), shared).to_numpy()])
        )
        raise DataError(
            f"problem_id '{shared}' stands on more than one question "
            f"(source {', '.join(sorted(set(sources.to_pylist())))}); "
            "make the ids unique or leave the field out (ids are then made from the questions)"
        )


def _empty(report: FilterReport) -> DataError:
    if report.rows_in == 0:
        return DataError(
            f"{report.stage}: the input has no rows; give files with problems in {report.stage}.data.files"
        )
    worst = max(report.rules, key=lambda rule: rule.dropped)
    return DataError(
        f"{report.stage}: no problem is left of {report.rows_in}; rule {worst.rule} dropped the most, {worst.dropped} "
        f"({worst.description}); {_REMEDIES[worst.rule].format(stage=report.stage)}"
    )
