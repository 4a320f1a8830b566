"""The data filter over files of any size: three passes of record batches, the rules those of `filter_problems`.

1. Of every row keep what the label rules need: id, answer, source, labels, and hashes of the question. Duplicates and
   the label rules decide.
2. Of the rows alive read the questions again: prompt length, overlap with benchmarks. Then answers, cap and sample
   decide.
3. Of the rows alive write the problems, to one temporary file per range of problem_id; each is sorted and appended to
   the output, so that it is in order without having been in memory.

JSON arrays are read whole, since JSON has no record boundary; give JSON Lines or Parquet for large files.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdrl_core.config import DataConfig, Recipe
from kdrl_core.data.decontamination import Decontaminator, Overlap
from kdrl_core.data.filter import check_ids, check_stage, finished_report
from kdrl_core.data.prompts import ChatTokenizer, load_tokenizer, render_prompts
from kdrl_core.data.read import iter_problems
from kdrl_core.data.report import FilterReport
from kdrl_core.data.schema import PROBLEM_SCHEMA
from kdrl_core.data.sieve import Labels, Rows, Sieve, label_column, label_names
from kdrl_core.data.text import normalize_questions, question_digests
from kdrl_core.errors import DataError
from kdrl_core.ledger import replace_file

REPORT_KEY = b"kdrl.filter_report"
"""Metadata of the output's schema: the report as JSON."""

_ROWS_PER_RANGE = 65_536
_PROBE = "KDRLPROBE"

Progress = Callable[[str, int], None]
"""Called with the name of the pass and the rows read in it so far."""


def filter_files(
    recipe: Recipe,
    output: Path,
    *,
    stage: str | None = None,
    tokenizer: ChatTokenizer | None = None,
    on_progress: Progress | None = None,
) -> FilterReport:
    """Filter the files of one stage's `data` section into one Parquet file in PROBLEM_SCHEMA, sorted by problem_id.

    Memory holds ids, answers, labels and hashes of all rows (about 150 bytes a row), never their questions.

    Args:
        output: written atomically; what stands there is replaced. The same rows give the same bytes in any order.
        stage: the stage whose rules apply; default: the recipe's last.
        tokenizer: measures prompts; default: the student's.

    Returns:
        the report, which also stands in the output's schema metadata.

    Raises:
        DataError, ModelError, RecipeError: as `filter_problems`; or the files changed while they were read.
    """
    stage = check_stage(recipe, stage)
    config = recipe.stage(stage)
    report_progress = on_progress or (lambda _name, _rows: None)
    measure = _LengthRule(recipe, tokenizer or load_tokenizer(recipe.student), config.max_prompt_tokens)
    decontaminator = None if config.data.decontamination is None else Decontaminator(config.data.decontamination)

    first = _first_pass(config.data, report_progress)
    slim = first.problems
    sieve = Sieve(
        stage=stage, config=config, problems=slim, keys=first.keys, digests=first.digests.take, labels=first.labels
    )
    sieve.note("malformed", first.malformed, "rows that cannot be read (data.on_error=drop)")
    sieve.drop_duplicates()
    check_ids(slim["problem_id"], sieve.alive)
    sieve.apply_label_rules()

    is_short = np.zeros(len(sieve.alive), dtype=bool)
    overlaps: list[Overlap | None] = []
    for places, problems in _alive_batches(config.data, sieve, report_progress, "checking prompts"):
        questions = problems["question"].to_pylist()
        fits = measure.fits(questions)
        is_short[places] = fits
        if decontaminator is not None:
            kept = (question for question, is_kept in zip(questions, fits, strict=True) if is_kept)
            overlaps += decontaminator.find_all(kept)
    sieve.drop_long_prompts(is_short)
    sieve.drop_contaminated(overlaps if decontaminator is not None else None)
    sieve.drop_unparsable(recipe.verification)
    sieve.sample(recipe.seed)
    report = finished_report(sieve, slim.num_rows + first.malformed)

    schema = PROBLEM_SCHEMA.with_metadata({REPORT_KEY: json.dumps(report.to_json()).encode()})
    replace_file(output, lambda path: _write_sorted(path, schema, config.data, sieve, report_progress))
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _First:
    """Every row without its question and its map of labels, which are most of it."""

    problems: pa.Table
    keys: Rows
    digests: pa.ChunkedArray
    labels: tuple[dict[str, Labels], set[str]]
    malformed: int


