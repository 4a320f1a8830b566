"""What is read from one step's files, each compared with its manifest: the step's rows of the index (single values of
each rollout, and the start of its response); its summary, for `kdrl rollouts stats` and the view `steps`; and its full
records, with the text of their tokens."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.config import read_fields
from kdrl_core.config.paths import read_small, resolve_path, why
from kdrl_core.errors import DamagedArtifactError, KdrlError
from kdrl_core.ledger import RunPaths
from kdrl_core.look.rollouts.record import PARTS, RECORD, SCALARS, TIMINGS
from kdrl_core.look.rollouts.sources import DamagedFile, Stamp, StepFiles, bulky_columns, read_part
from kdrl_core.types import VerdictKind

PREVIEW_CHARS = 200
_MOST_BYTES = 2**28
"""Most bytes of a step's rows of the index in memory; 1,024 rollouts have half a MB."""
_ENTROPIES = "entropies"

INDEX = pa.schema(
    [
        RECORD.field("stage"),
        RECORD.field("step"),
        pa.field("row", pa.int32(), nullable=False, metadata={"description": "row of the rollout in the step's files"}),
        *(RECORD.field(name) for name in SCALARS),
        RECORD.field("entropy_mean"),
        pa.field(
            "response_preview",
            pa.string(),
            metadata={"description": f"the response's first {PREVIEW_CHARS} characters"},
        ),
    ]
)


@dataclass(slots=True, kw_only=True)
class IndexedStep:
    """A step in the catalog of the index."""

    stage: str
    step: int
    folder: str
    """Folder of its files, relative to the run."""
    stamps: dict[str, Stamp]
    """Stamps of the files that it was read from."""
    num_rows: int = 0
    bulky: dict[str, list[str]] = field(default_factory=dict)
    """Part → columns of the record that are read from the file itself."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Part → its problem."""
    summary: dict[str, Any] = field(default_factory=dict)
    """The step in numbers, by `SUMMARY_SQL`."""

    @property
    def key(self) -> tuple[str, int]:
        return self.stage, self.step


def index_step(files: StepFiles) -> tuple[IndexedStep, pa.Table]:
    """Read a step. A damaged file is noted and left out. If it is rollouts.parquet, the step has no rows."""
    folder = "/".join(files.folder.parts[-3:])
    step = IndexedStep(stage=files.stage, step=files.step, folder=folder, stamps=files.stamps)
    columns: dict[str, Any] = {}
    ids: pa.Table | None = None
    for part in PARTS:  # rollouts first
        if part not in files.stamps:
            continue
        try:
            table = read_part(files, part, ["prompt_id", "sample", *SCALARS[2:], "response", _ENTROPIES])
            if ids is None:
                ids = table.select(["prompt_id", "sample"])
                columns["response_preview"] = pc.utf8_slice_codeunits(table["response"], 0, PREVIEW_CHARS)
            elif not table.select(["prompt_id", "sample"]).equals(ids):
                raise DamagedArtifactError("its rows are not those of rollouts.parquet", "")
            values = {name: table[name].cast(RECORD.field(name).type) for name in SCALARS if name in table.column_names}
            if _ENTROPIES in table.column_names:
                values["entropy_mean"] = list_means(table[_ENTROPIES])
        except (DamagedArtifactError, pa.ArrowException, KeyError) as error:
            step.damaged[part] = why(error).removeprefix(f"{files.path(part)} ")
            if part == "rollouts":
                break
            continue
        columns = {**values, **columns}
        if bulky := bulky_columns(files, part):
            step.bulky[part] = bulky
    if ids is None:
        return step, INDEX.empty_table()
    step.num_rows = len(ids)
    table = _table(step, columns)
    if table.nbytes > _MOST_BYTES:
        step.damaged["rollouts"] = f"has single values of {table.nbytes:,} bytes, more than {_MOST_BYTES:,}"
        step.num_rows, step.bulky = 0, {}
        return step, INDEX.empty_table()
    return step, table


