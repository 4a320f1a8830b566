"""The views `rollouts`, `steps` and `prompts` as SQL over the files of runs."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import duckdb
import pyarrow as pa

from kdrl_core.look.rollouts.index import RunIndex
from kdrl_core.look.rollouts.index_rows import INDEX, SUMMARY
from kdrl_core.look.rollouts.record import BULKY, PARTS, RECORD, TIMINGS

BULKY_PARTS = tuple(part for part, names in PARTS.items() if names)
TIMES = "times"
"""The timings in `steps`, which the views treat like a file of each step."""

PROMPTS: dict[str, str] = {
    "run": "name of the run",
    "stage": "stage of the run",
    "prompt_id": "problem_id of the pool",
    "num_steps": "steps that trained on the prompt (dynamic sampling may drop what was drawn)",
    "first_step": "first of them",
    "last_step": "last of them",
    "num_rollouts": "responses to it",
    "reward_mean": "mean reward of the responses",
    "reward_first": "mean reward at its first step",
    "reward_last": "mean reward at its last step",
    "length_mean": "mean length in tokens",
    "kl_mean": "KL estimate to the teacher: mean over all tokens",
    "ground_truth": "the problem's answer",
    "prompt": "the rendered prompt",
}
STEPS: dict[str, str] = {
    "run": "name of the run",
    "stage": "stage of the run",
    "step": "step of the stage, from 0",
    **SUMMARY,
}
"""Columns of the views, described. `steps` also has every metric and timing of the stage by its name."""


@dataclass(frozen=True, slots=True)
class IndexedRun:
    """A run, and its name in the views."""

    name: str
    index: RunIndex


def sql_type(name: str) -> str:
    """DuckDB's type of a column of the record or the index."""
    return _sql_types()[name]


@cache
def _sql_types() -> dict[str, str]:
    columns = pa.schema([*RECORD, *(field for field in INDEX if field.name not in RECORD.names)])
    with duckdb.connect(":memory:") as connection:
        found = connection.from_arrow(columns.empty_table())
        return dict(zip(found.columns, map(str, found.types), strict=True))


def quoted(text: str | Path) -> str:
    """A text as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def user_views(parts: Collection[str]) -> list[str]:
    """Statements that define the views, with the bulky columns of `parts`; the others are null.

    They need the views `indexed` and `<part>_part`, and the tables `step_rows` and `times_part`. A query is much faster
    without joins that it does not need.
    """
    home = {name: part for part, names in PARTS.items() for name in names}
    columns = []
    for name in RECORD.names:
        if name in TIMINGS:
            given = identifier(TIMINGS[name]) if TIMES in parts else "null::double"
            columns.append(f"{given} as {name}")
        elif name in BULKY:
            given = f"{home[name]}_part.{name}" if home[name] in parts else f"null::{sql_type(name)}"
            columns.append(f"{given} as {name}")
        else:
            columns.append(f"i.{name}")
    joins = [f"left join {part}_part using (run, stage, step, row)" for part in BULKY_PARTS if part in parts]
    if TIMES in parts:
        joins.append(f"left join {TIMES}_part on s_run = i.run and s_stage = i.stage and s_step = i.step")
    return [
        f"create view rollouts as select {', '.join(columns)} from indexed i {' '.join(joins)}",
        "create view steps as select * from step_rows",
        f"create view prompts as {_PROMPTS_SQL}",
    ]


_PROMPTS_SQL = """
    select run, stage, prompt_id,
        count(distinct step)::integer as num_steps, min(step) as first_step, max(step) as last_step,
        count(*)::integer as num_rollouts, avg(reward) as reward_mean,
        avg(reward) filter (step = first_seen) as reward_first, avg(reward) filter (step = last_seen) as reward_last,
        avg(length) as length_mean,
        sum(kl_sum) / nullif(sum(length) filter (kl_sum is not null), 0) as kl_mean,
        any_value(ground_truth) as ground_truth, any_value(prompt) as prompt
    from (
        select *, min(step) over one as first_seen, max(step) over one as last_seen from rollouts
        window one as (partition by run, stage, prompt_id)
    ) group by run, stage, prompt_id
"""


def index_sql(runs: Sequence[IndexedRun]) -> str:
    """All rows of the runs' indexes."""
    found = [
        f"select {quoted(run.name)} as run, {', '.join(INDEX.names)} from read_parquet({_list(run.index.files)})"
        for run in runs
        if run.index.files
    ]
    return " union all ".join(found or [f"{null_row(INDEX.names)} where false"])


def part_sql(runs: Sequence[IndexedRun], part: str) -> str:
    """The bulky columns of one part, for every step that has it. Files with the same columns are read together."""
    found = []
    for run in runs:
        alike: dict[tuple[str, ...], list[Path]] = defaultdict(list)
        for step in run.index.steps:
            if part in step.bulky and step.num_rows:
                alike[tuple(step.bulky[part])].append(run.index.path(step, part))
        found += [files_sql(run.name, part, names, files) for names, files in alike.items()]
    return " union all ".join(found or [null_row(["stage", "step", "row", *PARTS[part]]) + " where false"])


def files_sql(run: str, part: str, names: Collection[str], files: Sequence[Path]) -> str:
    """The bulky columns `names` of files of one part, with null for the part's other columns."""
    columns = [f"{name if name in names else 'null'}::{sql_type(name)} as {name}" for name in PARTS[part]]
    return (
        f"select {quoted(run)} as run, stage, step, file_row_number::integer as row, {', '.join(columns)} "
        f"from read_parquet({_list(files)}, file_row_number = true, hive_partitioning = true, "
        "hive_types = {'stage': 'VARCHAR', 'step': 'INTEGER'})"
    )


def _list(files: Iterable[Path]) -> str:
    return f"[{', '.join(map(quoted, files))}]"


def null_row(names: Iterable[str]) -> str:
    """A row of nulls with these columns and `run`."""
    columns = ", ".join(f"null::{sql_type(name)} as {name}" for name in names)
    return f"select null::varchar as run, {columns}"
