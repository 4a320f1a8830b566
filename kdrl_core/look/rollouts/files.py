"""Rollouts to and from files: export as Parquet, JSON lines or CSV; import of other trainers' dumps as a run to show.

Export writes records (record.py) step by step, and compares every source file with its manifest. Parquet keeps the
schema with the descriptions of its fields. In CSV, lists are written as JSON.

An import reads the dumps that dumps.py describes. They have no tokens: so there are no logprobs, and lengths need a
tokenizer. A prompt's id is a hash of its text; the responses to a prompt are numbered in their order.
"""

import csv
import hashlib
import json
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.config import did_you_mean
from kdrl_core.config.paths import read_small
from kdrl_core.data.text import as_unicode
from kdrl_core.errors import DataError, ModelError
from kdrl_core.ledger import RunPaths, publish_file, replace_file, storage_errors
from kdrl_core.look.rollouts.dumps import DUMP_READERS, Row, dump_files
from kdrl_core.look.rollouts.filters import RolloutFilter, require_int
from kdrl_core.look.rollouts.query import RolloutStore
from kdrl_core.look.rollouts.record import RECORD, TIMINGS
from kdrl_core.sampling.responses import repetition_rate
from kdrl_core.tables.files import write_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The result of an import."""

    path: Path
    stage: str
    num_steps: int
    num_rollouts: int
    reward_columns: list[str]
    """Columns that make up the reward."""


def import_dump(
    source: Path,
    kind: str,
    output: Path,
    *,
    tokenizer: Path | None = None,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Read a dump and write it as a run's folder, which appears only once it is complete.

    Args:
        source: the folder with the dump, or one of its files.
        kind: `verl` or `trl`; its responses become the stage of this name.
        output: the new folder.
        tokenizer: a folder with tokenizer.json; it gives tokens, lengths and repetition rates.
        on_file: called with the number of files read, and of all files.

    Raises:
        DataError: there are no such files, or one is malformed; the message names file, line and field.
        ModelError: the tokenizer cannot be read.
        StorageError: the folder cannot be written.
    """
    read, files = DUMP_READERS[kind], dump_files(source, kind)
    if output.exists():
        raise DataError(f"{output} exists; give a new name, or delete it")
    tokenize = None if tokenizer is None else _tokenizer(tokenizer)
    by_step: dict[int, list[Row]] = defaultdict(list)
    rewards: list[str] = []
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".tmp-{output.name}-{secrets.token_hex(4)}")
        try:
            num_rollouts, written = 0, set[int]()
            for number, file in enumerate(files, start=1):
                for step, row, names in read(file):
                    by_step[step].append(row)
                    rewards = names
                # A file normally has one step, and no step continues in the next file.
                for step in list(by_step):
                    if step in written:
                        raise DataError(f"{file}: step {step} is in an earlier file as well; import one dump at a time")
                    num_rollouts += _write(temporary, kind, step, by_step.pop(step), tokenize)
                    written.add(step)
                on_file(number, len(files))
            facts = {"from": kind, "source": source.name, "steps": len(written), "rollouts": num_rollouts}
            (temporary / "import.json").write_text(json.dumps(facts, indent=1) + "\n")
            temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Imported(path=output, stage=kind, num_steps=len(written), num_rollouts=num_rollouts, reward_columns=rewards)


def _write(root: Path, stage: str, step: int, rows: Sequence[Row], tokenize: Callable[[str], list[int]] | None) -> int:
    seen: Counter[str] = Counter()
    for row in rows:
        row["prompt_id"] = "p-" + hashlib.sha256(row["prompt"].encode(errors="replace")).hexdigest()[:16]
        row["sample"] = seen[row["prompt_id"]]
        seen[row["prompt_id"]] += 1
        if tokenize is not None:
            row["prompt_token_ids"], row["token_ids"] = tokenize(row["prompt"]), tokenize(row["response"])
            row["length"] = len(row["token_ids"])
            row["repetition_rate"] = repetition_rate(row["token_ids"])
    rows = sorted(rows, key=lambda row: row["prompt_id"])  # the responses to a prompt together; verl mixes them
    # Parquet wants valid UTF-8.
    clean = [{n: as_unicode(value) if isinstance(value, str) else value for n, value in row.items()} for row in rows]
    path = RunPaths(root).rollouts(stage, step)
    table = pa.Table.from_pylist(clean, schema=IMPORTED)
    publish_file(path, lambda file: write_table(table, file))
    return len(rows)


