"""One step's rows of the index, from its files: the single values of each rollout, and the start of its response."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.errors import DamagedArtifactError
from kdrl_core.look.rollouts.record import PARTS, RECORD, SCALARS
from kdrl_core.look.rollouts.sources import Stamp, StepFiles, bulky_columns, read_part

PREVIEW_CHARS = 200
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
    """The step in numbers, by `step_summary.SUMMARY_SQL`."""

    @property
    def key(self) -> tuple[str, int]:
        """Stage and step."""
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
            problem = error.problem if isinstance(error, DamagedArtifactError) else str(error).splitlines()[0]
            step.damaged[part] = problem.removeprefix(f"{files.path(part)} ")
            if part == "rollouts":
                break
            continue
        columns = {**values, **columns}
        if bulky := bulky_columns(files, part):
            step.bulky[part] = bulky
    if ids is None:
        return step, INDEX.empty_table()
    step.num_rows = len(ids)
    return step, _table(step, columns)


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
