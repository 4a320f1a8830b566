"""The data filter for files of any size, with the rules of `filter_problems`. The files are read once, in three passes.

1. Every row is normalised. Its question and labels go to a temporary file; memory keeps what the label rules need:
   id, answer, source, labels and a hash of the question. Duplicates and the label rules are applied.
2. The questions of the rows that are left are read back, for the length of the prompt and the overlap with benchmarks.
   Then the rules on answers, the cap and the sample are applied.
3. The problems that are left are written to one temporary file per range of problem_id. Each file is sorted and
   appended to the output, so the output is in order without ever being in memory.

A JSON array is read whole, since JSON has no record boundary; use JSON Lines or Parquet for large files.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdrl_core.config import DataConfig, Recipe
from kdrl_core.data.decontamination import Decontaminator, Overlap
from kdrl_core.data.filter import QuestionCheck, apply_rules, check_stage
from kdrl_core.data.filter_report import FilterReport
from kdrl_core.data.labels import Labels, Rows, label_column, label_names
from kdrl_core.data.prompts import ChatTokenizer, load_tokenizer, render_prompts
from kdrl_core.data.read import iter_problems
from kdrl_core.data.reading import Reading
from kdrl_core.data.schema import PROBLEM_SCHEMA
from kdrl_core.data.sieve import Sieve
from kdrl_core.data.text import question_digests
from kdrl_core.ledger import replace_file, storage_errors

REPORT_KEY = b"kdrl.filter_report"
"""Key in the metadata of the output's schema: the report as JSON."""

_ROWS_PER_RANGE = 65_536
_PROBE = "KDRLPROBE"
_SPOOLED = ("question", "failures")
_SLIM = [name for name in PROBLEM_SCHEMA.names if name not in _SPOOLED]