def _table(step: IndexedStep, columns: dict[str, Any]) -> pa.Table:
    made = {
        "stage": pa.DictionaryArray.from_arrays(np.zeros(step.num_rows, np.int32), [step.stage]).cast(pa.string()),
        "step": np.full(step.num_rows, step.step, np.int32),
        "row": np.arange(step.num_rows, dtype=np.int32),
        **columns,
    }
    return pa.table(
        [made.get(f.name, pa.nulls(step.num_rows, f.type)) for f in INDEX],
        schema=INDEX,
    )


def list_means(lists: pa.ChunkedArray) -> pa.Array:
    """Mean of each list; null for a null or empty one."""
    array = lists.combine_chunks()
    sizes = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    values = array.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(sizes)
    totals = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    sums = totals[ends] - totals[ends - sizes]
    return pa.array(sums / np.maximum(sizes, 1), pa.float32(), mask=sizes == 0)


IS_RIGHT = f"coalesce(verdict = '{VerdictKind.CORRECT.value}', reward >= 1)"
HAS_FAILED = f"coalesce(verdict <> '{VerdictKind.CORRECT.value}', reward <= 0)"
"""In SQL, of a response: the verdict says it, whatever reward there is for it; dumps of other trainers have rewards
alone."""
_VERDICTS = ", ".join(
    f"(count(*) filter (verdict = '{kind.value}') / nullif(count(verdict), 0))::float as verdict_{kind.value}"
    for kind in VerdictKind
)

SUMMARY_SQL = f"""
    with groups as (
        select stage, step, prompt_id, bool_and({HAS_FAILED}) as all_wrong, bool_and({IS_RIGHT}) as all_right
        from rows group by all
    ), counted as (
        select stage, step, count(*) as num_groups,
            count(*) filter (all_wrong) as num_groups_all_wrong, count(*) filter (all_right) as num_groups_all_right
        from groups group by all
    ), steps as (
        select stage, step,
            count(*) as num_rollouts,
            avg(reward) as reward_mean,
            stddev_samp(reward) as reward_std,
            avg(length) as length_mean,
            quantile_cont(length, 0.05) as length_p05,
            quantile_cont(length, 0.5) as length_p50,
            quantile_cont(length, 0.95) as length_p95,
            max(length)::double as length_max,
            avg((finish_reason = 'length')::int) as clip_ratio,
            avg(repetition_rate) as repetition_mean,
            avg(repetition_rate) filter (finish_reason = 'length') as repetition_overlong,
            sum(kl_sum) / nullif(sum(length) filter (kl_sum is not null), 0) as kl_mean,
            avg(entropy_mean) as entropy,
            stddev_samp(advantage) as advantage_std,
            {_VERDICTS}
        from rows group by all
    )
    select * from steps join counted using (stage, step) order by stage, step
"""

SUMMARY: dict[str, str] = {
    "num_rollouts": "responses of the step",
    "reward_mean": "mean reward",
    "reward_std": "standard deviation of the rewards (N - 1)",
    "length_mean": "mean length in tokens",
    "length_p05": "length that 5 % of the responses do not exceed",
    "length_p50": "median length",
    "length_p95": "length that 95 % of the responses do not exceed",
    "length_max": "greatest length",
    "clip_ratio": "share of responses cut at the limit",
    "repetition_mean": "mean repetition rate",
    "repetition_overlong": "mean repetition rate of those cut at the limit; null if there are none",
    "kl_mean": "KL estimate to the teacher: mean over all tokens of the step",
    "entropy": "the trainer's entropy: the stage's metric, or the mean of entropy_mean",
    "advantage_std": "standard deviation of the advantages; 0 if every group agrees",
    **{f"verdict_{kind.value}": f"share of responses with the verdict {kind.value}" for kind in VerdictKind},
    "num_groups": "prompts of the step",
    "num_groups_all_wrong": "prompts of which no response is right",
    "num_groups_all_right": "prompts of which every response is right",
}
"""Column of a step's summary → its description."""


def summarize_steps(rows: pa.Table) -> dict[tuple[str, int], dict[str, Any]]:
    """The summary of every step in `rows` (columns of the index), by stage and step. NaN and infinity become None."""
    with duckdb.connect(":memory:", config={"threads": 1}) as connection:
        connection.register("rows", rows)
        found = connection.sql(SUMMARY_SQL).to_arrow_table().to_pylist()
    return {(row.pop("stage"), row.pop("step")): {name: finite(value) for name, value in row.items()} for row in found}


