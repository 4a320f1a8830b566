"""Which teacher samples an SFT stage needs, shard by shard, and which are there. Loads no model library."""

import pyarrow.compute as pc

from kdrl_core.ledger import Run, find_intact, is_published
from kdrl_core.ledger.artifact import ARTIFACTS
from kdrl_core.tables.files import read_table


def num_shards(run: Run, stage: str) -> int:
    """Number of shards of `sft.shard_prompts` problems in the stage's pool; the last may be smaller."""
    return -(-len(_problem_ids(run, stage)) // run.recipe.stage(stage).sft.shard_prompts)


def shard_problem_ids(run: Run, stage: str, shard: int) -> list[str]:
    """The problems of one shard: a slice of the pool sorted by problem_id."""
    size = run.recipe.stage(stage).sft.shard_prompts
    return _problem_ids(run, stage)[shard * size : (shard + 1) * size]


def remaining_shards(run: Run, stage: str) -> list[int]:
    """The shards whose samples or verdicts are not published yet; none once the dataset is there."""
    if is_published(run.paths.sft_dataset(stage)):
        return []
    rows = [row for row in ARTIFACTS.values() if row.per == "shard"]
    places = {shard: [row.place(stage, shard) for row in rows] for shard in range(num_shards(run, stage))}
    return [shard for shard, of in places.items() if not all(is_published(run.paths.root / place) for place in of)]


def open_shards(run: Run, stage: str) -> range:
    """The shards to go through before selection: all, unless the dataset is there and intact."""
    return range(0 if find_intact(run.paths.sft_dataset(stage)) else num_shards(run, stage))


def _problem_ids(run: Run, stage: str) -> list[str]:
    table = read_table(run.paths.pool, ["stage", "problem_id"])
    ids: list[str] = table.filter(pc.equal(table["stage"], stage))["problem_id"].to_pylist()
    return sorted(ids)
