"""Rollouts to and from files: export as Parquet, JSON lines or CSV; import of other trainers' dumps as a run to show.

Export writes records (record.py) step by step, and compares every source file with its manifest. Parquet keeps the
schema with the descriptions of its fields. In CSV, lists are written as JSON.

verl (`trainer.rollout_data_dir`): `<step>.jsonl`, a line a response, with `input`, `output`, `score`, `step`, in newer
versions `gts`, and whatever the reward function returned beside the score, such as `acc` and `pred`.
TRL (`log_completions`): `completions_<step>.parquet` with `step`, `prompt`, `completion`, a column of rewards for each
reward function, `advantage`, and other logged columns.

Columns that a dump lacks stay null. A dump has no tokens: so there are no logprobs, and lengths need a tokenizer.
Verdicts come only from verl's `acc`. A prompt's id is a hash of its text; the responses to a prompt are numbered in
their order. Fields without a column are kept in `reason`, as text.
"""

import csv
import hashlib
import json
import re
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.config import did_you_mean
from kdrl_core.data.text import as_unicode
from kdrl_core.errors import DataError, ModelError
from kdrl_core.ledger import RunPaths, publish_file, replace_file, storage_errors
from kdrl_core.look.rollouts.filters import RolloutFilter
from kdrl_core.look.rollouts.query import RolloutStore
from kdrl_core.look.rollouts.record import RECORD, TIMINGS
from kdrl_core.sampling.responses import repetition_rate
from kdrl_core.tables.files import write_table
from kdrl_core.types import VerdictKind

_VERL_FILE = re.compile(r"(\d+)\.jsonl")
_TRL_FILE = re.compile(r"completions_(\d+)\.parquet")
_VERL_FIELDS = {"input", "output", "gts", "score", "step", "acc", "pred"}
_TRL_FIELDS = {"step", "prompt", "completion", "advantage"}
_MAX_STEP = 10**9

Row = dict[str, Any]


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
    pattern, read = _READERS[kind]
    files = _files(source, pattern, kind)
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


def _files(source: Path, pattern: re.Pattern[str], kind: str) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder")
    found = [(int(match[1]), path) for path in source.rglob("*") if (match := pattern.fullmatch(path.name))]
    if not found:
        named = {
            "verl": "<step>.jsonl (trainer.rollout_data_dir)",
            "trl": "completions_<step>.parquet (log_completions)",
        }
        raise DataError(f"{source} has no dump of {kind}: files are called {named[kind]}")
    return [path for _, path in sorted(found)]


def _verl_rows(file: Path) -> Iterator[tuple[int, Row, list[str]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error}); delete the line, or dump it again") from None
            if not isinstance(content, dict):
                raise DataError(f"{where}: not a JSON object; each line of verl's dump is one")
            row = _common(where, content, prompt="input", response="output", step=_file_step(file))
            row["ground_truth"] = _text(content.get("gts"))
            row["reward"] = _number(where, "score", content.get("score"))
            row["extracted"] = _text(content.get("pred"))
            if isinstance(acc := content.get("acc"), bool | int | float):
                row["accuracy_reward"] = float(acc)
                row["verdict"] = (VerdictKind.CORRECT if acc >= 1 else VerdictKind.WRONG).value
            row["reason"] = _words({name: value for name, value in content.items() if name not in _VERL_FIELDS})
            yield row.pop("step"), row, ["score"]


def _trl_rows(file: Path) -> Iterator[tuple[int, Row, list[str]]]:
    try:
        table = pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    rewards = [
        field.name
        for field in table.schema
        if field.name not in _TRL_FIELDS and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
    ]
    for number, content in enumerate(table.to_pylist()):
        where = f"{file} row {number}"
        row = _common(where, content, prompt="prompt", response="completion", step=_file_step(file))
        scores = [_number(where, name, content[name]) for name in rewards]
        known = [score for score in scores if score is not None]
        row["reward"] = sum(known) if known else None
        row["advantage"] = _number(where, "advantage", content.get("advantage"))
        row["reason"] = _words({name: value for name, value in content.items() if name not in _TRL_FIELDS})
        yield row.pop("step"), row, rewards


_READERS = {"verl": (_VERL_FILE, _verl_rows), "trl": (_TRL_FILE, _trl_rows)}


def _file_step(file: Path) -> int | None:
    match = _VERL_FILE.fullmatch(file.name) or _TRL_FILE.fullmatch(file.name)
    return int(match[1]) if match else None


def _common(where: str, content: Row, *, prompt: str, response: str, step: int | None) -> Row:
    texts = {name: _conversation(content.get(name)) for name in (prompt, response)}
    if lacking := [name for name, text in texts.items() if text is None]:
        raise DataError(f"{where}: field '{lacking[0]}' is missing or not text; is this the right --from?")
    found = content.get("step", step)
    if isinstance(found, str) and found.isdecimal():
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < _MAX_STEP:
        raise DataError(f"{where}: field 'step' is {found!r}; a whole number is expected")
    return {"prompt": texts[prompt], "response": texts[response], "step": found}


def _conversation(value: Any) -> str | None:
    """A text as it is; a list of messages as lines of role and content; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return "\n".join(f"{one.get('role') or ''}: {_text(one.get('content')) or ''}" for one in value)
    return None


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _number(where: str, name: str, value: Any) -> float | None:
    if value is None or isinstance(value, bool | int | float):
        return None if value is None or value != value else float(value)
    raise DataError(f"{where}: field '{name}' is {value!r}; a number is expected")


def _words(extra: Row) -> str | None:
    return ", ".join(f"{name} {_text(value)}" for name, value in extra.items() if value is not None) or None


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
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # it raises bare Exceptions
        raise ModelError(f"{folder} has no usable tokenizer.json ({error}); give a model's folder") from error
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


SUFFIXES = (".parquet", ".jsonl", ".csv")


def export_rollouts(
    store: RolloutStore,
    where: RolloutFilter,
    path: Path,
    *,
    columns: Sequence[str] | None = None,
    limit: int | None = None,
    on_step: Callable[[int], None] = lambda rows: None,
) -> int:
    """Write the first `limit` rollouts that meet `where` to `path`, in the format of its suffix, sorted by run, stage,
    step and row; `columns` of the record, None: all. The file appears only once it is complete. Returns the number of
    rollouts; `on_step` is called with the number so far.

    Raises DataError for an unknown column or suffix; StorageError if the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: rollouts are exported as {', '.join(SUFFIXES)}; give a name with one of these")
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

    replace_file(path, lambda file: _WRITERS[path.suffix](file, schema, counting()))
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


def _write_csv(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(schema.names)
        for table in tables:
            for row in table.to_pylist():
                writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in row.values()])


_WRITERS: dict[str, Callable[[Path, pa.Schema, Iterator[pa.Table]], Any]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
}