def _first_pass(data: DataConfig, report_progress: Progress) -> _First:
    tables: list[pa.Table] = [PROBLEM_SCHEMA.empty_table()]
    digests: list[pa.Array] = []
    keys = [np.zeros(0, dtype=np.int64)]
    labels: dict[str, list[Labels]] = {name: [np.zeros(0, dtype=np.int32)] for name in data.difficulty.names}
    found: set[str] = set()
    malformed = num_rows = 0
    question, failures = (PROBLEM_SCHEMA.field(name) for name in ("question", "failures"))
    for table, num_faults in iter_problems(data):
        malformed += num_faults
        num_rows += table.num_rows
        digests += question_digests(table["question"]).chunks
        # 8 bytes of a hash: two of 10 million questions collide with probability 3e-6.
        keys.append(np.array([_key(text) for text in normalize_questions(table["question"]).to_pylist()], np.int64))
        for name, columns in labels.items():
            columns.append(label_column(table, name))
        found |= label_names(table)
        nothing = pa.array([""]).take(pa.array(np.zeros(table.num_rows, dtype=np.int64)))
        table = table.set_column(table.schema.get_field_index("question"), question, nothing)
        nulls = pa.nulls(table.num_rows, failures.type)
        tables.append(table.set_column(table.schema.get_field_index("failures"), failures, nulls))
        pa.default_memory_pool().release_unused()
        report_progress("reading", num_rows)
    codes: Rows = np.unique(np.concatenate(keys), return_inverse=True)[1].astype(np.int64)
    return _First(
        problems=pa.concat_tables(tables),
        keys=codes,
        digests=pa.chunked_array(digests, pa.binary(16)),
        labels=({name: np.concatenate(columns) for name, columns in labels.items()}, found),
        malformed=malformed,
    )


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _alive_batches(
    data: DataConfig, sieve: Sieve, report_progress: Progress, name: str
) -> Iterator[tuple[slice, pa.Table]]:
    """The rows alive, read again in the order of the files: where they stand in `sieve.alive`, and the rows."""
    alive = sieve.alive  # ascending, in the order of the files
    first = 0
    for table, _ in iter_problems(data, quiet=True):
        start, end = np.searchsorted(alive, (first, first + table.num_rows))
        if end > start:
            yield slice(start, end), table.take(pa.array(alive[start:end] - first))
        first += table.num_rows
        pa.default_memory_pool().release_unused()
        report_progress(name, first)
    if first != sieve.problems.num_rows:
        raise DataError(
            f"{sieve.stage}: the input has {first} rows now and had {sieve.problems.num_rows} when it was first read; "
            "filter again once nothing writes to the files"
        )


def _write_sorted(path: Path, schema: pa.Schema, data: DataConfig, sieve: Sieve, report_progress: Progress) -> None:
    rank = np.empty(len(sieve.alive), dtype=np.int64)
    rank[np.searchsorted(sieve.alive, sieve.alive_sorted())] = np.arange(len(sieve.alive))
    ranked = PROBLEM_SCHEMA.append(pa.field("rank", pa.int64(), nullable=False))
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder, ExitStack() as stack:
        files = [Path(folder) / f"{number}.parquet" for number in range(-(-len(rank) // _ROWS_PER_RANGE))]
        writers = [stack.enter_context(pq.ParquetWriter(file, ranked, compression="zstd")) for file in files]
        for places, problems in _alive_batches(data, sieve, report_progress, "writing"):
            ranks = rank[places]
            table = problems.append_column(ranked.field("rank"), pa.array(ranks)).cast(ranked)
            for number in np.unique(ranks // _ROWS_PER_RANGE):
                writers[number].write_table(table.filter(pa.array(ranks // _ROWS_PER_RANGE == number)))
        stack.close()
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for file in files:
                part = pq.read_table(file)
                part = part.take(pc.sort_indices(part["rank"])).drop_columns("rank")
                writer.write_table(part.combine_chunks().cast(schema), row_group_size=_ROWS_PER_RANGE)


class _LengthRule:
    """Whether rendered prompts have at most `limit` tokens, without tokenising those that cannot have more.

    A token covers at least one byte of the text, and normalising leaves ASCII as it is (or shortens it), so an ASCII
    question whose rendered prompt has no more bytes than the limit is short enough.
    """

    def __init__(self, recipe: Recipe, tokenizer: ChatTokenizer, limit: int) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._limit = limit
        (prompt, _) = render_prompts([_PROBE], tokenizer, recipe)[0]
        rest = len(prompt.encode()) - len(_PROBE)
        # One byte to spare, for tokenizers that put a blank before the text. No bound if the question stands twice.
        self._max_bytes = limit - rest - 1 if prompt.count(_PROBE) == 1 else -1

    def fits(self, questions: list[str]) -> npt.NDArray[np.bool_]:
        result = np.fromiter(
            (len(question) <= self._max_bytes and question.isascii() for question in questions),
            dtype=bool,
            count=len(questions),
        )
        doubtful = np.flatnonzero(~result)
        rendered = render_prompts([questions[place] for place in doubtful], self._tokenizer, self._recipe)
        result[doubtful] = [len(ids) <= self._limit for _, ids in rendered]
        return result