_REPEATED = ["answer", "source", "failures.key_value.key", "failures.key_value.value"]
"""Columns with recurring values, which a dictionary makes smaller."""

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

    Memory holds ids, answers, labels and hashes of all rows (about 150 bytes a row), but not their questions. These
    pass through temporary files beside the output, about half as large as the text.

    Args:
        output: replaced atomically. The same rows give the same bytes in any order.
        stage: the stage whose rules apply; default: the recipe's last.
        tokenizer: measures prompts; default: the student's.

    Returns:
        the report, which is also in the metadata of the output's schema.

    Raises:
        DataError, ModelError, RecipeError: as `filter_problems`.
    """
    stage = check_stage(recipe, stage)
    config = recipe.stage(stage)
    report_progress = on_progress or (lambda _name, _rows: None)
    measure = _LengthRule(recipe, tokenizer or load_tokenizer(recipe.student), config.max_prompt_tokens)
    decontaminator = None if config.data.decontamination is None else Decontaminator(config.data.decontamination)

    # Temporary files have no name, so a killed filter leaves none behind.
    with storage_errors(output), ExitStack() as stack:
        output.parent.mkdir(parents=True, exist_ok=True)
        spool = stack.enter_context(tempfile.TemporaryFile(dir=output.parent))
        rows = _Rows.read(config.data, spool, report_progress)
        sieve = Sieve(
            stage=stage, config=config, problems=rows.slim, keys=rows.keys, digests=rows.digests, labels=rows.labels
        )

        def check_questions(alive: Rows) -> QuestionCheck:
            is_short = np.zeros(len(alive), dtype=bool)
            overlaps: list[Overlap | None] = []
            for places, problems in rows.batches(alive, report_progress, "checking prompts"):
                fits = is_short[places] = measure.fits(problems["question"])
                if decontaminator is not None:
                    overlaps += decontaminator.find_all(problems["question"].filter(pa.array(fits)).to_pylist())
            return is_short, overlaps if decontaminator is not None else None

        report = apply_rules(sieve, recipe, rows.reading, check_questions)
        counts = dataclasses.replace(report, notes=())  # notes name rows, whose order must not change a byte
        schema = PROBLEM_SCHEMA.with_metadata({REPORT_KEY: json.dumps(counts.to_json()).encode()})
        replace_file(output, lambda path: _write_sorted(path, schema, rows, sieve, report_progress))
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """All rows: small columns in memory, questions and maps of labels in a file, in the same order."""

    spool: IO[bytes]
    slim: pa.Table
    keys: Rows
    labels: tuple[dict[str, Labels], set[str]]
    reading: Reading

    @classmethod
    def read(cls, data: DataConfig, spool: IO[bytes], report_progress: Progress) -> "_Rows":
        schema = pa.schema([PROBLEM_SCHEMA.field(name) for name in _SPOOLED])
        slim: list[pa.Table] = [PROBLEM_SCHEMA.empty_table().select(_SLIM)]
        hashes = [np.zeros(0, dtype=np.uint64)]
        labels: dict[str, list[Labels]] = {name: [np.zeros(0, dtype=np.int32)] for name in data.difficulty.names}
        found: set[str] = set()
        reading = Reading()
        with _ipc_writer(spool, schema) as writer:
            for normalized in iter_problems(data, reading):
                table = normalized.problems.combine_chunks()
                if not table.num_rows:
                    continue
                writer.write_table(table.select(_SPOOLED))
                slim.append(table.select(_SLIM))
                hashes.append(normalized.hashes)
                for name, columns in labels.items():
                    columns.append(label_column(table, name))
                found |= label_names(table)
                pa.default_memory_pool().release_unused()
                report_progress("reading", reading.num_rows)
        keys: Rows = np.unique(np.concatenate(hashes), return_inverse=True)[1].astype(np.int64)
        return cls(
            spool=spool,
            slim=pa.concat_tables(slim),
            keys=keys,
            labels=({name: np.concatenate(columns) for name, columns in labels.items()}, found),
            reading=reading,
        )

    def batches(
        self, places: Rows, report_progress: Progress | None = None, name: str = ""
    ) -> Iterator[tuple[slice, pa.Table]]:
        """The rows at `places` (ascending) in PROBLEM_SCHEMA, batch by batch, each with its slice of `places`."""
        first = 0
        with _ipc_reader(self.spool) as reader:
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                last = first + batch.num_rows
                start, end = np.searchsorted(places, (first, last))
                if end > start:
                    table = self.slim.slice(first, batch.num_rows)
                    for column in _SPOOLED:
                        table = table.append_column(PROBLEM_SCHEMA.field(column), batch.column(column))
                    table = table.select(PROBLEM_SCHEMA.names).take(pa.array(places[start:end] - first))
                    yield slice(start, end), table
                first = last
                if report_progress is not None:
                    report_progress(name, first)

    def digests(self, places: pa.Array) -> pa.ChunkedArray:
        """Hashes of the questions at `places`, not normalised, in that order."""
        ordered = places.to_numpy()
        chunks = [chunk for _, table in self.batches(ordered) for chunk in question_digests(table["question"]).chunks]
        return pa.chunked_array(chunks, pa.binary(16))


def _write_sorted(path: Path, schema: pa.Schema, rows: _Rows, sieve: Sieve, report_progress: Progress) -> None:
    rank = np.empty(len(sieve.alive), dtype=np.int64)
    rank[np.searchsorted(sieve.alive, sieve.alive_sorted())] = np.arange(len(sieve.alive))
    ranked = PROBLEM_SCHEMA.append(pa.field("rank", pa.int64(), nullable=False))
    with ExitStack() as stack:
        files = [
            stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
            for _ in range(-(-len(rank) // _ROWS_PER_RANGE))
        ]
        with ExitStack() as open_writers:
            writers = [open_writers.enter_context(_ipc_writer(file, ranked)) for file in files]
            for places, problems in rows.batches(sieve.alive, report_progress, "writing"):
                ranks = rank[places]
                table = problems.append_column(ranked.field("rank"), pa.array(ranks)).cast(ranked)
                for number in np.unique(ranks // _ROWS_PER_RANGE):
                    writers[number].write_table(table.filter(pa.array(ranks // _ROWS_PER_RANGE == number)))
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=_REPEATED) as writer:
            for file in files:
                with _ipc_reader(file) as reader:
                    part = reader.read_all().combine_chunks()
                part = part.take(pc.sort_indices(part["rank"])).drop_columns("rank")
                writer.write_table(part.cast(schema), row_group_size=_ROWS_PER_RANGE)


def _ipc_writer(file: IO[bytes], schema: pa.Schema) -> pa.ipc.RecordBatchFileWriter:
    return pa.ipc.new_file(pa.PythonFile(file, mode="w"), schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))


def _ipc_reader(file: IO[bytes]) -> pa.ipc.RecordBatchFileReader:
    file.flush()
    return pa.ipc.open_file(pa.PythonFile(file, mode="r"))


class _LengthRule:
    """Whether rendered prompts have at most `limit` tokens. Prompts that cannot have more are not tokenised.

    A token covers at least one byte of the text, and normalising never lengthens ASCII. So an ASCII question is short
    enough if its rendered prompt has no more bytes than the limit.
    """

    def __init__(self, recipe: Recipe, tokenizer: ChatTokenizer, limit: int) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._limit = limit
        (prompt, _) = render_prompts([_PROBE], tokenizer, recipe)[0]
        rest = len(prompt.encode()) - len(_PROBE)
        # One byte to spare, for tokenizers that put a blank before the text. No shortcut if the question appears twice.
        self._max_bytes = limit - rest - 1 if prompt.count(_PROBE) == 1 else -1

    def fits(self, questions: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        lengths = pc.binary_length(questions)
        is_settled = pc.and_(pc.less_equal(lengths, self._max_bytes), pc.string_is_ascii(questions))
        result: npt.NDArray[np.bool_] = is_settled.to_numpy().copy()
        doubtful = questions.filter(pc.invert(is_settled)).to_pylist()
        rendered = render_prompts(doubtful, self._tokenizer, self._recipe)
        result[~result] = [len(ids) <= self._limit for _, ids in rendered]
        return result