IMPORTED = pa.schema(
    [field for field in RECORD if field.name not in {"run", "stage", "step", "entropy_mean", *TIMINGS}]
)
"""Schema of an imported step's one file, `rollouts.parquet`: the record without the columns that its folder gives."""


def _tokenizer(folder: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(read_small(folder / "tokenizer.json", follow_links=True).decode())
    except Exception as error:  # it raises bare Exceptions
        raise ModelError(f"{folder} has no usable tokenizer.json ({error}); give a model's folder") from error
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a text that begins with one of these for a formula, and may run it."""


SUFFIXES = (".parquet", ".jsonl", ".csv")


def export_rollouts(
    store: RolloutStore,
    where: RolloutFilter,
    path: Path,
    *,
    columns: Sequence[str] | None = None,
    limit: int | None = None,
    quote_formulas: bool = False,
    on_formulas: Callable[[int], None] = lambda cells: None,
    on_step: Callable[[int], None] = lambda rows: None,
) -> int:
    """Write the first `limit` rollouts that meet `where` to `path`, in the format of its suffix, sorted by run, stage,
    step and row; `columns` of the record, None: all. The file appears only once it is complete. Returns the number of
    rollouts; `on_step` is called with the number so far.

    `on_formulas` is called with the number of cells of a CSV file that a spreadsheet may take for formulas, if there
    are any. With `quote_formulas` these begin with a quote, so that it takes them for text.

    Raises DataError for an unknown column or suffix; StorageError if the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: rollouts are exported as {', '.join(SUFFIXES)}; give a name with one of these")
    require_int("limit", limit)
    schema = record_schema(columns)
    counted = 0

    def counting() -> Iterator[pa.Table]:
        nonlocal counted
        for table in store.records(where, schema.names):
            part = table if limit is None else table.slice(0, limit - counted)
            counted += len(part)
            on_step(counted)
            yield part.cast(schema)
            if limit is not None and counted >= limit:
                return

    writers: dict[str, Callable[[Path, pa.Schema, Iterator[pa.Table]], None]] = {
        ".parquet": _write_parquet,
        ".jsonl": _write_jsonl,
        ".csv": partial(_write_csv, quote=quote_formulas, on_formulas=on_formulas),
    }
    replace_file(path, lambda file: writers[path.suffix](file, schema, counting()))
    return counted


def record_schema(columns: Sequence[str] | None) -> pa.Schema:
    """The record's schema, or the schema of `columns`, in their order."""
    for name in columns or ():
        if name not in RECORD.names:
            raise DataError(
                f"no column {name!r}{did_you_mean(name, RECORD.names)}; there are {', '.join(RECORD.names)}"
            )
    names = RECORD.names if columns is None else list(dict.fromkeys(columns))
    return pa.schema([RECORD.field(name) for name in names], metadata=RECORD.metadata)


def _write_parquet(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _write_jsonl(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for table in tables:
            for row in table.to_pylist():
                file.write(json.dumps(row) + "\n")


def _write_csv(
    path: Path, schema: pa.Schema, tables: Iterator[pa.Table], *, quote: bool, on_formulas: Callable[[int], None]
) -> None:
    num_formulas = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(schema.names)
        for table in tables:
            for row in table.to_pylist():
                cells = [json.dumps(value) if isinstance(value, list) else value for value in row.values()]
                for place, cell in enumerate(cells):
                    if isinstance(cell, str) and cell.startswith(_FORMULA):
                        num_formulas += 1
                        cells[place] = f"'{cell}" if quote else cell
                writer.writerow(cells)
    if num_formulas:
        on_formulas(num_formulas)
