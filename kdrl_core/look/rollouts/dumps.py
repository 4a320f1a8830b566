"""The dumps of other trainers, read row by row.

verl (`trainer.rollout_data_dir`): `<step>.jsonl`, a line a response, with `input`, `output`, `score`, `step`, in newer
versions `gts`, and whatever the reward function returned beside the score, such as `acc` and `pred`.
TRL (`log_completions`): `completions_<step>.parquet` with `step`, `prompt`, `completion`, a column of rewards for each
reward function, `advantage`, and other logged columns.

Columns that a dump lacks stay null. Fields without a column are kept in `reason`, as text.
Verdicts come only from verl's `acc`.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdrl_core.config.paths import open_regular, why
from kdrl_core.errors import DamagedArtifactError, DataError
from kdrl_core.tables.files import LOOKED_AT, read_table
from kdrl_core.types import VerdictKind

_VERL_FILE = re.compile(r"(\d+)\.jsonl")
_TRL_FILE = re.compile(r"completions_(\d+)\.parquet")
_VERL_FIELDS = {"input", "output", "gts", "score", "step", "acc", "pred"}
_TRL_FIELDS = {"step", "prompt", "completion", "advantage"}
_MAX_STEP = 10**9
_MAX_LINE_BYTES = 2**27
_MAX_NUMBER = 3.4028234e38
"""The greatest of float32."""
_MAX_SHOWN = 40

Row = dict[str, Any]


def dump_files(source: Path, kind: str) -> list[Path]:
    """The files of a dump of `kind` (`verl`, `trl`), by step. Raises DataError if there are none."""
    pattern = _PATTERNS[kind]
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
    with _opened(file) as lines:
        for number, line in enumerate(iter(partial(lines.readline, _MAX_LINE_BYTES + 1), b""), start=1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            if len(line) > _MAX_LINE_BYTES:
                raise DataError(f"{where}: it has more than {_MAX_LINE_BYTES:,} bytes; is this verl's dump?")
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
            if isinstance(content.get("acc"), bool | int | float):
                acc = _number(where, "acc", content["acc"])
                row["accuracy_reward"] = acc
                row["verdict"] = (VerdictKind.CORRECT if acc is not None and acc >= 1 else VerdictKind.WRONG).value
            row["reason"] = _words({name: value for name, value in content.items() if name not in _VERL_FIELDS})
            yield row.pop("step"), row, ["score"]


def _trl_rows(file: Path) -> Iterator[tuple[int, Row, list[str]]]:
    try:
        table = read_table(file, most_bytes=LOOKED_AT)
    except DamagedArtifactError as error:
        raise DataError(f"{error.problem}; dump it again") from None
    rewards = [
        field.name
        for field in table.schema
        if field.name not in _TRL_FIELDS and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
    ]
    for number, content in enumerate(_records(file, table)):
        where = f"{file} row {number}"
        row = _common(where, content, prompt="prompt", response="completion", step=_file_step(file))
        # TRL writes NaN where a reward function gave None.
        scores = [_number(where, name, None if _is_nan(content[name]) else content[name]) for name in rewards]
        known = [score for score in scores if score is not None]
        row["reward"] = _number(where, "+".join(rewards), sum(known) if known else None)
        advantage = content.get("advantage")
        row["advantage"] = _number(where, "advantage", None if _is_nan(advantage) else advantage)
        row["reason"] = _words({name: value for name, value in content.items() if name not in _TRL_FIELDS})
        yield row.pop("step"), row, rewards


_PATTERNS = {"verl": _VERL_FILE, "trl": _TRL_FILE}
DUMP_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row, list[str]]]]] = {"verl": _verl_rows, "trl": _trl_rows}
"""Trainer → reader of a file: step, record and columns that make up the reward, of each row."""


def _records(file: Path, table: pa.Table) -> Iterator[Row]:
    try:
        for batch in table.to_batches(max_chunksize=1000):
            yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:  # a text that is not UTF-8, a time that Python does not have
        raise DataError(f"{file} has a value that cannot be read ({why(error)}); dump it again") from None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _opened(file: Path) -> BufferedReader:
    try:
        return open_regular(file, most_bytes=2**63, follow_links=True)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {why(error)}") from None


def _file_step(file: Path) -> int | None:
    match = _VERL_FILE.fullmatch(file.name) or _TRL_FILE.fullmatch(file.name)
    return int(match[1]) if match else None


def _common(where: str, content: Row, *, prompt: str, response: str, step: int | None) -> Row:
    texts = {name: _conversation(content.get(name)) for name in (prompt, response)}
    if lacking := [name for name, text in texts.items() if text is None]:
        raise DataError(f"{where}: field '{lacking[0]}' is missing or not text; is this the right --from?")
    found = content.get("step", step)
    if isinstance(found, str) and found.isdecimal() and len(found) < _MAX_SHOWN:
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < _MAX_STEP:
        expected = f"a whole number from 0 to {_MAX_STEP - 1:,} is expected"
        raise DataError(f"{where}: field 'step' is {_short(found)}; {expected}")
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
    """A number that a column of float32 holds; None for null."""
    if value is None:
        return None
    if not isinstance(value, bool | int | float):
        raise DataError(f"{where}: field '{name}' is {_short(value)}; a number is expected")
    if not abs(value) <= _MAX_NUMBER:  # also for NaN
        raise DataError(f"{where}: field '{name}' is {_short(value)}; a number up to 3.4e38 is expected, or null")
    return float(value)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"


def _words(extra: Row) -> str | None:
    return ", ".join(f"{name} {_text(value)}" for name, value in extra.items() if value is not None) or None
