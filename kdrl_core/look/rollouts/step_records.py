"""The records of one step, joined from its files, each compared with its manifest."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from kdrl_core.errors import DamagedArtifactError
from kdrl_core.look.rollouts.index_rows import IndexedStep, list_means
from kdrl_core.look.rollouts.record import PARTS, RECORD, TIMINGS
from kdrl_core.look.rollouts.sources import DamagedFile, StepFiles, read_part

_ENTROPIES = "entropies"


def step_table(
    files: StepFiles, indexed: IndexedStep, columns: Sequence[str], on_damaged: Callable[[DamagedFile], None]
) -> pa.Table:
    """The ids of a step's rollouts, and the `columns` that its intact files have, in the order of its rows.

    A file that was damaged since the index was made is reported by `on_damaged` and left out.

    Raises:
        DamagedArtifactError: rollouts.parquet is damaged.
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
    """Rows of a step as records.

    Args:
        table: some rows of `step_table`.
        key: run, stage and step.
        metrics: metrics and timings of the step.
        columns: of the record; unknown values are null.
    """
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