def finite(value: Any) -> Any:
    """`value`, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_table(
    files: StepFiles, indexed: IndexedStep, columns: Sequence[str], on_damaged: Callable[[DamagedFile], None]
) -> pa.Table:
    """The ids of a step's rollouts, and the `columns` that its intact files have, in the order of its rows.

    A file that was damaged since the index was made is reported by `on_damaged` and left out. Raises
    DamagedArtifactError if rollouts.parquet is damaged.
    """
    wanted = list(dict.fromkeys(["prompt_id", "sample", *columns]))
    if "entropy_mean" in wanted:
        wanted.append(_ENTROPIES)
    found: dict[str, pa.ChunkedArray] = {}
    for part in PARTS:  # rollouts first
        if part not in files.stamps or part in indexed.damaged:
            continue
        try:
            table = read_part(files, part, wanted)
        except DamagedArtifactError as error:
            if part == "rollouts":
                raise DamagedArtifactError(f"{files.path(part)} {error.problem}", error.remedy) from error
            on_damaged(DamagedFile(path=files.path(part), problem=error.problem))
            continue
        if _ENTROPIES in table.column_names:
            found["entropy_mean"] = list_means(table[_ENTROPIES])
        found = {**dict(zip(table.column_names, table.columns, strict=True)), **found}
    return pa.table(found)


def as_records(
    table: pa.Table, key: tuple[str, str, int], metrics: Mapping[str, Any], columns: Sequence[str]
) -> pa.Table:
    """Some rows of `step_table` as records, by `columns`; `key` is run, stage and step. Unknown values are null."""
    known = {"run": key[0], "stage": key[1], "step": key[2]}
    known |= {name: metrics.get(timing) for name, timing in TIMINGS.items()}
    arrays = []
    for name in columns:
        kind = RECORD.field(name).type
        if known.get(name) is not None:
            arrays.append(pa.repeat(pa.scalar(known[name], kind), len(table)))
        elif name in table.column_names:
            arrays.append(table[name].cast(kind))
        else:
            arrays.append(pa.nulls(len(table), kind))
    return pa.table(arrays, schema=pa.schema([RECORD.field(name) for name in columns]))


_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TokenReader:
    """Texts of tokens, if a model of the run is still there. Never runs code from a model folder."""

    def __init__(self, root: Path, stage: str) -> None:
        self._candidates = list(_tokenizer_files(root, stage))
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def texts(self, token_ids: Sequence[int] | None) -> list[str] | None:
        """One text per token; joined, they are the decoded response with its special tokens. If several tokens make up
        a character, the last of them has it and the others are empty. None without a tokenizer."""
        tokenizer = self._load()
        if tokenizer is None or token_ids is None:
            return None
        ids, texts, shown, start = list(token_ids), [], "", 0
        for end in range(1, len(ids) + 1):
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            if text.endswith(_BROKEN) and end < len(ids):
                texts.append("")
                continue
            texts.append(text[len(shown) :])
            # Decode from the last token on: some tokenizers drop a space at the start.
            start = end - 1
            shown = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        return texts

    def _load(self) -> Any:
        with self._lock:
            while self._tokenizer is None and self._candidates:
                from tokenizers import Tokenizer  # only where a response is shown in full

                with suppress(Exception):  # each kind of damage raises its own error, some a bare Exception
                    self._tokenizer = Tokenizer.from_str(read_small(self._candidates[0], follow_links=True).decode())
                self._candidates.pop(0)
            return self._tokenizer


def _tokenizer_files(root: Path, stage: str) -> Iterator[Path]:
    """tokenizer.json files that the stage may have used, most likely first."""
    paths = RunPaths(root)
    folders = [*sorted((root / "checkpoints" / stage).glob("step-*"), reverse=True), paths.student]
    with suppress(OSError, ValueError, KdrlError, KeyError, TypeError):
        folders.append(resolve_path(read_fields(paths.recipe, what="recipe")["student"]["path"]))
    folders += sorted((root / "checkpoints").glob("*/step-*"))
    yield from (file for folder in folders if (file := folder / "tokenizer.json").is_file())
